"""The vision tower of CLIP ViT-H/14: a picture to the rows that the image branch of Wan 2.1 reads.

Letters: P pictures, C colours, Y X pixels, N rows of a picture (one of the whole, then its patches, row by
row), E width, H heads, K head width.

Wan reads the rows before the last block, so the last block, the norm after it and the projection to the space
of texts are not part of the network. Source: the official wan/modules/clip.py; parameter names are its names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wancli.models.config import CLIPConfig


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_PNE: Tensor) -> Tensor:
        qkv_PNE = self.to_qkv(x_PNE).chunk(3, dim=-1)
        q_PHNK, k_PHNK, v_PHNK = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in qkv_PNE)
        y_PHNK = F.scaled_dot_product_attention(q_PHNK, k_PHNK, v_PHNK)
        y_PNE: Tensor = self.proj(y_PHNK.transpose(1, 2).flatten(2))
        return y_PNE


class Block(nn.Module):
    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim)
        self.attn = Attention(config.dim, config.num_heads)
        self.norm2 = nn.LayerNorm(config.dim)
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, config.mlp_dim), nn.GELU(), nn.Linear(config.mlp_dim, config.dim)
        )

    def forward(self, x_PNE: Tensor) -> Tensor:
        x_PNE = x_PNE + self.attn(self.norm1(x_PNE))
        y_PNE: Tensor = x_PNE + self.mlp(self.norm2(x_PNE))
        return y_PNE


class CLIPVision(nn.Module):
    """Computes in the dtype of its weights: the official code in fp16."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.dim, config.patch, config.patch, bias=False)
        self.cls_embedding = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.pos_embedding = nn.Parameter(torch.zeros(1, config.rows, config.dim))
        self.pre_norm = nn.LayerNorm(config.dim)
        self.transformer = nn.ModuleList(Block(config) for _ in range(config.num_layers - 1))

    @torch.no_grad()
    def forward(self, pixels_PCYX: Tensor) -> Tensor:
        """Return the rows [P, N, E], fp32, of normalised pictures [P, 3, 224, 224]."""
        patches_PEYX = self.patch_embedding(pixels_PCYX.to(self.patch_embedding.weight.dtype))
        patches_PNE = patches_PEYX.flatten(2).transpose(1, 2)
        x_PNE = torch.cat((self.cls_embedding.expand(len(patches_PNE), -1, -1), patches_PNE), dim=1)
        x_PNE = self.pre_norm(x_PNE + self.pos_embedding)
        for block in self.transformer:
            x_PNE = block(x_PNE)
        rows_PNE: Tensor = x_PNE.float()
        return rows_PNE
