"""Normalised attention guidance: outputs of cross-attention moved away from those for a negative prompt.

Source: arXiv 2505.21179, and its code at github.com/ChenDarYen/Normalized-Attention-Guidance. It needs no
second forward, so it works at guidance 1.

Letters: B batch, L video tokens, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wancli.models.text_context import Context


@dataclass(frozen=True, eq=False)
class Guide:
    """What attention moves away from, how far, and the limits of that."""

    negative: Context
    scale: float
    alpha: float
    tau: float


def guide_attention(
    positive_BLD: Tensor, negative_BLD: Tensor, guide: Guide, weight: float | Tensor = 1.0
) -> Tensor:
    """Return positive + weight * alpha * (g - positive), in the dtype of positive.

    g = scale * positive - (scale - 1) * negative; where |g|_1 of a token is more than tau * |positive|_1, it
    is scaled down to that. `weight` is a number, or one per token [L]. Computes in fp32.
    """
    z_BLD, away_BLD = positive_BLD.float(), negative_BLD.float()
    g_BLD = torch.lerp(away_BLD, z_BLD, guide.scale)
    limit_BL1 = guide.tau * torch.linalg.vector_norm(z_BLD, 1, dim=-1, keepdim=True)
    size_BL1 = torch.linalg.vector_norm(g_BLD, 1, dim=-1, keepdim=True)
    g_BLD = g_BLD * (limit_BL1 / size_BL1.clamp_min(1e-30)).clamp_max(1.0)
    mixed = weight[:, None] * guide.alpha if isinstance(weight, Tensor) else weight * guide.alpha
    moved_BLD: Tensor = z_BLD + mixed * (g_BLD - z_BLD)
    return moved_BLD.to(positive_BLD.dtype)
