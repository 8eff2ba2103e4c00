"""Injection as data: rules become a table of what each block reads at each step and branch.

A cell of the table is a weighted sum of cross-attention outputs, `((expr, weight), ...)`. A weight is a
number or, if a rule acts in an area only, differs from token to token. An expr names a context: that of a
prompt or a picture, or one made from two of a kind (`Lerp`, `Concat`). If the blocks of a model attend to
pictures, a cell has parts of both kinds. The table is pure data without tensors; `wancli.injection.contexts`
turns exprs into contexts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from wancli.injection.area import Area

Branch = Literal["cond", "uncond"]
Blend = Literal["context-lerp", "output-mix", "replace", "concat"]


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
    """The keys of both in one softmax, those of b with ln(weight) added to their logits."""

    a: Expr
    b: Expr
    weight: float


@dataclass(frozen=True)
class AreaWeight:
    """factor · Π w over the areas `inside` · Π (1-w) over those `outside`; w is the weight of a token in an
    area.
    """

    factor: float
    inside: tuple[Area, ...] = ()
    outside: tuple[Area, ...] = ()


Expr = Text | Image | Lerp | Concat
Weight = float | AreaWeight
Cell = tuple[tuple[Expr, Weight], ...]
Row = tuple[Cell, ...]  # one cell per block


@dataclass(frozen=True)
class Rule:
    """One injection, resolved against a model's depth and a schedule.

    `blocks` maps a block to its strength, and `steps` a step to its factor; the strength of a cell is
    their product. A strength of 0 leaves the cell as it is. `text` is the id of what is injected: a
    prompt or, if `image`, a picture, which changes only what blocks read of pictures. Outside of its `area`
    a rule changes nothing. A token on the edge gets a mix of both outputs, whatever the blend.
    """

    text: str
    blocks: tuple[tuple[int, float], ...]
    steps: tuple[tuple[int, float], ...]
    branches: tuple[Branch, ...]
    blend: Blend
    gain: float
    image: bool = False
    area: Area | None = None

    @property
    def is_active(self) -> bool:
        """Whether any strength is not 0."""
        return any(s * f for _, s in self.blocks for _, f in self.steps)

    def apply(self, cell: Cell, base: Text | Image, strength: float) -> Cell:
        """Return the cell after this rule. `cell` is the result of the rules before it, and `base` what
        blocks read without rules, of the kind that this one injects.
        """
        own = tuple(part for part in cell if is_image(part[0]) == self.image)
        others = tuple(part for part in cell if is_image(part[0]) != self.image)
        changed = self._blend(own, base, strength)
        if self.area is not None:
            changed = (*_keep_outside(own, self.area), *_keep_inside(changed, self.area))
        return (*others, *changed) if self.image else (*changed, *others)

    def _blend(self, own: Cell, base: Text | Image, strength: float) -> Cell:
        injected: Expr = Image(self.text) if self.image else Text(self.text)
        if self.gain != 1:
            injected = Lerp(base, injected, self.gain)
        match self.blend:
            case "context-lerp":
                return tuple((Lerp(expr, injected, strength), weight) for expr, weight in own)
            case "concat":
                return tuple((Concat(expr, injected, strength), weight) for expr, weight in own)
            case "output-mix" if strength != 1:
                kept = tuple((expr, _scale(weight, 1 - strength)) for expr, weight in own)
                return (*kept, (injected, strength))
            case _:
                return ((injected, 1.0),)


class Table:
    """What block `b` attends to at step `s` in a branch: `table.row(s, branch)[b]`.

    Steps with equal rows share one row, so a table of many steps is small. `changed_cells` lists, for
    each rule, the (step, branch, block) cells that it changed. `steps_by_branch` lists the steps of each
    branch: an `unguided` step, at guidance 1, has no uncond forward. `image` is the id of the picture that
    all blocks read in both branches, if the blocks of the model attend to pictures.

    Raises ValueError for a rule that injects a picture into a model whose blocks attend to none.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        base: dict[Branch, str],
        depth: int,
        steps: int,
        unguided: Collection[int] = (),
        image: str | None = None,
    ) -> None:
        if image is None and any(rule.image for rule in rules):
            raise ValueError("a picture is injected, and the blocks of this model attend to none")
        self.steps = steps
        self.image = None if image is None else Image(image)
        self.steps_by_branch: dict[Branch, tuple[int, ...]] = {
            branch: tuple(s for s in range(steps) if branch == "cond" or s not in unguided) for branch in base
        }
        self.base: dict[Branch, Text] = {branch: Text(text) for branch, text in base.items()}
        self.branches = tuple(base)
        self.changed_cells: tuple[list[tuple[int, Branch, int]], ...] = tuple([] for _ in rules)
        self._rows: dict[tuple[int, Branch], Row] = {}
        made: dict[tuple[Branch, tuple[float, ...]], Row] = {}
        factors = [dict(rule.steps) for rule in rules]
        for branch in base:
            for step in self.steps_by_branch[branch]:
                active = tuple(
                    f.get(step, 0.0) if branch in r.branches else 0.0 for r, f in zip(rules, factors)
                )
                if (branch, active) not in made:
                    made[branch, active] = self._build_row(rules, active, branch, depth)
                self._rows[step, branch] = made[branch, active]
                for reached, rule, factor in zip(self.changed_cells, rules, active):
                    reached.extend((step, branch, block) for block, s in rule.blocks if s * factor)

    def branches_at(self, step: int) -> tuple[Branch, ...]:
        return tuple(branch for branch in self.branches if step in self.steps_by_branch[branch])

    def row(self, step: int, branch: Branch) -> Row:
        return self._rows[step, branch]

    def base_cell(self, branch: Branch) -> Cell:
        """Return what every block reads in a branch without rules."""
        text: Cell = ((self.base[branch], 1.0),)
        return text if self.image is None else (*text, (self.image, 1.0))

    def distinct_rows(self, branch: Branch) -> dict[Row, list[int]]:
        """Group the steps of a branch by their row."""
        steps_by_row: dict[Row, list[int]] = {}
        for step in self.steps_by_branch[branch]:
            steps_by_row.setdefault(self.row(step, branch), []).append(step)
        return steps_by_row

    def _build_row(self, rules: Sequence[Rule], active: Sequence[float], branch: Branch, depth: int) -> Row:
        cells = [self.base_cell(branch)] * depth
        for rule, factor in zip(rules, active):
            base = self.image if rule.image else self.base[branch]
            assert base is not None
            for block, strength in rule.blocks:
                if strength * factor:
                    cells[block] = rule.apply(cells[block], base, strength * factor)
        return tuple(cells)


