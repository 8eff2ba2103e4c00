"""Injection as data: rules become a table of what each block reads at each step and branch.

A cell of the table is a weighted sum of cross-attention outputs, `((expr, weight), ...)`; an
expr names a context: a prompt's own, or one made from two (`Lerp`, `Concat`). The table is
pure and knows no tensors; `wancli.sampling.denoise` turns exprs into contexts. Nothing here is specific
to a depth of 40: named ranges are thirds, halves and strides of the model's own depth.

Every parser raises ValueError with what was wrong; `wancli.plan.planner` knows in which file.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

Branch = Literal["cond", "uncond"]
Blend = Literal["context-lerp", "output-mix", "replace", "concat"]


@dataclass(frozen=True)
class Text:
    """The context of one prompt, by the id of its embedding."""

    id: str


@dataclass(frozen=True)
class Lerp:
    """(1-weight)·a + weight·b on the projected 512-row contexts; weight > 1 extrapolates."""

    a: Expr
    b: Expr
    weight: float


@dataclass(frozen=True)
class Concat:
    """The keys of both in one softmax, those of b with ln(weight) added to their logits."""

    a: Expr
    b: Expr
    weight: float


Expr = Text | Lerp | Concat
Cell = tuple[tuple[Expr, float], ...]
Row = tuple[Cell, ...]  # one cell per block


@dataclass(frozen=True)
class Rule:
    """One injection, resolved against a model's depth and a schedule.

    `blocks` maps block to strength and `steps` maps step to a factor on it; what a cell gets is
    their product. A product of 0 leaves the cell alone.
    """

    text: str
    blocks: tuple[tuple[int, float], ...]
    steps: tuple[tuple[int, float], ...]
    branches: tuple[Branch, ...]
    blend: Blend
    gain: float

    @property
    def is_active(self) -> bool:
        """Whether any strength is not 0."""
        return any(s * f for _, s in self.blocks for _, f in self.steps)

    def apply(self, cell: Cell, base: Text, strength: float) -> Cell:
        """The cell after this rule, given what the rules before it made of it."""
        injected: Expr = Text(self.text)
        if self.gain != 1:
            injected = Lerp(base, injected, self.gain)
        match self.blend:
            case "context-lerp":
                return tuple((Lerp(expr, injected, strength), weight) for expr, weight in cell)
            case "concat":
                return tuple((Concat(expr, injected, strength), weight) for expr, weight in cell)
            case "output-mix" if strength != 1:
                return (*((expr, weight * (1 - strength)) for expr, weight in cell), (injected, strength))
        return ((injected, 1.0),)


class Table:
    """What block `b` attends to at step `s` in a branch: `table.row(s, branch)[b]`.

    Rows that are the same at several steps are one object, so a table is small however many
    steps there are. `changed_cells` lists, per rule, the (step, branch, block) cells it changed;
    `steps_by_branch` the steps of each branch: `unguided` ones, at guidance 1, have no uncond forward.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        base: dict[Branch, str],
        depth: int,
        steps: int,
        unguided: Collection[int] = (),
    ) -> None:
        self.steps = steps
        self.steps_by_branch: dict[Branch, tuple[int, ...]] = {
            branch: tuple(s for s in range(steps) if branch == "cond" or s not in unguided) for branch in base
        }
        self.base: dict[Branch, Text] = {branch: Text(text) for branch, text in base.items()}
        self.branches = tuple(base)
        self.changed_cells: tuple[list[tuple[int, Branch, int]], ...] = tuple([] for _ in rules)
        self._rows: dict[tuple[int, Branch], Row] = {}
        made: dict[tuple[Branch, tuple[float, ...]], Row] = {}
        factors = [dict(rule.steps) for rule in rules]
        for branch, text in self.base.items():
            for step in self.steps_by_branch[branch]:
                active = tuple(
                    f.get(step, 0.0) if branch in r.branches else 0.0 for r, f in zip(rules, factors)
                )
                if (branch, active) not in made:
                    made[branch, active] = _build_row(rules, active, text, depth)
                self._rows[step, branch] = made[branch, active]
                for reached, rule, factor in zip(self.changed_cells, rules, active):
                    reached.extend((step, branch, block) for block, s in rule.blocks if s * factor)

    def branches_at(self, step: int) -> tuple[Branch, ...]:
        return tuple(branch for branch in self.branches if step in self.steps_by_branch[branch])

    def row(self, step: int, branch: Branch) -> Row:
        return self._rows[step, branch]

    def distinct_rows(self, branch: Branch) -> dict[Row, list[int]]:
        """The different rows of a branch, each with the steps that have it."""
        steps_by_row: dict[Row, list[int]] = {}
        for step in self.steps_by_branch[branch]:
            steps_by_row.setdefault(self.row(step, branch), []).append(step)
        return steps_by_row


def _build_row(rules: Sequence[Rule], active: Sequence[float], base: Text, depth: int) -> Row:
    cells: list[Cell] = [((base, 1.0),)] * depth
    for rule, factor in zip(rules, active):
        for block, strength in rule.blocks:
            if strength * factor:
                cells[block] = rule.apply(cells[block], base, strength * factor)
    return tuple(cells)


NAMED_BLOCKS = ("all", "early", "middle", "late", "first_half", "second_half", "alternating", "sparse")


