"""Building blocks of terminal texts: lines, tables, bars.

Texts are built for 80 columns; rich adds colour if the terminal wants it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from wancli.progress import make_printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.style import StyleType
    from rich.table import Table

NARROW, WIDE = 60, 1000  # columns: below NARROW, cells would be folded letter by letter
BAR_LEVELS = " ▁▂▃▄▅▆▇█"
# States of shots, as JSON documents have them, for people.
_STATE_TEXTS = {
    "in the way": "already exists",
    "elsewhere": "claimed by another worker",
    "claimed": "rendering",
}


def state_text(state: str) -> str:
    """Return the text for people of a state that JSON documents have."""
    return _STATE_TEXTS.get(state, state)


def show(parts: Iterable[RenderableType], *, stderr: bool = False) -> None:
    """Print tables and lines. Lines that are longer than the terminal are not wrapped. A terminal that is too
    narrow for a table gets its rows as lists."""
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    console = Console(stderr=stderr, highlight=False, emoji=False)
    for part in parts:
        lines = [part] if isinstance(part, str) else []
        if isinstance(part, Table) and console.width < NARROW:
            wanted = Measurement.get(console, console.options.update_width(WIDE), part).maximum
            lines = [*_rows_as_lists(part)] if wanted > console.width else []
        for line in lines:
            console.print(make_printable(line), markup=False, soft_wrap=True)
        if not lines:
            console.print(part, markup=False)


def _rows_as_lists(table: Table) -> Iterator[str]:
    """Write each row as its first cell and a line for every other cell, with the heading of its column."""
    heads = [str(column.header) for column in table.columns]
    for first, *cells in zip(*(column.cells for column in table.columns)):
        yield f"{heads[0]} {first}".strip()
        yield from (f"  {head} {cell}".rstrip() for head, cell in zip(heads[1:], cells) if str(cell))


def create_table(*columns: str) -> Table:
    """Create a table without lines; `>` before a heading aligns its column to the right.

    Control characters in its cells are printed as `\\x1b`.
    """
    from rich.table import Table

    class PrintableTable(Table):
        def add_row(
            self,
            *cells: RenderableType | None,
            style: StyleType | None = None,
            end_section: bool = False,
        ) -> None:
            printable = (make_printable(cell) if isinstance(cell, str) else cell for cell in cells)
            super().add_row(*printable, style=style, end_section=end_section)

    table = PrintableTable(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
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


def wrap(text: str, indent: str) -> list[str]:
    """Break a text into lines of 80 cells, between words where possible; later lines are indented."""
    from rich.console import Console
    from rich.text import Text

    width = 80 - len(indent)
    first, *rest = Text(make_printable(text)).wrap(Console(width=width), width)
    return [first.plain.rstrip(), *(f"{indent}{line.plain.rstrip()}" for line in rest)]


def truncate(text: str, limit: int) -> str:
    """Cut a text to `limit` columns of one line, with characters that cannot be printed replaced."""
    from rich.cells import cell_len, set_cell_size

    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text.replace("\n", " "))
    return text if cell_len(text) <= limit else f"{set_cell_size(text, limit - 1)}…"
