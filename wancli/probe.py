"""What an injection really changed, measured while sampling.

Letters of shapes: B batch, C latent channels, T Y X the latent grid, L video tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wancli.difference import LEGACY_THRESHOLD
from wancli.models.dit import WanModel
from wancli.models.layers import Mix

if TYPE_CHECKING:
    from wancli.sample import Reads


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


class Measured:
    """A model that runs every injected forward once more without its injection, and compares.

    Costs one more forward per injected branch and step. The velocity it returns is the model's
    own, bit for bit.
    """

    def __init__(self, model: WanModel) -> None:
        self.model = model
        self.effects: list[Effect] = []

    def __call__(self, x_BCTYX: Tensor, t: float, reads: Reads) -> Tensor:
        if not reads.injected:
            return self.model.forward(x_BCTYX, t, reads)
        blocks: dict[int, float] = {}
        percent: dict[int, float] = {}
        with self._comparing(reads, blocks, percent):
            v_BCTYX = self.model.forward(x_BCTYX, t, reads)
        plain_BCTYX = self.model.forward(x_BCTYX, t, [reads.base] * len(reads))
        velocity = relative(v_BCTYX, plain_BCTYX)
        self.effects.append(Effect(reads.step, reads.branch, velocity, blocks, percent))
        return v_BCTYX

    @contextmanager
    def _comparing(self, reads: Reads, blocks: dict[int, float], percent: dict[int, float]) -> Iterator[None]:
        def hook(index: int) -> Callable[[nn.Module, tuple[Tensor, Mix], Tensor], None]:
            def compare(cross_attn: nn.Module, args: tuple[Tensor, Mix], out_BLD: Tensor) -> None:
                # `forward`, since a call of the module would come back here.
                plain_BLD = cross_attn.forward(args[0], reads.base)
                blocks[index] = relative(out_BLD, plain_BLD)
                moved = (out_BLD - plain_BLD).abs() > LEGACY_THRESHOLD
                percent[index] = 100 * moved.float().mean().item()

            return compare

        layers = [self.model.get_submodule(f"blocks.{i}.cross_attn") for i in reads.injected]
        handles = [layer.register_forward_hook(hook(i)) for i, layer in zip(reads.injected, layers)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def relative(a: Tensor, b: Tensor) -> float:
    """‖a - b‖ / ‖b‖."""
    change, size = (torch.linalg.vector_norm(x, dtype=torch.float32) for x in (a - b, b))
    return float(change / size.clamp_min(1e-30))
