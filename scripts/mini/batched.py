"""WanModel's forward for a batch in which every sample reads prompts of its own, and others per block.

The same modules and the same maths as WanModel.forward, whose contexts are shared by the batch; the
one difference is that keys and values are made of rows [B, N, D].

Letters: B samples, P prompts, N context rows, D model width, E text width, K blocks, L video tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wancli.models.dit import Block, WanModel, _unpatchify
from wancli.models.dit_layers import add, add_gated, join_heads, modulate


@dataclass(frozen=True)
class Texts:
    """Projected prompts of unlike length: the rows and, per row, what is added to its scores."""

    rows_PND: Tensor
    bias_PN: Tensor  # 0 for words, ln(512-n) for the pad row after them, -inf beyond


def project(model: WanModel, rows_PNE: Tensor, count_P: Tensor, padding: float = 1.0) -> Texts:
    """Prompts as blocks read them; as `model.project`, for several. Rows past a prompt's end must be zero.

    `padding` scales the pad row's logit, which a young model is spared.
    """
    rows_PND = model.text_embedding(F.pad(rows_PNE, (0, 0, 0, 1))).float()
    place_N = torch.arange(rows_PND.shape[1], device=rows_PND.device)
    beyond_PN = place_N - count_P[:, None]
    pad_P1 = padding * torch.log((model.config.text_len - count_P).float())[:, None]
    bias_PN = torch.where(beyond_PN == 0, pad_P1, 0.0).masked_fill(beyond_PN > 0, -math.inf)
    return Texts(rows_PND, bias_PN)


def velocity(model: WanModel, x_BCTYX: Tensor, t_B: Tensor, texts: Texts, read_KB: Tensor) -> Tensor:
    """Velocity of each sample, block k of sample b attending to prompt `read_KB[k, b]`."""
    time_BD, time_B6D = model._embed_time(t_B, x_BCTYX.device)
    x_BLD, rope_L1P = model._embed_video(x_BCTYX)
    for block, read_B in zip(model.blocks, read_KB, strict=True):
        assert isinstance(block, Block)
        rows_BND, bias_BN = texts.rows_PND[read_B], texts.bias_PN[read_B]
        x_BLD = _through(block, x_BLD, time_B6D, rope_L1P, rows_BND, bias_BN)
    return _unpatchify(model.head(x_BLD, time_BD), x_BCTYX.shape)


def _through(
    block: Block, x_BLD: Tensor, time_B6D: Tensor, rope_L1P: Tensor, rows_BND: Tensor, bias_BN: Tensor
) -> Tensor:
    """Block.forward but for the cross-attention."""
    shift1, scale1, gate1, shift2, scale2, gate2 = (block.modulation + time_B6D).chunk(6, dim=1)
    y_BLD = block.self_attn(modulate(x_BLD, shift1, scale1, block.eps), rope_L1P)
    x_BLD = add_gated(x_BLD, y_BLD, gate1)
    x_BLD = add(x_BLD, _attend(block, block.norm3(x_BLD), rows_BND, bias_BN))
    y_BLD = block.ffn(modulate(x_BLD, shift2, scale2, block.eps))
    return add_gated(x_BLD, y_BLD, gate2)


def _attend(block: Block, x_BLD: Tensor, rows_BND: Tensor, bias_BN: Tensor) -> Tensor:
    attn = block.cross_attn
    q_BHLK = attn.split_heads(attn.norm_q(attn.q(x_BLD)))
    k_BHNK, v_BHNK = attn.split_heads(attn.norm_k(attn.k(rows_BND))), attn.split_heads(attn.v(rows_BND))
    bias_B11N = bias_BN[:, None, None].to(q_BHLK.dtype)
    y_BHLK = F.scaled_dot_product_attention(q_BHLK, k_BHNK, v_BHNK, attn_mask=bias_B11N)
    y_BLD: Tensor = attn.o(join_heads(y_BHLK))
    return y_BLD
