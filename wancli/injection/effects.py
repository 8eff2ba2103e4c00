"""Measure what an injection really changes, while sampling.

Letters of shapes: B batch, C latent channels, T Y X the latent grid, L video tokens, D width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from wancli.injection.contexts import Effect, Forward
from wancli.models.dit import Request, WanModel
from wancli.models.dit_layers import Mix
from wancli.text.prompt_distance import LEGACY_THRESHOLD


def predict_velocities(
    model: WanModel, forwards: Sequence[Forward], forwards_per_pass: int | None = None
) -> list[Tensor]:
    """Predict the velocity of each forward, bit for bit the model's own, and measure the effects.

    An injected forward whose effects are measured costs a second one without its injection, in the same
    batch. `forwards_per_pass` as in `WanModel.predict_velocities`.
    """
    changes_by_forward: dict[int, dict[int, _OutputChange]] = {
        i: {} for i, f in enumerate(forwards) if f.effects is not None and f.contexts.injected_blocks
    }
    plain = [
        Request(f.x_BCTYX, f.t, [f.contexts.base] * len(f.contexts), f.given)
        for f in (forwards[i] for i in changes_by_forward)
    ]
    with _compare_outputs(model, forwards, changes_by_forward):
        all_BCTYX = model.predict_velocities([*forwards, *plain], forwards_per_pass)
    for (i, changes), plain_BCTYX in zip(changes_by_forward.items(), all_BCTYX[len(forwards) :]):
        effects, contexts = forwards[i].effects, forwards[i].contexts
        assert effects is not None
        moved = relative_change(all_BCTYX[i], plain_BCTYX)
        blocks = {block: math.sqrt(c.moved / max(c.plain, 1e-60)) for block, c in changes.items()}
        percent = {block: 100 * c.above_threshold / c.elements for block, c in changes.items()}
        effects.append(Effect(contexts.step, contexts.branch, moved, blocks, percent))
    return all_BCTYX[: len(forwards)]


@dataclass
class _OutputChange:
    """The change of one block's cross-attention output, summed over the pieces that it is computed in."""

    moved: float = 0.0  # sums of squares
    plain: float = 0.0
    above_threshold: int = 0  # elements that moved by more than the threshold
    elements: int = 0

    def add(self, out_BLD: Tensor, plain_BLD: Tensor) -> None:
        change_BLD = out_BLD - plain_BLD
        self.moved += torch.linalg.vector_norm(change_BLD, dtype=torch.float32).item() ** 2
        self.plain += torch.linalg.vector_norm(plain_BLD, dtype=torch.float32).item() ** 2
        self.above_threshold += int((change_BLD.abs() > LEGACY_THRESHOLD).sum())
        self.elements += out_BLD.numel()


@contextmanager
def _compare_outputs(
    model: WanModel, forwards: Sequence[Forward], changes_by_forward: Mapping[int, dict[int, _OutputChange]]
) -> Iterator[None]:
    """Compare the cross-attention output of injected blocks with that without injection, token by token."""
    # A block runs the forwards in order, each perhaps in several pieces.
    turns: Counter[int] = Counter()

    def compare(block: int, cross_attn: nn.Module, args: tuple[Tensor, Mix], out_BLD: Tensor) -> None:
        turn = turns[block] - 1
        if turn in changes_by_forward and block in forwards[turn].contexts.injected_blocks:
            # `forward`, because a call of the module would run this hook again.
            plain_BLD = cross_attn.forward(args[0], forwards[turn].contexts.base)
            changes_by_forward[turn].setdefault(block, _OutputChange()).add(out_BLD, plain_BLD)

    handles = []
    for block in {block for turn in changes_by_forward for block in forwards[turn].contexts.injected_blocks}:
        layer = model.get_submodule(f"blocks.{block}")
        handles.append(layer.register_forward_pre_hook(lambda *_, block=block: turns.update([block])))
        handles.append(layer.get_submodule("cross_attn").register_forward_hook(partial(compare, block)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def relative_change(a: Tensor, b: Tensor) -> float:
    """‖a - b‖ / ‖b‖."""
    change, size = (torch.linalg.vector_norm(x, dtype=torch.float32) for x in (a - b, b))
    return float(change / size.clamp_min(1e-30))
