"""Attention maps: where in the picture the words of a prompt act.

Letters of shapes: H heads, L video tokens, C a chunk of them, N rows of a context, K head width, W words,
G groups of blocks, S groups of steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wancli.injection.attention_spec import AttentionSpec
from wancli.resources.memory_model import attention_chunk


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """The maps of a shot, summed over the blocks and steps so far."""

    spec: AttentionSpec
    sums_GSWL: Tensor  # fp32

    @classmethod
    def zeros(cls, spec: AttentionSpec, tokens: int, device: str = "cpu") -> AttentionMaps:
        """Return the maps before the first step."""
        shape = len(spec.blocks), len(spec.steps), len(spec.words), tokens
        return cls(spec, torch.zeros(shape, device=device))

    def copy(self) -> AttentionMaps:
        """Return a copy that the next step can add to: what failed steps have added is dropped with it."""
        return replace(self, sums_GSWL=self.sums_GSWL.clone())

    def to(self, device: str) -> AttentionMaps:
        return replace(self, sums_GSWL=self.sums_GSWL.to(device))

    def add(self, step: int, block: int, first_token: int, probabilities_WL: Tensor) -> None:
        """Add the probabilities of consecutive tokens in one block at one step, in place."""
        tokens = slice(first_token, first_token + probabilities_WL.shape[1])
        for g, blocks in enumerate(self.spec.blocks):
            for s, steps in enumerate(self.spec.steps):
                if block in blocks.members and step in steps.members:
                    self.sums_GSWL[g, s, :, tokens] += probabilities_WL

    def average(self) -> Tensor:
        """Return the means over blocks and steps [W, G, S, L], once all steps are taken: probabilities."""
        counts_G = torch.tensor([float(len(group.members)) for group in self.spec.blocks])
        counts_S = torch.tensor([float(len(group.members)) for group in self.spec.steps])
        counts_GS11 = torch.outer(counts_G, counts_S)[..., None, None]
        return (self.sums_GSWL / counts_GS11.to(self.sums_GSWL)).permute(2, 0, 1, 3).contiguous()


def word_probabilities(
    q_HLK: Tensor, k_HNK: Tensor, bias_N: Tensor, words: Sequence[Sequence[int]]
) -> Tensor:
    """Return the probability of each word for each token [W, L], fp32, in the mean over heads.

    It is softmax(q k' / sqrt(K) + bias) over the rows of a context, summed over the rows of each word.
    `bias_N` makes the pad row stand for all padding, so nothing is left out of the softmax. Tokens are
    computed some at a time: the scores of all tokens never exist.
    """
    heads, tokens, width = q_HLK.shape
    rows = len(bias_N)
    mean_NW = torch.zeros(rows, len(words), device=q_HLK.device)
    for w, positions in enumerate(words):
        mean_NW[list(positions), w] = 1 / heads
    k_HKN = k_HNK[:, :rows].float().transpose(1, 2)
    out_WL = torch.empty(len(words), tokens, device=q_HLK.device)
    for start in range(0, tokens, chunk := attention_chunk(q_HLK.device.type)):
        q_HCK = q_HLK[:, start : start + chunk].float()
        scores_HCN = torch.baddbmm(bias_N[None, None], q_HCK, k_HKN, alpha=1 / math.sqrt(width))
        out_WL[:, start : start + chunk] = (scores_HCN.softmax(dim=-1) @ mean_NW).sum(dim=0).T
    return out_WL
