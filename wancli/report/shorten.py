"""Names of shots in the room that a table has for them, so that two of them are still told apart."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from wancli.progress import make_printable

GAP = 2  # columns between two of a table
MIN_NAME = 16  # cells of the name of a shot; then other columns fold


def shorten_unique(ids: Sequence[str], limit: int) -> list[str]:
    """The ids in `limit` cells each: whole if all fit, else without what all begin or end with, else cut in
    the middle, or where that makes two of them alike at one end; at last with a number before their ends."""
    from rich.cells import cell_len

    shown = [make_printable(id).replace("\n", " ") for id in ids]
    if all(cell_len(id) <= limit for id in shown):
        return shown
    inner = _without_ends(shown)
    numbers = {id: str(number) for number, id in enumerate(dict.fromkeys(shown))}
    ways = [
        [_cut(id, limit, (limit - 1) // 2) for id in inner],
        [_cut(id, limit, 0) for id in inner],
        [_cut(id, limit, limit - 1) for id in inner],
        [f"{numbers[id]}{_cut(id, limit - len(numbers[id]), 0)}" for id in shown],
    ]
    return next((way for way in ways if len(set(way)) == len(set(ids))), ways[0])


def fitted(
    heads: Sequence[str], rows: Sequence[Sequence[str]], width: int
) -> tuple[str, Sequence[str], list[list[str]]]:
    """A table of shots by their names, for so many cells: what all rows say alike is a line of its own where
    the names have no room beside it, and names are `told_apart` where they have none then."""
    from rich.cells import cell_len

    line, names = "", [row[0] for row in rows]
    if max(cell_len(make_printable(name)) for name in names) > _room(heads, rows, width):
        line, heads, rows = _said_once(heads, rows)
    shown = shorten_unique(names, max(MIN_NAME, _room(heads, rows, width)))
    return line, heads, [[name, *row[1:]] for name, row in zip(shown, rows)]


def _said_once(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[str, list[str], list[list[str]]]:
    """What all rows say alike, but for the first and last column, in a line; and the table without it."""
    alike = [n for n in range(1, len(heads) - 1) if len({row[n] for row in rows}) == 1]
    line = ", ".join(f"{heads[n].removeprefix('>')} {rows[0][n]}" for n in alike)
    kept = [n for n in range(len(heads)) if n not in alike]
    said = textwrap.fill(f"all: {line}", 80, subsequent_indent="  ") if line else ""
    return said, [heads[n] for n in kept], [[row[n] for n in kept] for row in rows]


def _room(heads: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> int:
    """The cells that the other columns leave to the first one."""
    from rich.cells import cell_len

    columns = zip(*([head.removeprefix(">") for head in heads], *rows), strict=True)
    others = [max(map(cell_len, column)) for column in columns][1:]
    return width - sum(others) - GAP * len(others)


def _without_ends(ids: Sequence[str]) -> list[str]:
    """With … for the words that all begin with, and for those that all end with."""
    if len(set(ids)) == 1:
        return list(ids)
    begin = re.sub(r"[^-_. ]*$", "", _common(ids))
    rest = [id[len(begin) :] for id in ids]
    end = re.sub(r"[^-_. ]*$", "", _common([id[::-1] for id in rest]))[::-1]
    if min(map(len, rest)) <= len(end):
        end = ""
    before, after = ("…" if len(part) > 1 else part for part in (begin, end))
    return [f"{before}{id[: len(id) - len(end)]}{after}" for id in rest]


def _common(texts: Sequence[str]) -> str:
    """What all of them begin with."""
    first, last = min(texts), max(texts)
    return first[: next((n for n, (a, b) in enumerate(zip(first, last)) if a != b), len(first))]


def _cut(text: str, limit: int, head: int) -> str:
    """At most `limit` cells of a text: its first `head`, … and its end."""
    from rich.cells import cell_len

    if cell_len(text) <= limit:
        return text
    first = text
    while cell_len(first) > head:
        first = first[:-1]
    last = text[len(first) :]
    while cell_len(last) > limit - 1 - cell_len(first):
        last = last[1:]
    return f"{first}…{last}"
