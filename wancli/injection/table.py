"""Injection as data: rules become a table of what each block reads at each step and branch.

The table is pure data without tensors: its cells are those of `wancli.injection.exprs`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

from wancli.injection.area import Area
from wancli.injection.exprs import (
    AreaWeight,
    Blend,
    Branch,
    Cell,
    Concat,
    Expr,
    Image,
    Lerp,
    Nag,
    Parts,
    Row,
    Select,
    Text,
    Weight,
    build_inside,
    find_source,
    parts_of,
    scale_weight,
)


class CellRule(Protocol):
    """A rule that changes cells of a table: those of `blocks` at `steps` in `branches`. `order` decides which
    kind of rules applies first, and `kind` is the key of a job that has them.
    """

    kind: ClassVar[str]
    order: ClassVar[int]

    @property
    def blocks(self) -> tuple[tuple[int, float], ...]: ...
    @property
    def steps(self) -> tuple[tuple[int, float], ...]: ...
    @property
    def branches(self) -> tuple[Branch, ...]: ...
    @property
    def image(self) -> bool: ...
    @property
    def area(self) -> Area | None: ...
    def blend_parts(self, own: Parts, base: Text | Image, strength: float, /) -> Parts:
        """Return what the parts of a cell become, without regard to the area. `own` are those of the kind
        that the rule changes, the results of the rules before it, and `base` what blocks read without rules.
        """
        ...


@dataclass(frozen=True)
class Rule:
    """One injection, resolved against a model's depth and a schedule.

    `blocks` maps a block to its strength, and `steps` a step to its factor; the strength of a cell is
    their product. A strength of 0 leaves the cell as it is. `text` is the id of what is injected: a
    prompt or, if `image`, a picture, which changes only what blocks read of pictures. Outside of its `area`
    a rule changes nothing. A token on the edge gets a mix of both outputs, whatever the blend.

    `rows` narrow the rule to some rows of its prompt: all others stay what they are.
    """

    text: str
    blocks: tuple[tuple[int, float], ...]
    steps: tuple[tuple[int, float], ...]
    branches: tuple[Branch, ...]
    blend: Blend
    gain: float
    image: bool = False
    area: Area | None = None
    words: str | None = None  # to which the rule is narrowed,
    rows: tuple[int, ...] | None = None  # and their rows of the prompt
    nag: tuple[float, float, float] | None = None  # scale, alpha and tau, of the blend `nag` only
    kind: ClassVar[str] = "inject"
    order: ClassVar[int] = 1

    @property
    def is_active(self) -> bool:
        """Whether any strength is not 0."""
        return any(s * f for _, s in self.blocks for _, f in self.steps)

    def blend_parts(self, own: Parts, base: Text | Image, strength: float, /) -> Parts:
        injected: Expr = Image(self.text) if self.image else Text(self.text)
        if self.gain != 1:
            injected = Lerp(base, injected, self.gain)
        match self.blend:
            case "context-lerp":
                return tuple((self._lerp(expr, injected, strength), weight) for expr, weight in own)
            case "concat":
                return tuple((self._concat(expr, injected, strength), weight) for expr, weight in own)
            case "output-mix" if strength != 1:
                kept = tuple((expr, scale_weight(weight, 1 - strength)) for expr, weight in own)
                added = tuple(
                    (expr, scale_weight(weight, strength)) for expr, weight in self._replace(own, injected)
                )
                return (*kept, *added)
            case _:
                return self._replace(own, injected)

    def _lerp(self, expr: Expr, injected: Expr, strength: float) -> Expr:
        """Blend projected rows. Emphasis fades with the share of the rows that had it."""
        rows, kept = self.rows, max(0.0, 1 - strength)
        if rows is None:
            return build_inside(expr, lambda a: Lerp(a, injected, strength), lambda _: kept)
        return build_inside(
            expr,
            lambda a: Lerp(a, Select(a, injected, rows), strength),
            lambda row: kept if row in rows else 1.0,
        )

    def _concat(self, expr: Expr, injected: Expr, strength: float) -> Expr:
        return build_inside(expr, lambda a: Concat(a, injected, strength, self.rows))

    def _replace(self, own: Parts, injected: Expr) -> Parts:
        if self.rows is None:
            return ((injected, 1.0),)
        return tuple((self._select(expr, injected, self.rows), weight) for expr, weight in own)

    def _select(self, expr: Expr, injected: Expr, rows: tuple[int, ...]) -> Expr:
        return build_inside(expr, lambda a: Select(a, injected, rows), lambda row: float(row not in rows))


def apply_rule(rule: CellRule, cell: Cell, base: Text | Image, strength: float) -> Cell:
    """Return the cell after a rule. `cell` is the result of the rules before it, and `base` what blocks read
    without rules, of the kind that this one changes.
    """
    if isinstance(rule, Rule) and rule.nag is not None:
        guide = Nag(Text(rule.text), *rule.nag)
        return (*cell, (guide, strength if rule.area is None else AreaWeight(strength, (rule.area,))))
    own = parts_of(cell, image=rule.image)
    others = tuple(part for part in cell if part not in own)
    changed = rule.blend_parts(own, base, strength)
    if rule.area is not None:
        changed = (*_keep_outside(own, rule.area), *_keep_inside(changed, rule.area))
    return (*others, *changed) if rule.image else (*changed, *others)


class Table:
    """What block `b` attends to at step `s` in a branch: `table.row(s, branch)[b]`.

    Rules apply in the order of their kinds, those of a kind in the order given. `names` has the key of each
    in a job.

    Steps with equal rows share one row, so a table of many steps is small. `changed_cells` lists, for
    each rule, the (step, branch, block) cells that it changed. `steps_by_branch` lists the steps of each
    branch: an `unguided` step, at guidance 1, has no uncond forward. `image` is the id of the picture that
    all blocks read in both branches, if the blocks of the model attend to pictures. If the prompt changes
    over the frames, `over_time` is what blocks read in the cond branch without rules.

    Raises ValueError for a rule that injects a picture into a model whose blocks attend to none.
    """

    def __init__(
        self,
        rules: Sequence[CellRule],
        base: dict[Branch, str],
        depth: int,
        steps: int,
        unguided: Collection[int] = (),
        image: str | None = None,
        over_time: Cell = (),
    ) -> None:
        if image is None and any(rule.image for rule in rules):
            raise ValueError("a picture is injected, and the blocks of this model attend to none")
        self.steps = steps
        self.image = None if image is None else Image(image)
        self.steps_by_branch: dict[Branch, tuple[int, ...]] = {
            branch: tuple(s for s in range(steps) if branch == "cond" or s not in unguided) for branch in base
        }
        self.base: dict[Branch, Text] = {branch: Text(text) for branch, text in base.items()}
        self._over_time = over_time
        self.branches = tuple(base)
        self.changed_cells: tuple[list[tuple[int, Branch, int]], ...] = tuple([] for _ in rules)
        self.names = _name_rules(rules)
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

    def cells_without(
        self, reused: Collection[tuple[int, Branch]]
    ) -> tuple[list[tuple[int, Branch, int]], ...]:
        """Return `changed_cells` without those of forwards that run no block: pairs of step and branch."""
        if not reused:
            return self.changed_cells
        return tuple([cell for cell in cells if cell[:2] not in reused] for cells in self.changed_cells)

    def branches_at(self, step: int) -> tuple[Branch, ...]:
        return tuple(branch for branch in self.branches if step in self.steps_by_branch[branch])

    def row(self, step: int, branch: Branch) -> Row:
        return self._rows[step, branch]

    def base_cell(self, branch: Branch) -> Cell:
        """Return what every block reads in a branch without rules."""
        texts: Cell = ((self.base[branch], 1.0),)
        if self._over_time and branch == "cond":
            texts = self._over_time
        return texts if self.image is None else (*texts, (self.image, 1.0))

    def own_prompts(self, branch: Branch) -> tuple[Text, ...]:
        """Return the prompts that blocks read in a branch without rules."""
        sources = (find_source(expr) for expr, _ in parts_of(self.base_cell(branch), image=False))
        return tuple(dict.fromkeys(source for source in sources if isinstance(source, Text)))

    def distinct_rows(self, branch: Branch) -> dict[Row, list[int]]:
        """Group the steps of a branch by their row."""
        steps_by_row: dict[Row, list[int]] = {}
        for step in self.steps_by_branch[branch]:
            steps_by_row.setdefault(self.row(step, branch), []).append(step)
        return steps_by_row

    def _build_row(
        self, rules: Sequence[CellRule], active: Sequence[float], branch: Branch, depth: int
    ) -> Row:
        cells = [self.base_cell(branch)] * depth
        for rule, factor in sorted(zip(rules, active), key=lambda pair: pair[0].order):
            base = self.image if rule.image else self.base[branch]
            assert base is not None
            for block, strength in rule.blocks:
                if strength * factor:
                    cells[block] = apply_rule(rule, cells[block], base, strength * factor)
        return tuple(cells)


def _name_rules(rules: Sequence[CellRule]) -> tuple[str, ...]:
    """Name each rule by its kind and its number among these: `inject.0`."""
    counts: Counter[str] = Counter()
    names = []
    for rule in rules:
        names.append(f"{rule.kind}.{counts[rule.kind]}")
        counts[rule.kind] += 1
    return tuple(names)


def _keep_inside(parts: Parts, area: Area) -> Parts:
    """Return parts of a cell times the weight in an area. What acts before or after it is left out."""
    kept = []
    for expr, weight in parts:
        whole = weight if isinstance(weight, AreaWeight) else AreaWeight(weight)
        if not any(area.is_before_or_after(other) for other in whole.inside):
            outside = tuple(other for other in whole.outside if not area.is_before_or_after(other))
            kept.append((expr, AreaWeight(whole.factor, (*whole.inside, area), outside)))
    return tuple(kept)


def _keep_outside(parts: Parts, area: Area) -> Parts:
    """Return parts of a cell times the weight outside of an area."""
    kept: list[tuple[Expr, Weight]] = []
    for expr, weight in parts:
        whole = weight if isinstance(weight, AreaWeight) else AreaWeight(weight)
        if any(area.is_before_or_after(other) for other in whole.inside):
            kept.append((expr, weight))
        else:
            kept.append((expr, replace(whole, outside=(*whole.outside, area))))
    return tuple(kept)
