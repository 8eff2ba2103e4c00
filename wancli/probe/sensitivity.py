"""How much each block's text matters to the velocity: forwards that differ in what some blocks read.

Letters of shapes: B batch (1), C latent channels, T Y X the latent grid, L video tokens, D model width.

Of many forwards on the same latents the blocks before the first difference are computed once: 40 forwards
that each differ in one block of 40, and the plain one, take 40 + (40 + 39 + ... + 1) = 860 blocks, 21.5
forwards. The derivative by the strength of every block at once takes one walk there and one back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wancli.models.dit import Stream, WanModel
from wancli.models.dit_layers import Mix


@dataclass(frozen=True)
class ProbePoint:
    """Where a model is looked at: latents at a timestep, and what block i reads, `plain[i]`, or could read,
    `injected[i]`."""

    model: WanModel
    x_1CTYX: Tensor
    t: float
    plain: Sequence[Mix]
    injected: Sequence[Mix]


def velocities(
    point: ProbePoint, rows: Sequence[Sequence[Mix]], forwards_per_pass: int = 1
) -> Iterator[tuple[int, Tensor]]:
    """The velocity with each row of mixes, as (its place in `rows`, velocity) in the order of their first
    differences from `plain`; last that of `plain`, as (len(rows), velocity). fp32, and bit for bit those of
    `WanModel.forward`.

    `riders` of them share a pass over the blocks from their first difference on, which pays where weights
    are fetched for it; each keeps a residual stream. Without gradients only. Raises ValueError for a row that
    differs nowhere.
    """
    model, plain = point.model, point.plain
    starts = {i: _first_difference(plain, row) for i, row in enumerate(rows)}
    order = sorted(starts, key=lambda i: starts[i])
    groups = [order[i : i + forwards_per_pass] for i in range(0, len(order), forwards_per_pass)] or [[]]
    trunk, at = model.embed(point.x_1CTYX, point.t), 0
    # The trunk goes along to where the next group leaves it, with the last one to the end.
    stops = [*(starts[group[0]] for group in groups[1:]), len(plain)]
    for group, stop in zip(groups, stops):
        forks: dict[int, Stream] = {}
        for block, layer in enumerate(model.blocks.since(at), at):
            forks |= {i: trunk.fork() for i in group if starts[i] == block}
            for i, fork in forks.items():
                fork.through(layer, rows[i][block], checkpointed=False)
            if block < stop:
                trunk.through(layer, plain[block], checkpointed=False)
        at = stop
        for i in group:
            yield i, model.velocity(forks.pop(i))
    yield len(rows), model.velocity(trunk)


def _first_difference(plain: Sequence[Mix], row: Sequence[Mix]) -> int:
    for block, (mix, other) in enumerate(zip(plain, row, strict=True)):
        if mix != other:
            return block
    raise ValueError("a row reads the same as the plain forward everywhere")


def derivatives(point: ProbePoint, toward_1CTYX: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Of <velocity, toward>, by the strength with which a block's tokens would read `injected`, at strength
    0: (block, [L] one for each token), from the last block to the first; before these (number of blocks,
    velocity).

    The strength s mixes outputs, (1-s)·CA(x, plain) + s·CA(x, injected). All blocks run once without
    gradients, of which the stream before each is kept; then each runs once more, with them, alone. That is
    gradient checkpointing whose first walk is as fast as sampling. Weights need to be resident.
    """
    model, plain = point.model, point.plain
    inputs: list[Tensor] = []
    with torch.no_grad():
        stream = model.embed(point.x_1CTYX, point.t)
        for layer, mix in zip(model.blocks, plain, strict=True):
            inputs.append(stream.x_BLD.clone())
            stream.through(layer, mix, checkpointed=False)
    with torch.enable_grad():
        x_BLD = stream.x_BLD.requires_grad_()
        v_1CTYX = model.velocity(stream)
        gradient_BLD = torch.autograd.grad((v_1CTYX * toward_1CTYX).sum(), x_BLD)[0]
    yield len(plain), v_1CTYX.detach()
    for block in reversed(range(len(plain))):
        with torch.enable_grad():
            x_BLD = inputs.pop().requires_grad_()
            s_L = torch.zeros(x_BLD.shape[1], device=x_BLD.device, requires_grad=True)
            stream.x_BLD = x_BLD
            mix = _mix(plain[block], point.injected[block], s_L)
            stream.through(model.blocks[block], mix, checkpointed=False)
            gradient_BLD, by_s_L = torch.autograd.grad(stream.x_BLD, (x_BLD, s_L), gradient_BLD)
        yield block, by_s_L


def _mix(plain: Mix, injected: Mix, s_L: Tensor) -> Mix:
    return (
        *((context, weight * (1 - s_L)) for context, weight in plain),
        *((context, weight * s_L) for context, weight in injected),
    )


def estimate_change(by_s_L: Tensor, v_1CTYX: Tensor) -> float:
    """How far the velocity moves by first order, relative to its length, from the derivatives of one
    random projection of it.

    With `toward` drawn from the unit normal distribution, the derivative by the strength at token t has
    the mean square ‖Δv_t‖², Δv_t being what strength 1 at that token alone would add to the velocity. So
    sqrt(Σ_t derivative_t²) estimates sqrt(Σ_t ‖Δv_t‖²): the sum over many tokens is what makes one draw
    enough, where the derivative by a strength common to all tokens would be one number of random size.
    """
    return float(torch.linalg.vector_norm(by_s_L) / torch.linalg.vector_norm(v_1CTYX).clamp_min(1e-30))
