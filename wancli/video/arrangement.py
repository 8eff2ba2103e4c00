"""Arrange videos by the labels of a sweep: the last axis across, the one before it down, others in groups."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wancli.errors import JobError
from wancli.video.clip import Clip

Label = str | int | float | bool
Labels = Mapping[str, Label]
_BY_DEPTH = ("all", "first_half", "early", "middle", "second_half", "late")  # named blocks


@dataclass(frozen=True)
class Row:
    """Videos of one row, one for each column; None where a sweep has no video."""

    group: str  # `seed 11`: the values of the axes that are neither across nor down
    title: str  # `late`
    clips: tuple[Clip | None, ...]
    is_plain: bool = False  # its videos have no label down; their column says nothing about them

    @property
    def count(self) -> int:
        return sum(clip is not None for clip in self.clips)


@dataclass(frozen=True)
class Grid:
    """Videos in rows and columns. With one axis there is one column, without a title."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def clips(self) -> list[Clip]:
        return [clip for row in self.rows for clip in row.clips if clip]

    @property
    def cells(self) -> list[Clip | None]:
        """All cells, row by row."""
        return [clip for row in self.rows for clip in row.clips]

    @property
    def titles(self) -> list[str]:
        """For each cell of `cells` the values of all its axes, or the id of a plain video."""
        return [
            clip.id if clip and row.is_plain else ", ".join(filter(None, (row.group, row.title, column)))
            for row in self.rows
            for column, clip in zip(self.columns, row.clips, strict=True)
        ]

    @property
    def with_groups_across(self) -> Grid:
        """The same videos with their groups side by side, if these have the same rows."""
        by_group: dict[str, list[Row]] = {}
        for row in self.rows:
            by_group.setdefault(row.group, []).append(row)
        titles = [[row.title for row in rows] for rows in by_group.values()]
        if len(by_group) == 1 or any(other != titles[0] for other in titles):
            return self
        columns = tuple(f"{group}, {column}" for group in by_group for column in self.columns)
        rows = [
            Row("", parts[0].title, tuple(clip for row in parts for clip in row.clips), parts[0].is_plain)
            for parts in zip(*by_group.values(), strict=True)
        ]
        return Grid(columns, tuple(rows))


def find_axes(labels: Sequence[Labels]) -> list[str]:
    """Return the labels that tell videos apart, in their order; one that follows from earlier ones is left
    out, and so are all if a grid of them would be mostly empty."""
    names = list(dict.fromkeys(name for one in labels for name in one))
    axes: list[str] = []
    distinct = 1
    for name in names:
        count = len({_values(one, [*axes, name]) for one in labels})
        if count > distinct:
            axes.append(name)
            distinct = count
    columns = len({one[axes[-1]] for one in labels if axes[-1] in one}) if axes else 0
    rows = len({_values(one, axes[:-1]) for one in labels})
    return axes if columns * rows <= 2 * len(labels) else []


def require_axes(names: Sequence[str], labels: Sequence[Labels], where: str) -> None:
    """Raise JobError, at `where`, for an axis that is a label of no video, or is named twice."""
    known = list(dict.fromkeys(name for one in labels for name in one))
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            listed = f"labels: {', '.join(known[:8])}" if known else "These videos have no labels."
            hint = f"did you mean {near[0]!r}?" if near else listed
            raise JobError(f"no video has the label {name!r}", where=where, hint=hint)
    if len({*names}) < len(names):
        raise JobError("names an axis twice", where=where)


def arrange(clips: Sequence[Clip], labels: Mapping[str, Labels], axes: Sequence[str]) -> Grid:
    """Arrange clips by the axes; `labels` are those of each clip by its id.

    A video without any label across and down, as a plain one, begins its group. Videos with the same values
    stand in rows below each other.
    """
    *outer, last = axes
    down = outer[-1:]
    across = _sort_values([labels[clip.id].get(last) for clip in clips])
    if len(axes) == 1:
        placed = sorted(clips, key=lambda clip: across.index(labels[clip.id].get(last)))
        return Grid(
            ("",), tuple(Row("", _title(last, labels[clip.id].get(last)), (clip,)) for clip in placed)
        )
    orders = {axis: _sort_values([labels[clip.id].get(axis) for clip in clips]) for axis in outer}
    lone = {clip.id for clip in clips if last not in labels[clip.id] and down[0] not in labels[clip.id]}
    if all(last in labels[clip.id] for clip in clips if clip.id not in lone):
        across = [value for value in across if value is not None]
    by_row: dict[tuple[int, ...], list[list[Clip]]] = {}
    for clip in clips:
        own = labels[clip.id]
        key = tuple(orders[axis].index(own.get(axis)) for axis in outer)
        column = 0 if clip.id in lone else across.index(own.get(last))
        by_row.setdefault(key, [[] for _ in across])[column].append(clip)
    rows: list[Row] = []
    for key in sorted(by_row):
        values = [orders[axis][index] for axis, index in zip(outer, key)]
        group = ", ".join(_title(axis, value) for axis, value in zip(outer[:-1], values))
        for depth in range(max(map(len, by_row[key]))):
            cells = tuple(column[depth] if depth < len(column) else None for column in by_row[key])
            rows.append(
                Row(group, _title(outer[-1], values[-1]), cells, any(c.id in lone for c in cells if c))
            )
    return Grid(tuple(_title(last, value) for value in across), tuple(rows))


def split_grid(grid: Grid, most: int) -> list[Grid]:
    """Divide a grid into several of at most `most` videos: at groups if these fit, and between rows else."""
    parts: list[list[Row]] = []
    for index, row in enumerate(grid.rows):
        begins_group = index == 0 or row.group != grid.rows[index - 1].group
        needed = (
            sum(other.count for other in grid.rows if other.group == row.group) if begins_group else row.count
        )
        used = sum(other.count for other in parts[-1]) if parts else most
        if used + min(needed, most) > most or used + row.count > most:
            parts.append([])
        parts[-1].append(row)
    return [Grid(grid.columns, tuple(part)) for part in parts]


def _values(labels: Labels, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(repr(labels.get(name)) for name in names)


def _title(axis: str, value: Label | None) -> str:
    if value is None:
        return f"without {axis}"
    if isinstance(value, str):  # `late`, or a prompt
        return value
    return f"{axis} {value:g}" if isinstance(value, float) else f"{axis} {value}"


def _sort_values(values: Sequence[Label | None]) -> list[Label | None]:
    """Sort the distinct values: numbers by size, named blocks by depth, others as they come; None first."""
    distinct = list(dict.fromkeys(values))
    known = [value for value in distinct if value is not None]
    if all(isinstance(value, int | float) for value in known):
        known.sort(key=float)
    elif all(value in _BY_DEPTH for value in known):
        known.sort(key=lambda value: _BY_DEPTH.index(str(value)))
    return [*([None] if None in distinct else []), *known]
