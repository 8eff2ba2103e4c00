"""Layers of the Wan transformer. The maths is that of wan/modules/model.py of Wan 2.1.

Letters: B batch, L video tokens, N context rows, D model width, H heads, K head width, P = K/2 pairs.

Residual stream, norms and modulation are fp32; a Linear computes in the dtype of its weight. Without
autograd, layers overwrite temporaries: on a CPU, a fresh 48 MB tensor costs ten times the arithmetic done on
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wancli.models import config
from wancli.models.attention import attend
from wancli.models.attention_guidance import Guide, guide_attention
from wancli.models.text_context import Context
from wancli.models.token_weights import TokenWeights, Weight, dense, narrow

# Contexts whose attention outputs are mixed, and their weights. An empty mix adds nothing. A `Guide` changes
# the mixed output of the prompts, in the order of the mix.
Mix: TypeAlias = Sequence[tuple[Context | Guide, Weight]]
Part: TypeAlias = tuple[Context, Weight]


class Blocks(nn.ModuleList):
    """The blocks of a network, which run in order, from the first or from a given one."""

    def iterate_from(self, first: int) -> Iterator[nn.Module]:
        return islice(self, first, None)


class Linear(nn.Linear):
    """nn.Linear in the dtype of its weight, optionally followed by GELU(tanh).

    oneDNN multiplies fp32 a third faster than the MKL behind F.linear (200 to 145 GFLOP/s on two cores of an
    AMD EPYC), but has no gradient.
    """

    gelu = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the layer computes in and returns."""
        return self.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, gelu=self.gelu)


class LinearGELU(Linear):
    gelu = True


def mlp(dim_in: int, dim_hidden: int, dim_out: int) -> nn.Sequential:
    """Linear, GELU, Linear. The GELU has number 1 in the official names; here the first Linear computes
    it.
    """
    return nn.Sequential(LinearGELU(dim_in, dim_hidden), nn.Identity(), Linear(dim_hidden, dim_out))


def linear(x: Tensor, weight: Tensor, bias: Tensor, *, gelu: bool = False) -> Tensor:
    x = x.to(weight.dtype)
    if x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled():
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, weight, bias, "gelu" if gelu else "none", [], "tanh" if gelu else ""
        )
        return y
    y = F.linear(x, weight, bias)
    if gelu:
        torch.ops.aten.gelu_(y, approximate="tanh")
    return y


class RMSNorm(nn.Module):
    """x / rms(x) * weight in fp32, over the whole width, all heads together. May overwrite x in place."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD.float()
        norm_BL1 = torch.linalg.vector_norm(x_BLD, dim=-1, keepdim=True)
        rms_BL1 = (norm_BL1.square() / x_BLD.shape[-1] + self.eps).rsqrt()
        x_BLD = x_BLD * rms_BL1 if torch.is_grad_enabled() else x_BLD.mul_(rms_BL1)
        return x_BLD.mul_(self.weight)


class FeedForward(nn.Sequential):
    """Linear, GELU, Linear, on chunks of the tokens, so that the wide activations of all tokens never exist.
    May overwrite x in place.

    On a CPU the chunks fit the cache and memory that is already mapped, which gains 8 % at 7,800 tokens; a
    GPU needs larger chunks to be busy.
    """

    def __init__(self, dim: int, dim_hidden: int) -> None:
        super().__init__(*mlp(dim, dim_hidden, dim))

    def forward(self, x_BLD: Tensor) -> Tensor:
        widen, _, narrow = self
        if torch.is_grad_enabled():
            y_BLD: Tensor = narrow(widen(x_BLD))
            return y_BLD
        for piece_BLD in torch.split(x_BLD, count_at_once(x_BLD), dim=1):
            piece_BLD.copy_(narrow(widen(piece_BLD)))
        return x_BLD


class Attention(nn.Module):
    """The projections of one attention layer, under their official names."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(dim, dim)
        self.k = Linear(dim, dim)
        self.v = Linear(dim, dim)
        self.o = Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def split_heads(self, x_BLD: Tensor) -> Tensor:
        """View [B, L, D] as [B, H, L, K] in the dtype of the matmuls, without a copy."""
        x_BLHK = x_BLD.to(self.o.dtype).view(*x_BLD.shape[:2], self.num_heads, -1)
        return x_BLHK.transpose(1, 2)


