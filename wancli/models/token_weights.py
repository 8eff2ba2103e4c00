"""Weights of video tokens: a part of a mix that acts on some tokens only.

Letters: L video tokens, N the tokens among them whose weight is not 0.
"""

from __future__ import annotations

from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor


class TokenWeights:
    """One weight for each token, fp32 [L]. A part that acts on a tenth of the tokens costs a tenth.

    Takes the weights on the CPU, where it looks for zeros and ones: on a GPU each look makes the host wait.
    """

    def __init__(self, weights_L: Tensor, device: str | torch.device = "cpu") -> None:
        self._weights_L = weights_L
        self._device = device
        self._parts: dict[tuple[int, int], float | TokenWeights] = {}

    @cached_property
    def dense(self) -> Tensor:
        """All weights [L], on the device."""
        return self._weights_L.to(self._device)

    @cached_property
    def tokens(self) -> Tensor:
        """The indexes of the tokens whose weight is not 0 [N], ascending, on the device."""
        return self._weights_L.nonzero()[:, 0].to(self._device)

    @cached_property
    def nonzero(self) -> Tensor | None:
        """The weights of these tokens [N], on the device; None if all are 1."""
        weights_N = self._weights_L[self._weights_L != 0]
        return None if bool((weights_N == 1).all()) else weights_N.to(self._device)

    def narrow(self, start: int, stop: int) -> float | TokenWeights:
        """Return the weights of consecutive tokens: a number if all are the same."""
        if (start, stop) not in self._parts:
            part_L = self._weights_L[start:stop]
            first = part_L[0].item()
            same = bool((part_L == first).all())
            self._parts[start, stop] = first if same else TokenWeights(part_L, self._device)
        return self._parts[start, stop]


# A number for all tokens, or one for each: of a tensor [L], which may have a gradient, all tokens attend, of
# `TokenWeights` those whose weight is not 0.
Weight: TypeAlias = float | Tensor | TokenWeights


def narrow(weight: Weight, start: int, stop: int) -> Weight:
    """Return the weight of consecutive tokens."""
    if isinstance(weight, TokenWeights):
        return weight.narrow(start, stop)
    return weight[start:stop] if isinstance(weight, Tensor) else weight


def dense(weight: Weight) -> float | Tensor:
    """Return the weight as a number or as a tensor [L]."""
    return weight.dense if isinstance(weight, TokenWeights) else weight