def parse_blocks(spec: str | int | Sequence[str | int], depth: int) -> tuple[int, ...]:
    """`27-39`, `0-39:4`, `7`, `early`, or a list of these; each block once, in the order written."""
    if not isinstance(spec, str | int):
        parts = [block for part in spec for block in parse_blocks(part, depth)]
        return tuple(dict.fromkeys(parts))
    if isinstance(spec, str) and spec in NAMED_BLOCKS:
        return _named_blocks(spec, depth)
    match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4})(?::(\d{1,4}))?)?", str(spec))
    if not match:
        raise ValueError(
            f"{spec!r} is no block set; write 27-39, 0-39:4, 7, or one of {', '.join(NAMED_BLOCKS)}"
        )
    first = int(match[1])
    last = int(match[2] or first)
    stride = int(match[3] or 1)
    if first > last or stride == 0:
        raise ValueError(f"{spec!r} is empty")
    if last >= depth:
        raise ValueError(f"{last} is past the last block ({depth - 1})")
    return tuple(range(first, last + 1, stride))


def _named_blocks(name: str, depth: int) -> tuple[int, ...]:
    third, two_thirds, half = -(-depth // 3), -(-2 * depth // 3), depth // 2
    ranges = {
        "all": range(depth),
        "early": range(third),
        "middle": range(third, two_thirds),
        "late": range(two_thirds, depth),
        "first_half": range(half),
        "second_half": range(half, depth),
        "alternating": range(0, depth, 2),
        "sparse": range(0, depth, 4),
    }
    return tuple(ranges[name])


def parse_steps(spec: str | int | tuple[float, float], sigmas: Sequence[float]) -> tuple[int, ...]:
    """`2-4` and `3` (0-based, inclusive), `0-40%` (i/N in [0, 0.4)), `all`, or a (low, high) range of σ."""
    count = len(sigmas) - 1
    if isinstance(spec, tuple):
        low, high = spec
        slack = 1e-6  # sigmas are fp32
        return tuple(i for i in range(count) if low - slack <= sigmas[i] <= high + slack)
    if spec == "all":
        return tuple(range(count))
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*-\s*(\d+(?:\.\d+)?)\s*%", str(spec)):
        low, high = float(match[1]) / 100, float(match[2]) / 100
        if low >= high or high > 1:
            raise ValueError(f"{spec!r} is no part of the way; write 0-40% or 60-100%")
        return tuple(i for i in range(count) if low <= i / count < high)
    match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", str(spec))
    if not match:
        raise ValueError(f"{spec!r} is no step range; write 2-4, 0-40%, all, or {{sigma: [0.5, 1.0]}}")
    first = int(match[1])
    last = int(match[2] or first)
    if first > last:
        raise ValueError(f"{spec!r} is empty")
    if last >= count:
        raise ValueError(f"{last} is past the last step ({count - 1})")
    return tuple(range(first, last + 1))


@dataclass(frozen=True)
class Curve:
    """start + (end-start)·f(u), u running from 0 to 1 over the chosen blocks (or steps).

    linear f = u; gaussian f = exp(-(u-center)²/2width²); sine f = ½ + ½·sin(2π·periods·u);
    step f alternates 1, 0 every `every` places; random f is uniform in [0, 1), from `seed`.
    """

    shape: Literal["linear", "gaussian", "sine", "step", "random"]
    start: float = 0.0
    end: float = 1.0
    center: float = 0.5
    width: float = 0.2
    periods: float = 1.0
    every: int = 1
    seed: int = 0

    def values(self, count: int) -> tuple[float, ...]:
        rng = random.Random(self.seed)
        return tuple(self.start + (self.end - self.start) * self._f(k, count, rng) for k in range(count))

    def _f(self, k: int, count: int, rng: random.Random) -> float:
        u = k / (count - 1) if count > 1 else 0.0
        match self.shape:
            case "linear":
                return u
            case "gaussian":
                return math.exp(-((u - self.center) ** 2) / (2 * self.width**2))
            case "sine":
                return 0.5 + 0.5 * math.sin(2 * math.pi * self.periods * u)
            case "step":
                return float(k // self.every % 2 == 0)
            case "random":
                return rng.random()


def pair_strengths(
    spec: float | Sequence[float] | Curve, positions: Sequence[int]
) -> tuple[tuple[int, float], ...]:
    """One strength per chosen place: a number for all, a list in their order, or a curve over them."""
    if isinstance(spec, Curve):
        values = spec.values(len(positions))
    elif isinstance(spec, int | float):
        values = (float(spec),) * len(positions)
    else:
        values = tuple(spec)
        if len(values) != len(positions):
            raise ValueError(f"{len(values)} strengths for {len(positions)} places")
    return tuple(zip(positions, values))


def injected_share(expr: Expr, base: Text) -> float:
    """How much of a context comes from elsewhere than its branch's own prompt, in [0, 1]; for display."""
    if isinstance(expr, Text):
        return float(expr != base)
    a, b = injected_share(expr.a, base), injected_share(expr.b, base)
    weight = expr.weight if isinstance(expr, Lerp) else expr.weight / (1 + expr.weight)
    return min(1.0, max(0.0, (1 - weight) * a + weight * b))


def injected_share_by_block(row: Row, base: Text) -> tuple[float, ...]:
    """Per block, how much of what it reads was injected, in [0, 1]."""
    return tuple(min(1.0, sum(abs(w) * injected_share(expr, base) for expr, w in cell)) for cell in row)
