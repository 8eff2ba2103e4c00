"""Prompts as the terminal shows them: encoded, in the cache, and compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from wancli.report.terminal import create_table, truncate
from wancli.units import format_bytes, pluralize

if TYPE_CHECKING:
    from rich.console import RenderableType

    from wancli.text.prompt_distance import PromptDistance


def format_encoded(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Format one line per prompt: `KEY  TOKENS tokens  cached|encoded  TEXT`."""
    for row in rows:
        state = "cached" if row["cached"] else "encoded"
        yield f"{row['key'][:16]}  {row['tokens']:>3} tokens  {state:<7}  {truncate(row['text'], 36)}"


def format_cache(rows: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    table = create_table("key", ">tokens", ">size", "used", "text")
    for entry in rows:
        used = entry["used"][:16].replace("T", " ")
        table.add_row(
            entry["key"][:12],
            str(entry["tokens"] or "-"),
            format_bytes(entry["bytes"]),
            used,
            truncate(entry["text"], 30),
        )
    yield table
    yield f"{pluralize(len(rows), 'entry', 'entries')}, {format_bytes(sum(entry['bytes'] for entry in rows))}"


def format_differences(differences: Sequence[PromptDistance]) -> Iterator[RenderableType]:
    """Format each pair: the verdict, a table of figures and their meaning, and hints on the prompts."""
    for difference in differences:
        yield f"A  {truncate(difference.a.text, 76)}"
        yield f"B  {truncate(difference.b.text, 76)}"
        verdict = difference.verdict
        yield f"verdict: {verdict.band} ({verdict.percent:.0f} %), by the {verdict.figure}\n"
        table = create_table("figure", ">value", "meaning")
        for label, value, meaning in difference.table_rows():
            table.add_row(label, value, meaning)
        yield table
        yield difference.legacy_text
        for hint in difference.hints:
            yield f"hint: {hint}"
