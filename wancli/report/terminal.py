"""Building blocks of terminal texts: lines, tables, bars.

Texts are built for 80 columns; rich adds colour if the terminal wants it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from wancli.progress import make_printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

BAR_LEVELS = " ▁▂▃▄▅▆▇█"
# States of shots, as JSON documents have them, for people.
_STATE_TEXTS = {"in the way": "already exists", "elsewhere": "claimed by another worker"}


def state_text(state: str) -> str:
    """Return the text for people of a state that JSON documents have."""
    return _STATE_TEXTS.get(state, state)


def show(parts: Iterable[RenderableType], *, stderr: bool = False) -> None:
    """Print tables and lines. Lines that are longer than the terminal are not wrapped."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, emoji=False)
    for part in parts:
        printed = make_printable(part) if isinstance(part, str) else part
        console.print(printed, markup=False, soft_wrap=isinstance(part, str))


def create_table(*columns: str) -> Table:
    """Create a table without lines; `>` before a heading aligns its column to the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(
            column.removeprefix(">"), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    return table


def draw_ruler(depth: int) -> str:
    """Draw a ruler over the blocks: a digit for every ten."""
    return "".join(str(block // 10 % 10) if block % 10 == 0 else "." for block in range(depth))


def draw_bar(shares: Iterable[float]) -> str:
    """Draw one character per block, from · for 0 to a full block for 1."""
    return "".join("·" if share == 0 else BAR_LEVELS[max(1, round(share * 8))] for share in shares)


def truncate(text: str, limit: int) -> str:
    """Cut a text to `limit` printable characters."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