class SelfAttention(Attention):
    def __init__(self, dim: int, num_heads: int, eps: float, backend: config.AttentionBackend) -> None:
        super().__init__(dim, num_heads, eps)
        self.backend: config.AttentionBackend = backend

    def forward(
        self, x_BLD: Tensor, rope_L1P: Tensor, keys_values: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Let tokens attend to each other, or to the given keys and values."""
        q_BHLK = self.split_heads(rotate(self.norm_q(self.q(x_BLD)), rope_L1P))
        k_BHNK, v_BHNK = keys_values or self.keys_values(x_BLD, rope_L1P)
        y_BLD: Tensor = self.o(join_heads(attend(q_BHLK, k_BHNK, v_BHNK, self.backend)))
        return y_BLD

    def keys_values(self, x_BLD: Tensor, rope_L1P: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values, [B, H, L, K] each."""
        return self.split_heads(rotate(self.norm_k(self.k(x_BLD)), rope_L1P)), self.split_heads(self.v(x_BLD))


class CrossAttention(Attention):
    """Attention to prompts and, if `reads_images`, to pictures, which have keys and values of their own."""

    def __init__(self, dim: int, num_heads: int, eps: float, reads_images: bool = False) -> None:
        super().__init__(dim, num_heads, eps)
        if reads_images:
            self.k_img = Linear(dim, dim)
            self.v_img = Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps)

    def forward(self, x_BLD: Tensor, mix: Mix) -> Tensor:
        """Return the sum of weight * attention over the contexts of the mix."""
        if not mix:
            return torch.zeros_like(x_BLD)
        q_BLD = self.norm_q(self.q(x_BLD))
        parts = [(context, weight) for context, weight in mix if isinstance(context, Context)]
        guides = [(guide, weight) for guide, weight in mix if isinstance(guide, Guide)]
        guided = [part for part in parts if part[0].of == "text"] if guides else parts
        y_BLD = self.sum_parts(q_BLD, guided)
        for guide, weight in guides:
            y_BLD = self.move_away(y_BLD, q_BLD, guide, weight)
        if len(guided) < len(parts):
            y_BLD = y_BLD + self.sum_parts(q_BLD, [part for part in parts if part[0].of == "image"])
        out_BLD: Tensor = self.o(y_BLD)
        # `o` is shared, but its bias belongs to every prompt: the sum holds it `total` times.
        total = sum(dense(weight) for context, weight in parts if context.of == "text")
        if isinstance(total, Tensor):
            return out_BLD + (total - 1.0)[:, None] * self.o.bias
        return out_BLD if total == 1.0 else out_BLD + (total - 1.0) * self.o.bias

    def sum_parts(self, q_BLD: Tensor, parts: Sequence[Part]) -> Tensor:
        """Return the sum of weight * attention, before the projection `o`."""
        q_BHLK = self.split_heads(q_BLD)
        whole = [
            (self.attend_context(q_BHLK, context), weight)
            for context, weight in parts
            if not isinstance(weight, TokenWeights)
        ]
        y_BLD = join_heads(sum_weighted(whole)) if whole else torch.zeros_like(q_BLD, dtype=q_BHLK.dtype)
        for context, weight in parts:
            if isinstance(weight, TokenWeights):
                y_BLD = self.add_part(y_BLD, q_BLD, context, weight)
        return y_BLD

    def move_away(self, y_BLD: Tensor, q_BLD: Tensor, guide: Guide, weight: Weight) -> Tensor:
        """Guide the tokens whose weight is not 0, some at a time. May overwrite y in place."""
        tokens_L: Tensor = torch.arange(y_BLD.shape[1], device=y_BLD.device)
        if isinstance(weight, TokenWeights):
            tokens_L, weight = weight.tokens, 1.0 if weight.nonzero is None else weight.nonzero
        guided = y_BLD.clone() if torch.is_grad_enabled() else y_BLD
        size = count_at_once(y_BLD)
        for start in range(0, len(tokens_L), size):
            tokens_N = tokens_L[start : start + size]
            q_BHNK = self.split_heads(q_BLD.index_select(1, tokens_N))
            away_BND = join_heads(self.attend_context(q_BHNK, guide.negative))
            own = weight[start : start + size] if isinstance(weight, Tensor) else weight
            moved_BND = guide_attention(y_BLD.index_select(1, tokens_N), away_BND, guide, own)
            guided = guided.index_copy_(1, tokens_N, moved_BND)
        return guided

    def add_part(self, y_BLD: Tensor, q_BLD: Tensor, context: Context, weights: TokenWeights) -> Tensor:
        """Add weight * attention of the tokens whose weight is not 0. May overwrite y in place."""
        tokens_N, weights_N = weights.tokens, weights.nonzero
        q_BHNK = self.split_heads(q_BLD.index_select(1, tokens_N))
        part_BND = join_heads(self.attend_context(q_BHNK, context))
        if weights_N is not None:
            part_BND = (part_BND * weights_N[:, None]).to(y_BLD.dtype)
        if torch.is_grad_enabled():
            return y_BLD.index_add(1, tokens_N, part_BND)
        return y_BLD.index_add_(1, tokens_N, part_BND)

    def attend_context(self, q_BHLK: Tensor, context: Context) -> Tensor:
        k_BHNK, v_BHNK = (x_1HNK.expand(len(q_BHLK), -1, -1, -1) for x_1HNK in self.keys_values(context))
        rows_N, bias_N = context.biases(q_BHLK.dtype)
        if rows_N is not None:
            k_BHNK, v_BHNK = (x_BHNK.index_select(2, rows_N) for x_BHNK in (k_BHNK, v_BHNK))
        return attend(q_BHLK, k_BHNK, v_BHNK, bias_N=bias_N)

    def keys_values(self, context: Context) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a context. They are computed once, except in training, where weights
        change.
        """
        if (cached := context.kv.get(self)) is not None and not torch.is_grad_enabled():
            return cached
        rows_1ND = context.in_dtype(self.k.dtype)[0][None]
        k, v, norm_k = self.k, self.v, self.norm_k
        if context.of == "image":
            k, v, norm_k = self.k_img, self.v_img, self.norm_k_img
        k_1HNK, v_1HNK = self.split_heads(norm_k(k(rows_1ND))), self.split_heads(v(rows_1ND))
        if not torch.is_grad_enabled():
            context.kv[self] = k_1HNK, v_1HNK
        return k_1HNK, v_1HNK


def count_at_once(x_BLD: Tensor) -> int:
    """Return how many tokens at a time fit the cache of a CPU, or keep a GPU busy."""
    return 1024 if x_BLD.device.type == "cpu" else 16384


def join_heads(y_BHLK: Tensor) -> Tensor:
    return y_BHLK.transpose(1, 2).flatten(2)


def narrow_mix(mix: Mix, start: int, stop: int) -> Mix:
    """Return the mix of consecutive tokens, without the parts that none of them reads."""
    narrowed = ((context, narrow(weight, start, stop)) for context, weight in mix)
    return tuple(
        (context, weight) for context, weight in narrowed if isinstance(weight, Tensor) or weight != 0.0
    )


def sum_weighted(parts: Sequence[tuple[Tensor, float | Tensor]]) -> Tensor:
    """Sum parts [B, H, L, K], each times its weight: a number, or one per token [L]."""
    (first_BHLK, weight), *others = parts
    if isinstance(weight, Tensor):
        total_BHLK = first_BHLK * weight[:, None]
    else:
        total_BHLK = first_BHLK if weight == 1.0 else first_BHLK * weight
    for part_BHLK, weight in others:
        if isinstance(weight, Tensor):
            total_BHLK = total_BHLK + part_BHLK * weight[:, None]
        else:
            total_BHLK = total_BHLK.add(part_BHLK, alpha=weight)
    return total_BHLK


def modulate(x_BLD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor, eps: float) -> Tensor:
    """LayerNorm(x)*(1+scale)+shift; in one pass if the whole batch shares its modulation."""
    if len(shift_B1D) == 1:
        return F.layer_norm(x_BLD, x_BLD.shape[-1:], 1 + scale_B1D[0, 0], shift_B1D[0, 0], eps)
    return torch.addcmul(shift_B1D, F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=eps), 1 + scale_B1D)


def add(x_BLD: Tensor, y_BLD: Tensor) -> Tensor:
    """x + y in fp32. May overwrite x in place."""
    return x_BLD + y_BLD if torch.is_grad_enabled() else x_BLD.add_(y_BLD)


def add_gated(x_BLD: Tensor, y_BLD: Tensor, gate_B1D: Tensor) -> Tensor:
    """x + y*gate in fp32. May overwrite x in place."""
    if torch.is_grad_enabled():
        return torch.addcmul(x_BLD, y_BLD.float(), gate_B1D)
    return x_BLD.addcmul_(y_BLD.float(), gate_B1D)


def rope_table(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> Tensor:
    """exp(i * position * frequency) for the tokens of a (t, y, x) grid, complex64 [L, 1, P].

    The head width is split into t: K - 4*(K//6), y and x: 2*(K//6); frequency j of an axis of width A is
    10000^(-2j/A). Angles are fp64.
    """
    spatial_width = 2 * (head_dim // 6)
    axes = []
    for axis, (length, width) in enumerate(
        zip(grid, (head_dim - 2 * spatial_width, spatial_width, spatial_width), strict=True)
    ):
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
        positions = torch.arange(length, dtype=torch.float64, device=device)
        angles = torch.outer(positions, 10000.0**-exponents)
        shape = [1, 1, 1]
        shape[axis] = length
        axes.append(torch.polar(torch.ones_like(angles), angles).view(*shape, -1).expand(*grid, -1))
    return torch.cat(axes, dim=-1).flatten(0, 2)[:, None].to(torch.complex64)


def rotate(x_BLD: Tensor, rope_L1P: Tensor) -> Tensor:
    """Rotate each pair (x[2j], x[2j+1]) of every head by the angle of its token. May overwrite x in place.

    One complex product over a view is ten times faster on a CPU than real arithmetic, which must gather and
    scatter the even and odd elements.
    """
    x_BLHP = torch.view_as_complex(x_BLD.view(*x_BLD.shape[:2], -1, rope_L1P.shape[-1], 2))
    return torch.view_as_real(x_BLHP.mul_(rope_L1P)).flatten(2)


def timestep_vector(t: Tensor, width: int) -> Tensor:
    """[cos(t*f_j), sin(t*f_j)] with f_j = 10000^(-j/half), fp64 inside: [B] -> [B, width] fp32."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float64, device=t.device) / half
    angles = torch.outer(t.double(), 10000.0**-exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()
