"""Rules that change the shot's own prompt: emphasis of words, and steering by other prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from wancli.injection.area import Area
from wancli.injection.exprs import Branch, Emphasis, Expr, Image, Parts, Steer, Text, build_inside


@dataclass(frozen=True)
class EmphasisRule:
    """Words of the shot's prompt that count `weight` times: ln(weight) is added to the logits of their rows.

    It applies before injections, to the prompt itself. Two rules for one row multiply. `blocks` and `steps`
    map to 1, as those of other rules do to strengths.
    """

    words: str
    rows: tuple[int, ...]
    weight: float
    blocks: tuple[tuple[int, float], ...]
    steps: tuple[tuple[int, float], ...]
    area: Area | None = None
    branches: tuple[Branch, ...] = ("cond",)
    kind: ClassVar[str] = "emphasis"
    order: ClassVar[int] = 0
    image: ClassVar[bool] = False

    def blend_parts(self, own: Parts, _: Text | Image, strength: float, /) -> Parts:
        return tuple(
            (self._emphasize(expr, strength * math.log(self.weight)), weight) for expr, weight in own
        )

    def _emphasize(self, expr: Expr, bias: float) -> Expr:
        inner, biases = (expr.expr, dict(expr.biases)) if isinstance(expr, Emphasis) else (expr, {})
        for row in self.rows:
            biases[row] = biases.get(row, 0.0) + bias
        return Emphasis(inner, tuple(sorted(biases.items())))


@dataclass(frozen=True)
class SteerRule:
    """A vector added to what blocks read of prompts: toward some prompts, away from others, by their ids.

    It applies after injections. `blocks` and `steps` map to strengths, as those of other rules.
    """

    toward: tuple[str, ...]
    away: tuple[str, ...]
    blocks: tuple[tuple[int, float], ...]
    steps: tuple[tuple[int, float], ...]
    area: Area | None = None
    branches: tuple[Branch, ...] = ("cond",)
    kind: ClassVar[str] = "steer"
    order: ClassVar[int] = 2
    image: ClassVar[bool] = False

    def blend_parts(self, own: Parts, _: Text | Image, strength: float, /) -> Parts:
        return tuple((self._steer(expr, strength), weight) for expr, weight in own)

    def _steer(self, expr: Expr, strength: float) -> Expr:
        return build_inside(expr, lambda inner: Steer(inner, self.toward, self.away, strength))
