"""Shorten the names of shots to the width of a table, so that no two of them look the same."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Container, Sequence

from wancli.progress import make_printable

GAP = 2  # cells between two columns of a table
MIN_NAME = 16  # cells for the name of a shot or a picture; below that, other columns fold


def shorten_unique(ids: Sequence[str], limit: int) -> list[str]:
    """Shorten ids to `limit` cells each, and keep different ids different.

    The first of these that works: all ids whole; without the words that all begin or end with; then also cut
    in the middle; cut at the start; cut at the end; and with a number before the end of each.
    """
    from rich.cells import cell_len

    whole = [make_printable(id).replace("\n", " ") for id in ids]
    if all(cell_len(id) <= limit for id in whole):
        return whole
    inner = _strip_common_ends(whole)
    numbers = {id: str(number) for number, id in enumerate(dict.fromkeys(whole))}
    candidates = [
        [_elide(id, limit, (limit - 1) // 2) for id in inner],
        [_elide(id, limit, 0) for id in inner],
        [_elide(id, limit, limit - 1) for id in inner],
        [f"{numbers[id]}{_elide(id, limit - len(numbers[id]), 0)}" for id in whole],
    ]
    return next((names for names in candidates if len(set(names)) == len(set(ids))), candidates[0])


def fit_columns(
    heads: Sequence[str], rows: Sequence[Sequence[str]], width: int, name_heads: Container[str] = ("shot",)
) -> tuple[str, Sequence[str], list[list[str]]]:
    """Fit a table, whose columns `name_heads` have the names of shots or pictures, into `width` cells.

    If it does not fit, columns that are the same in every row become one line. If it still does not fit, the
    names are shortened. Returns that line or "", the headings and the rows.
    """
    line = ""
    if sum(_column_widths(heads, rows)) > width:
        line, heads, rows = _hoist_constant_columns(heads, rows)
    widths = _column_widths(heads, rows)
    named = sorted((n for n, head in enumerate(heads) if head in name_heads), key=lambda n: widths[n])
    room = width - sum(wide for n, wide in enumerate(widths) if n not in named)
    columns: list[Sequence[str]] = [*zip(*rows, strict=True)]
    for place, n in enumerate(named):  # the narrow ones leave more than their share to the others
        share = max(MIN_NAME, room // (len(named) - place) - (GAP if n else 0))
        columns[n] = shorten_unique(columns[n], share)
        room -= min(widths[n], share + GAP)
    return line, heads, [list(row) for row in zip(*columns)]


def _hoist_constant_columns(
    heads: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[str, list[str], list[list[str]]]:
    """Remove the columns that are the same in every row, except the first and the last.

    Returns them as one line, and the remaining headings and rows.
    """
    constant = [n for n in range(1, len(heads) - 1) if len({row[n] for row in rows}) == 1]
    values = ", ".join(f"{heads[n].removeprefix('>')} {rows[0][n]}" for n in constant)
    line = f"all: {values}" if values else ""
    line = textwrap.fill(line, 80, subsequent_indent="  ", break_on_hyphens=False)
    kept = [n for n in range(len(heads)) if n not in constant]
    return line, [heads[n] for n in kept], [[row[n] for n in kept] for row in rows]


def _column_widths(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """Return the cells of each column, and of the gap before each but the first."""
    from rich.cells import cell_len

    columns = zip(*([head.removeprefix(">") for head in heads], *rows), strict=True)
    widths = [max(cell_len(make_printable(text)) for text in column) for column in columns]
    return [wide + (GAP if n else 0) for n, wide in enumerate(widths)]


def _strip_common_ends(ids: Sequence[str]) -> list[str]:
    """Replace the words that all ids begin with, and those that all end with, by …"""
    if len(set(ids)) == 1:
        return list(ids)
    begin = re.sub(r"[^-_. ]*$", "", _common_prefix(ids))
    rest = [id[len(begin) :] for id in ids]
    end = re.sub(r"[^-_. ]*$", "", _common_prefix([id[::-1] for id in rest]))[::-1]
    if min(map(len, rest)) <= len(end):
        end = ""
    before, after = ("…" if len(part) > 1 else part for part in (begin, end))
    return [f"{before}{id[: len(id) - len(end)]}{after}" for id in rest]


def _common_prefix(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)
    return first[: next((n for n, (a, b) in enumerate(zip(first, last)) if a != b), len(first))]


def _elide(text: str, limit: int, head: int) -> str:
    """Cut a text to `limit` cells: its first `head`, … and its end."""
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
