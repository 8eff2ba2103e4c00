"""How much of what a block reads was injected, for display."""

from __future__ import annotations

from collections.abc import Sequence

from wancli.injection.area import Area
from wancli.injection.exprs import (
    AreaWeight,
    Cell,
    Emphasis,
    Expr,
    Image,
    Lerp,
    Nag,
    Row,
    Select,
    Steer,
    Text,
    parts_of,
)


def injected_share(expr: Expr, *own: Text | Image) -> float:
    """Return how much of a context comes from others than its branch's own prompts or picture, in [0, 1]; for
    display. Rows of some words count as the whole prompt.
    """
    match expr:
        case Text() | Image():
            return float(expr not in own)
        case Steer() | Emphasis():
            return injected_share(expr.expr, *own)
        case Select():
            return max(injected_share(expr.a, *own), injected_share(expr.b, *own))
    a, b = injected_share(expr.a, *own), injected_share(expr.b, *own)
    weight = expr.weight if isinstance(expr, Lerp) else expr.weight / (1 + expr.weight)
    return min(1.0, max(0.0, (1 - weight) * a + weight * b))


def injected_share_by_block(row: Row, *own: Text | Image) -> tuple[float, ...]:
    """Return for each block how much of what it reads was injected, in [0, 1]: of the prompts, or of the
    pictures if its `own` is one.
    """
    return tuple(min(1.0, _injected_share_of_cell(cell, own)) for cell in row)


def _injected_share_of_cell(cell: Cell, own: Sequence[Text | Image]) -> float:
    """Return the injected share where it is largest: a cell with areas has another one in each of them."""
    everywhere = 0.0
    by_areas: dict[tuple[tuple[Area, ...], ...], float] = {}
    is_image = isinstance(own[0], Image)
    shares = [(injected_share(expr, *own), weight) for expr, weight in parts_of(cell, image=is_image)]
    if not is_image:
        shares += [(guide.alpha, weight) for guide, weight in cell if isinstance(guide, Nag)]
    for share, weight in shares:
        if isinstance(weight, AreaWeight):
            if any(one.is_beside(other) for one in weight.inside for other in weight.inside):
                continue  # only tokens that both have pixels of
            areas = weight.inside, weight.outside
            by_areas[areas] = by_areas.get(areas, 0.0) + abs(weight.factor) * share
        else:
            everywhere += abs(weight) * share
    return everywhere + max(by_areas.values(), default=0.0)
