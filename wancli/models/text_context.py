"""A prompt or a picture as the blocks of the transformer attend to it, and ways to combine two of a kind.

The model always sees 512 rows: n encoder rows, projected, and 512-n copies of one padding row. Copies of a
key take softmax mass in proportion to their number, so one pad row whose logit is raised by ln(512-n) stands
for all of them, exactly. A picture has 257 rows of CLIP and no padding.

Letters: N rows of a context, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Context:
    """Rows from which blocks make keys and values, each with a logit that is added to its scores.

    Blocks cache their keys and values in `kv` (weakly, by module), because a context is the same at every
    step. Call `kv.clear()` to free them, and whenever the weights of a block change.
    """

    rows_ND: Tensor  # fp32; real rows, then the pad row if there is padding
    bias_N: Tensor  # fp32; 0 for a row that stands for itself, ln(count) for one that stands for many
    prompts: int = 1  # how many prompts of 512 rows, or pictures, share the softmax
    of: Literal["text", "image"] = "text"  # blocks have keys and values of their own for pictures
    padding: tuple[int, ...] = ()  # the rows that stand for padding
    emphasis_N: Tensor | None = None  # fp32; added to the biases. Contexts that differ in it share `kv`
    kv: WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=WeakKeyDictionary)
    _in: dict[torch.dtype, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _emphasized: dict[torch.dtype, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def in_dtype(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return rows and biases for attention in `dtype`, without the emphasis.

        bf16 rounds ln(451) = 6.11 to 6.125: 1.6 % too many pad rows. So a bias is rounded down, and a second
        copy of the row makes up for the rest.
        """
        if dtype == torch.float32:
            return self.rows_ND, self.bias_N
        if dtype in self._in and not torch.is_grad_enabled():
            return self._in[dtype]
        coarse_N, rest_N = _split_bias(self.bias_N, dtype)
        repeated = rest_N.isfinite()
        rows_ND = torch.cat((self.rows_ND, self.rows_ND[repeated]))
        self._in[dtype] = rows_ND.to(dtype), torch.cat((coarse_N, rest_N[repeated]))
        return self._in[dtype]

    def biases(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
        """Return which of the rows `in_dtype` take part in attention, all if None, and the bias of each."""
        if self.emphasis_N is None:
            return None, self.in_dtype(dtype)[1]
        bias_N = self.bias_N + self.emphasis_N
        if dtype == torch.float32:
            return None, bias_N
        if dtype not in self._emphasized:
            coarse_N, rest_N = _split_bias(bias_N, dtype)
            repeated = rest_N.isfinite().nonzero()[:, 0]
            rows = torch.cat((torch.arange(len(bias_N), device=bias_N.device), repeated))
            self._emphasized[dtype] = rows, torch.cat((coarse_N, rest_N[repeated]))
        return self._emphasized[dtype]


def _split_bias(bias_N: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Split biases into two of a coarser dtype whose exponentials have the same sum. The second is -inf if
    the first is enough.
    """
    coarse_N = (bias_N - bias_N.abs() / 256).to(dtype)
    rest_N = (bias_N.exp() - coarse_N.float().exp()).clamp_min(0)
    return coarse_N, rest_N.log().to(dtype)


def from_padded_rows(rows_ND: Tensor, length: int, *, padded: bool = True) -> Context:
    """Make the context of `length` rows from fewer rows. If they are `padded`, the last one stands for all
    rows after it.
    """
    count = len(rows_ND)
    bias_N = torch.zeros(count, device=rows_ND.device)
    bias_N[-1] = math.log(length - count + 1)
    return Context(rows_ND, bias_N, padding=(count - 1,) if padded else ())


def from_image_rows(rows_ND: Tensor) -> Context:
    """Make the context of a picture, whose rows all stand for themselves."""
    return Context(rows_ND, torch.zeros(len(rows_ND), device=rows_ND.device), of="image")


def lerp(a: Context, b: Context, weight: float) -> Context:
    """Return (1-w)*a + w*b on the 512 rows, or on those of two pictures; w > 1 extrapolates beyond b.

    The shorter prompt has its pad row wherever the longer one has words. Raises ValueError for a result of
    `concat`, whose rows have no counterparts, and for a prompt with a picture.
    """
    kind = _common_kind(a, b)
    _refuse_joined(a, b)
    longer = max(a, b, key=lambda context: len(context.rows_ND))
    count = len(longer.rows_ND)
    both_pad = set(_first_padding(a, count)) & set(_first_padding(b, count))
    rows_ND = torch.lerp(_first_rows(a, count), _first_rows(b, count), weight)
    return Context(rows_ND, longer.bias_N, of=kind, padding=tuple(sorted(both_pad)))


def select(a: Context, b: Context, rows: Sequence[int]) -> Context:
    """Return the 512 rows of a, with these rows of b in their places.

    Raises ValueError for a result of `concat`, and for a prompt with a picture.
    """
    kind = _common_kind(a, b)
    _refuse_joined(a, b)
    count = max(len(a.rows_ND), min(max(rows) + 2, len(b.rows_ND)))
    rows_ND, chosen = _first_rows(a, count).clone(), list(rows)
    rows_ND[chosen] = b.rows_ND[chosen]
    bias_N = torch.zeros(count, device=rows_ND.device)
    bias_N[-1] = math.log(round(a.bias_N[-1].exp().item()) - (count - len(a.rows_ND)))
    padding = tuple(row for row in _first_padding(a, count) if row not in rows)
    return Context(rows_ND, bias_N, of=kind, padding=padding)


def pick(context: Context, rows: Sequence[int]) -> Context:
    """Return the context of these rows alone, none of which is padding."""
    return Context(context.rows_ND[list(rows)], context.bias_N[list(rows)], of=context.of)


def concat(a: Context, b: Context, weight: float) -> Context:
    """Return the rows of both in one softmax, those of b with ln(weight) added: `weight` copies of each.

    Raises ValueError unless the weight is positive, and for a prompt with a picture.
    """
    if not weight > 0:
        raise ValueError(f"the weight of joined rows must be positive, not {weight}")
    return Context(
        torch.cat((a.rows_ND, b.rows_ND)),
        torch.cat((a.bias_N, b.bias_N + math.log(weight))),
        a.prompts + b.prompts,
        _common_kind(a, b),
        (*a.padding, *(len(a.rows_ND) + row for row in b.padding)),
    )


def steer(context: Context, vector_D: Tensor, strength: float) -> Context:
    """Return the context with strength * vector added to all rows except padding."""
    _refuse_emphasized(context)
    rows_ND = context.rows_ND + strength * vector_D
    rows_ND[list(context.padding)] = context.rows_ND[list(context.padding)]
    return replace(context, rows_ND=rows_ND, kv=WeakKeyDictionary(), _in={}, _emphasized={})


def pool(context: Context) -> Tensor:
    """Return the mean of all rows except padding [D]."""
    tokens = [row for row in range(len(context.rows_ND)) if row not in context.padding]
    return context.rows_ND[tokens].mean(dim=0)


def emphasize(context: Context, biases: Sequence[tuple[int, float]]) -> Context:
    """Return the context with a bias added to the logit of some rows. Both share keys and values."""
    _refuse_emphasized(context)
    emphasis_N = torch.zeros(len(context.bias_N))
    for row, bias in biases:
        emphasis_N[row] += bias
    emphasis_N = emphasis_N.to(context.bias_N.device)
    return replace(context, emphasis_N=emphasis_N, _emphasized={})


def _common_kind(a: Context, b: Context) -> Literal["text", "image"]:
    if a.of != b.of:
        raise ValueError("a prompt and a picture have no rows in common")
    _refuse_emphasized(a, b)
    return a.of


def _refuse_joined(*contexts: Context) -> None:
    if any(context.prompts != 1 for context in contexts):
        raise ValueError("rows of joined contexts have no counterparts to interpolate with")


def _refuse_emphasized(*contexts: Context) -> None:
    if any(context.emphasis_N is not None for context in contexts):
        raise ValueError("emphasis comes after all else")


def _first_rows(context: Context, count: int) -> Tensor:
    """Return the first `count` of the 512 rows of a context."""
    rows_ND = context.rows_ND
    return torch.cat((rows_ND, rows_ND[-1:].expand(count - len(rows_ND), -1)))


def _first_padding(context: Context, count: int) -> tuple[int, ...]:
    """Return which of the first `count` rows are padding; rows after those of the context are."""
    return (*context.padding, *range(len(context.rows_ND), count))