def _scale(weight: Weight, factor: float) -> Weight:
    return (
        replace(weight, factor=weight.factor * factor) if isinstance(weight, AreaWeight) else weight * factor
    )


def _keep_inside(cell: Cell, area: Area) -> Cell:
    """Return the parts of a cell times the weight in an area. What acts before or after it is left out."""
    kept = []
    for expr, weight in cell:
        whole = weight if isinstance(weight, AreaWeight) else AreaWeight(weight)
        if not any(area.is_before_or_after(other) for other in whole.inside):
            outside = tuple(other for other in whole.outside if not area.is_before_or_after(other))
            kept.append((expr, AreaWeight(whole.factor, (*whole.inside, area), outside)))
    return tuple(kept)


def _keep_outside(cell: Cell, area: Area) -> Cell:
    """Return the parts of a cell times the weight outside of an area."""
    kept: list[tuple[Expr, Weight]] = []
    for expr, weight in cell:
        whole = weight if isinstance(weight, AreaWeight) else AreaWeight(weight)
        if any(area.is_before_or_after(other) for other in whole.inside):
            kept.append((expr, weight))
        else:
            kept.append((expr, replace(whole, outside=(*whole.outside, area))))
    return tuple(kept)


def is_image(expr: Expr) -> bool:
    """Return whether a context is that of pictures and not of prompts."""
    while isinstance(expr, Lerp | Concat):
        expr = expr.a
    return isinstance(expr, Image)


def injected_share(expr: Expr, base: Text | Image) -> float:
    """Return how much of a context comes from others than its branch's own prompt or picture, in [0, 1]; for
    display.
    """
    if isinstance(expr, Text | Image):
        return float(expr != base)
    a, b = injected_share(expr.a, base), injected_share(expr.b, base)
    weight = expr.weight if isinstance(expr, Lerp) else expr.weight / (1 + expr.weight)
    return min(1.0, max(0.0, (1 - weight) * a + weight * b))


def injected_share_by_block(row: Row, base: Text | Image) -> tuple[float, ...]:
    """Return for each block how much of what it reads was injected, in [0, 1]: of the prompts, or of the
    pictures if `base` is one.
    """
    return tuple(min(1.0, _injected_share_of_cell(cell, base)) for cell in row)


def _injected_share_of_cell(cell: Cell, base: Text | Image) -> float:
    """Return the injected share where it is largest: a cell with areas has another one in each of them."""
    everywhere = 0.0
    by_areas: dict[tuple[tuple[Area, ...], ...], float] = {}
    for expr, weight in cell:
        if is_image(expr) != isinstance(base, Image):
            continue
        if isinstance(weight, AreaWeight):
            if any(one.is_beside(other) for one in weight.inside for other in weight.inside):
                continue  # only tokens that both have pixels of
            areas = weight.inside, weight.outside
            share = abs(weight.factor) * injected_share(expr, base)
            by_areas[areas] = by_areas.get(areas, 0.0) + share
        else:
            everywhere += abs(weight) * injected_share(expr, base)
    return everywhere + max(by_areas.values(), default=0.0)
