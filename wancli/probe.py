"""What an injection really changed, measured while sampling.

Letters of shapes: B batch, C latent channels, T Y X the latent grid, L video tokens, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wancli.difference import LEGACY_THRESHOLD
from wancli.models.dit import Request, WanModel
from wancli.models.layers import Mix

if TYPE_CHECKING:
    from wancli.sample import Forward


@dataclass(frozen=True)
class Effect:
    """One forward with and without its injection.

    `velocity` and `blocks` are relative L2 changes of the velocity and of each injected block's
    cross-attention output; `changed_percent` counts elements of that output that moved by more
    than 0.01.
    """

    step: int
    branch: str
    velocity: float
    blocks: dict[int, float]
    changed_percent: dict[int, float]


def velocities(model: WanModel, forwards: Sequence[Forward], riders: int | None = None) -> list[Tensor]:
    """The velocity of each forward, bit for bit the model's own, and the effects that some ask for.

    An injected forward that is measured costs one more, the same without its injection, which rides
    along. `riders` as in `WanModel.velocities`.
    """
    found = {i: _Changes() for i, f in enumerate(forwards) if f.effects is not None and f.contexts.injected}
    plain = [
        Request(f.x_BCTYX, f.t, [f.contexts.base] * len(f.contexts)) for f in (forwards[i] for i in found)
    ]
    with _comparing(model, forwards, found):
        all_BCTYX = model.velocities([*forwards, *plain], riders)
    for (i, changes), plain_BCTYX in zip(found.items(), all_BCTYX[len(forwards) :]):
        effects, reads = forwards[i].effects, forwards[i].contexts
        assert effects is not None
        moved = relative(all_BCTYX[i], plain_BCTYX)
        effects.append(Effect(reads.step, reads.branch, moved, changes.blocks, changes.percent))
    return all_BCTYX[: len(forwards)]


@dataclass(frozen=True)
class _Changes:
    """What an injection does to the cross-attention of each injected block."""

    blocks: dict[int, float] = field(default_factory=dict)
    percent: dict[int, float] = field(default_factory=dict)


@contextmanager
def _comparing(model: WanModel, forwards: Sequence[Forward], found: Mapping[int, _Changes]) -> Iterator[None]:
    """Compares the cross-attention of injected blocks with what they give uninjected on the same tokens."""

    def hook(block: int) -> Callable[[nn.Module, tuple[Tensor, Mix], Tensor], None]:
        turns = itertools.count()  # a block serves the forwards in their order

        def compare(cross_attn: nn.Module, args: tuple[Tensor, Mix], out_BLD: Tensor) -> None:
            turn = next(turns)
            if turn not in found or block not in forwards[turn].contexts.injected:
                return
            # `forward`, since a call of the module would come back here.
            plain_BLD = cross_attn.forward(args[0], forwards[turn].contexts.base)
            moved = (out_BLD - plain_BLD).abs() > LEGACY_THRESHOLD
            found[turn].blocks[block] = relative(out_BLD, plain_BLD)
            found[turn].percent[block] = 100 * moved.float().mean().item()

        return compare

    blocks = {block for turn in found for block in forwards[turn].contexts.injected}
    layers = {block: model.get_submodule(f"blocks.{block}.cross_attn") for block in blocks}
    handles = [layer.register_forward_hook(hook(block)) for block, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def relative(a: Tensor, b: Tensor) -> float:
    """‖a - b‖ / ‖b‖."""
    change, size = (torch.linalg.vector_norm(x, dtype=torch.float32) for x in (a - b, b))
    return float(change / size.clamp_min(1e-30))
