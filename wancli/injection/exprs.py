"""The cells of an injection table, and the contexts that they name.

A cell is a weighted sum of cross-attention outputs, `((expr, weight), ...)`. A weight is a number or, if a
rule acts in an area only, differs from token to token. An expr names a context: that of a prompt or a
picture, or one made from others (`Lerp`, `Concat`, `Select`, `Steer`, `Emphasis`). If the blocks of a model
attend to pictures, a cell has parts of both kinds. A `Nag` in a cell changes the sum of its prompts.
Everything here is pure data; `wancli.injection.contexts` turns exprs into contexts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from wancli.injection.area import Area

Branch = Literal["cond", "uncond"]
Blend = Literal["context-lerp", "output-mix", "replace", "concat", "nag"]


@dataclass(frozen=True)
class Text:
    """The context of one prompt, by the id of its embedding."""

    id: str


@dataclass(frozen=True)
class Image:
    """The context of a picture (in FLF2V of both), by the id of its CLIP rows."""

    id: str


@dataclass(frozen=True)
class Lerp:
    """(1-weight)·a + weight·b on the projected rows of two prompts or pictures; weight > 1 extrapolates."""

    a: Expr
    b: Expr
    weight: float


@dataclass(frozen=True)
class Concat:
    """The keys of both in one softmax, those of b with ln(weight) added to their logits; if `rows` are given,
    only these of b.
    """

    a: Expr
    b: Expr
    weight: float
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Select:
    """The projected rows of a, with these rows of b in their places."""

    a: Expr
    b: Expr
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Steer:
    """strength·vector added to the projected rows of an expr, except padding.

    The vector is the mean of the pooled contexts of the prompts `toward`, minus that of those `away`.
    """

    expr: Expr
    toward: tuple[str, ...]
    away: tuple[str, ...]
    strength: float


@dataclass(frozen=True)
class Emphasis:
    """A bias added to the logits of some rows, `((row, bias), ...)`. It is the outermost of the exprs that
    make a context, so that contexts which differ in it alone share keys and values.
    """

    expr: Expr
    biases: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Nag:
    """Normalised attention guidance of the prompts of a cell, away from another prompt; formula in
    `models.attention_guidance`. The weight of this part of a cell multiplies alpha.
    """

    negative: Text
    scale: float
    alpha: float
    tau: float


@dataclass(frozen=True)
class AreaWeight:
    """factor · Π w over the areas `inside` · Π (1-w) over those `outside`; w is the weight of a token in an
    area.
    """

    factor: float
    inside: tuple[Area, ...] = ()
    outside: tuple[Area, ...] = ()


Expr = Text | Image | Lerp | Concat | Select | Steer | Emphasis
Weight = float | AreaWeight
Cell = tuple[tuple[Expr | Nag, Weight], ...]
Row = tuple[Cell, ...]  # one cell per block
Parts = tuple[tuple[Expr, Weight], ...]


def build_inside(
    expr: Expr, build: Callable[[Expr], Expr], keep: Callable[[int], float] = lambda _: 1.0
) -> Expr:
    """Build an expr from another one whose emphasis stays outermost, each bias times what a row keeps."""
    if not isinstance(expr, Emphasis):
        return build(expr)
    biases = tuple((row, bias * keep(row)) for row, bias in expr.biases if keep(row))
    return Emphasis(build(expr.expr), biases) if biases else build(expr.expr)


def parts_of(cell: Cell, *, image: bool) -> Parts:
    """Return the parts of a cell that are prompts or, if `image`, those that are pictures."""
    return tuple(
        (expr, weight) for expr, weight in cell if not isinstance(expr, Nag) and is_image(expr) == image
    )


def scale_weight(weight: Weight, factor: float) -> Weight:
    return (
        replace(weight, factor=weight.factor * factor) if isinstance(weight, AreaWeight) else weight * factor
    )


def is_image(expr: Expr) -> bool:
    """Return whether a context is that of pictures and not of prompts."""
    return isinstance(find_source(expr), Image)


def find_source(expr: Expr) -> Text | Image:
    """Return the prompt or the picture that a context was first made from."""
    while not isinstance(expr, Text | Image):
        expr = expr.expr if isinstance(expr, Steer | Emphasis) else expr.a
    return expr
