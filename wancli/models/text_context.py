"""A prompt or a picture as the blocks of the transformer attend to it, and two ways to combine two of a kind.

The model always sees 512 rows: n encoder rows, projected, and 512-n copies of one padding row. Copies of a
key take softmax mass in proportion to their number, so one pad row whose logit is raised by ln(512-n) stands
for all of them, exactly. A picture has 257 rows of CLIP and no padding.

Letters: N rows of a context, D model width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
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
    kv: WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=WeakKeyDictionary)
    _in: dict[torch.dtype, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def in_dtype(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return rows and biases for attention in `dtype`.

        bf16 rounds ln(451) = 6.11 to 6.125: 1.6 % too many pad rows. So a bias is rounded down, and a second
        copy of the row makes up for the rest.
        """
        if dtype == torch.float32:
            return self.rows_ND, self.bias_N
        if dtype in self._in and not torch.is_grad_enabled():
            return self._in[dtype]
        coarse_N = (self.bias_N - self.bias_N.abs() / 256).to(dtype)
        rest_N = self.bias_N.exp() - coarse_N.float().exp()
        repeated = rest_N > 0
        rows_ND = torch.cat((self.rows_ND, self.rows_ND[repeated]))
        self._in[dtype] = rows_ND.to(dtype), torch.cat((coarse_N, rest_N[repeated].log().to(dtype)))
        return self._in[dtype]


def from_padded_rows(rows_ND: Tensor, length: int) -> Context:
    """Make the context of `length` rows from fewer rows; the last one stands for all rows after it."""
    count = len(rows_ND)
    bias_N = torch.zeros(count, device=rows_ND.device)
    bias_N[-1] = math.log(length - count + 1)
    return Context(rows_ND, bias_N)


def from_image_rows(rows_ND: Tensor) -> Context:
    """Make the context of a picture, whose rows all stand for themselves."""
    return Context(rows_ND, torch.zeros(len(rows_ND), device=rows_ND.device), of="image")


def lerp(a: Context, b: Context, weight: float) -> Context:
    """Return (1-w)*a + w*b on the 512 rows, or on those of two pictures; w > 1 extrapolates beyond b.

    The shorter prompt has its pad row wherever the longer one has words. Raises ValueError for a result of
    `concat`, whose rows have no counterparts, and for a prompt with a picture.
    """
    kind = _common_kind(a, b)
    if a.prompts != 1 or b.prompts != 1:
        raise ValueError("rows of joined contexts have no counterparts to interpolate with")
    longer = max(a, b, key=lambda context: len(context.rows_ND))
    count = len(longer.rows_ND)
    rows_ND = torch.lerp(_first_rows(a, count), _first_rows(b, count), weight)
    return Context(rows_ND, longer.bias_N, of=kind)


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
    )


def _common_kind(a: Context, b: Context) -> Literal["text", "image"]:
    if a.of != b.of:
        raise ValueError("a prompt and a picture have no rows in common")
    return a.of


def _first_rows(context: Context, count: int) -> Tensor:
    """Return the first `count` of the 512 rows of a context."""
    rows_ND = context.rows_ND
    return torch.cat((rows_ND, rows_ND[-1:].expand(count - len(rows_ND), -1)))
