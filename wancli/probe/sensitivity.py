"""Measure how much each block's text or picture changes the velocity, by forwards that differ in what some
blocks read.

Letters of shapes: B batch (1), C latent channels, T Y X the latent grid, L video tokens, D model width.

Forwards on the same latents share the blocks before their first difference: 40 forwards that each differ
in one block of 40, and the plain one, take 40 + (40 + 39 + ... + 1) = 860 blocks, 21.5 forwards. The
derivatives by the strength of all blocks take one forward and one backward pass.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from wancli.models.dit import BlockState, WanModel
from wancli.models.dit_layers import Mix
from wancli.models.given_frames import NO_FRAMES, GivenFrames
from wancli.models.token_weights import dense


@dataclass(frozen=True)
class ProbePoint:
    """A point of a denoising run: latents at a timestep. Block i reads `plain[i]`, or `injected[i]` when it
    is probed."""

    model: WanModel
    x_1CTYX: Tensor
    t: float
    plain: Sequence[Mix]
    injected: Sequence[Mix]
    given: GivenFrames = NO_FRAMES


class ProbedRow(Sequence[Mix]):
    """What the blocks of one forward read: `changed` in the probed blocks, else `plain`. Counts the reads of
    `changed`.
    """

    def __init__(self, plain: Sequence[Mix], changed: Sequence[Mix], blocks: Collection[int]) -> None:
        self._mixes = [changed[b] if b in blocks else mix for b, mix in enumerate(plain)]
        self._blocks = blocks
        self.hits = 0

    def __len__(self) -> int:
        return len(self._mixes)

    def __iter__(self) -> Iterator[Mix]:
        """Iterate without counting: no block reads."""
        return iter(self._mixes)

    @overload
    def __getitem__(self, block: int) -> Mix: ...
    @overload
    def __getitem__(self, block: slice) -> Sequence[Mix]: ...
    def __getitem__(self, block: int | slice) -> Mix | Sequence[Mix]:
        if isinstance(block, slice):
            raise TypeError("blocks read their contexts one by one")
        self.hits += block in self._blocks
        return self._mixes[block]


def predict_velocities(
    point: ProbePoint, rows: Sequence[Sequence[Mix]], forwards_per_pass: int = 1
) -> Iterator[tuple[int, Tensor]]:
    """Predict the velocity with each row of mixes, bit for bit as `WanModel.forward` does, in fp32.

    Yields (index in `rows`, velocity) in the order of the rows' first differences from `plain`, and last
    (len(rows), velocity of `plain`).

    From their first difference on, `forwards_per_pass` forwards share a pass over the blocks, which pays if
    weights are fetched for the pass. Each forward keeps a residual stream. Needs gradients to be disabled.
    Raises ValueError if a row equals `plain`.
    """
    model, plain = point.model, point.plain
    starts = {i: _first_difference(plain, row) for i, row in enumerate(rows)}
    order = sorted(starts, key=lambda i: starts[i])
    groups = [order[i : i + forwards_per_pass] for i in range(0, len(order), forwards_per_pass)] or [[]]
    trunk, at = model.embed(point.x_1CTYX, point.t, point.given), 0
    # The trunk runs up to the block where the next group forks from it; in the last pass to the end.
    stops = [*(starts[group[0]] for group in groups[1:]), len(plain)]
    for group, stop in zip(groups, stops):
        forks: dict[int, BlockState] = {}
        for block, layer in enumerate(model.blocks.iterate_from(at), at):
            forks |= {i: trunk.fork() for i in group if starts[i] == block}
            for i, fork in forks.items():
                fork.apply(layer, rows[i][block], checkpointed=False)
            if block < stop:
                trunk.apply(layer, plain[block], checkpointed=False)
        at = stop
        for i in group:
            yield i, model.read_velocity(forks.pop(i))
    yield len(rows), model.read_velocity(trunk)


def _first_difference(plain: Sequence[Mix], row: Sequence[Mix]) -> int:
    for block, (mix, other) in enumerate(zip(plain, row, strict=True)):
        if mix != other:
            return block
    raise ValueError("a row reads the same as the plain forward everywhere")


def compute_derivatives(point: ProbePoint, toward_1CTYX: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Compute the derivatives of <velocity, toward> by the strength s at which each token of a block reads
    `injected`, at s = 0.

    Yields (number of blocks, velocity), then (block, [L] derivatives, one for each token) from the last block
    to the first. The strength mixes outputs: (1-s)·CA(x, plain) + s·CA(x, injected).

    All blocks run once without gradients, and the stream before each block is kept. Then each block runs
    once more alone, with gradients. That is gradient checkpointing whose forward pass is as fast as
    sampling. Weights must be resident.
    """
    model, plain = point.model, point.plain
    inputs: list[Tensor] = []
    with torch.no_grad():
        stream = model.embed(point.x_1CTYX, point.t, point.given)
        for layer, mix in zip(model.blocks, plain, strict=True):
            inputs.append(stream.x_BLD.clone())
            stream.apply(layer, mix, checkpointed=False)
    with torch.enable_grad():
        x_BLD = stream.x_BLD.requires_grad_()
        v_1CTYX = model.read_velocity(stream)
        gradient_BLD = torch.autograd.grad((v_1CTYX * toward_1CTYX).sum(), x_BLD)[0]
    yield len(plain), v_1CTYX.detach()
    for block in reversed(range(len(plain))):
        with torch.enable_grad():
            x_BLD = inputs.pop().requires_grad_()
            s_L = torch.zeros(x_BLD.shape[1], device=x_BLD.device, requires_grad=True)
            stream.x_BLD = x_BLD
            mix = _mix(plain[block], point.injected[block], s_L)
            stream.apply(model.blocks[block], mix, checkpointed=False)
            gradient_BLD, by_s_L = torch.autograd.grad(stream.x_BLD, (x_BLD, s_L), gradient_BLD)
        yield block, by_s_L


def _mix(plain: Mix, injected: Mix, s_L: Tensor) -> Mix:
    return (
        *((context, dense(weight) * (1 - s_L)) for context, weight in plain),
        *((context, dense(weight) * s_L) for context, weight in injected),
    )


def estimate_change(by_s_L: Tensor, v_1CTYX: Tensor) -> float:
    """Estimate the relative first-order change of the velocity, from the derivatives of one random projection
    of it.

    With `toward` drawn from the unit normal distribution, the derivative by the strength at token t has
    the mean square ‖Δv_t‖², Δv_t being what strength 1 at that token alone would add to the velocity. So
    sqrt(Σ_t derivative_t²) estimates sqrt(Σ_t ‖Δv_t‖²): the sum over many tokens is what makes one draw
    enough. The derivative by a strength common to all tokens would be a single number of random size.
    """
    return float(torch.linalg.vector_norm(by_s_L) / torch.linalg.vector_norm(v_1CTYX).clamp_min(1e-30))
