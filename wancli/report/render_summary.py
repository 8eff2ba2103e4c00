"""The summary after a render: injections, memory and time, failures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from wancli.report.earlier_shots import read_earlier_comparison
from wancli.report.shorten import fit_columns, shorten_unique
from wancli.report.terminal import create_table, draw_bar, draw_ruler, state_text, truncate
from wancli.units import format_bytes, format_ranges, format_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType

    from wancli.report.batch_report import Report
    from wancli.storage.manifest_schema import Manifest


def format_summary(
    report: Report, path: Path | None, *, injections: bool, effects: bool
) -> Iterator[RenderableType]:
    """Format the results of a batch: injections and the distance of their prompts, memory, time, counts."""
    rendered = [entry for entry in report.shots if entry.status == "rendered"]
    fresh = [(entry.id, entry.record) for entry in rendered if entry.record]
    if injections and any(record.injection for _, record in fresh):
        yield from _format_injections(fresh)
    if effects:
        for shot_id, record in fresh:
            yield from _format_effects(shot_id, record)
    totals = report.totals
    if fresh:
        yield build_memory_table(totals["memory"])
        predicted, measured = (format_bytes(totals["peak"][name]) for name in ("predicted", "measured"))
        begun = totals["first_step_after"]
        start = "" if begun is None else f"; first step after {format_seconds(begun)}"
        yield f"peak {measured}, predicted {predicted}{start}"
        attention = "attention: {self} among video tokens, {cross} to the text"
        yield from dict.fromkeys(attention.format_map(record.model.attention) for _, record in fresh)
        cache = totals["cache"]
        loaded = "encoder loaded" if cache["encoder_loaded"] else "encoder not loaded"
        yield f"prompts: {cache['hits']} from the cache, {cache['misses']} encoded ({loaded})"
    counts = dict.fromkeys(("rendered", "already done", "failed", "stopped", "elsewhere", "not started"), 0)
    for entry in report.shots:
        counts[entry.status] += 1
    yield ", ".join(f"{count} {state_text(status)}" for status, count in counts.items() if count)
    if path:
        yield f"report: {path}"
        for name in ("sheet", "video"):
            if shown := _comparison_file(path, name):
                yield f"{'side by side' if name == 'video' else name}: {shown}"
        yield f"page: {path.with_suffix('.html')}"


def _comparison_file(report: Path, name: Literal["sheet", "video"]) -> Path | None:
    """Return the sheet, or the video side by side, that the comparison beside a report has."""
    path = report.with_name(f"{report.name.removesuffix('.report.json')}.compare.json")
    found = read_earlier_comparison(path)
    file = getattr(found, name) if found else None
    return path.parent / file if file else None


def build_memory_table(
    phases: Sequence[Mapping[str, Any]], expected: Mapping[str, float | None] | None = None
) -> RenderableType:
    """Build the table of the memory and the expected time of each phase.

    Memory is that of model, activations and buffers, and the peak of the process. After a render the table
    also has the measured peak and time.
    """
    measured = any("measured" in phase for phase in phases)
    extra = [">measured", ">expected", ">time"] if measured else [">expected"]
    table = create_table("phase", ">model", ">activation", ">buffer", ">peak", *extra)
    for phase in phases:
        parts = ("model", "activation", "buffer", "peak")
        cells = [format_bytes(phase[part]) if part in phase else "-" for part in parts]
        took = phase.get("expected") if expected is None else expected.get(phase["name"])
        ran = bool(phase.get("measured"))  # not if an earlier run left its result
        cells += [format_bytes(phase["measured"]) if ran else "-"] if measured else []
        cells += ["?" if took is None else format_seconds(took)]
        cells += [format_seconds(phase["seconds"]) if ran else "-"] if measured else []
        table.add_row(phase["name"], *cells)
    process = next((phase["process"] for phase in phases if phase.get("process")), 0)
    if process:
        table.add_row("process", "", "", "", format_bytes(process), *("" for _ in extra))
    return table


def format_failures(report: Report, hints: Iterable[str]) -> Iterator[RenderableType]:
    """Format each failed shot on one line, cut to the terminal, and the hints. The report has all of it."""
    from rich.console import Console

    table = create_table("failed shot", "code", "message")
    failed = [(entry, entry.error) for entry in report.shots if entry.error]
    names = shorten_unique([entry.id for entry, _ in failed], 24)
    left = [max(11, *map(len, names)), max(len(error["code"]) for _, error in failed)]
    width = max(20, Console(stderr=True).width - sum(left) - 2 * len(left) - 2)
    for name, (entry, error) in zip(names, failed):
        message = error["message"].removeprefix(f"{entry.output}: ")
        table.add_row(name, error["code"], truncate(message.replace("\n", " / "), width))
    yield table
    yield from hints


def _format_injections(shots: Sequence[tuple[str, Manifest]]) -> Iterator[RenderableType]:
    from rich.console import Console

    heads: Sequence[str] = (
        "shot",
        ">rule",
        "blocks",
        ">strength",
        "steps",
        "branch",
        "blend",
        ">hits",
        "difference",
    )
    rows = []
    for shot_id, record in shots:
        for index, rule in enumerate(record.injection):
            found = rule.difference and rule.difference.verdict
            row = [
                shot_id,
                str(index),
                format_ranges([*rule.blocks]),
                _format_strengths([*rule.blocks.values()]),
                format_ranges([*rule.steps]),
                "+".join(rule.branches),
                rule.blend,
                f"{rule.hits:,}/{rule.planned:,}",
                f"{found.percent:.0f} %, {found.band}" if found else "a picture",
            ]
            rows.append(row)
    line, heads, rows = fit_columns(heads, rows, Console(stderr=True).width)
    if line:
        yield line
    table = create_table(*heads)
    for row in rows:
        table.add_row(*row)
    yield table


def _format_strengths(strengths: Sequence[float]) -> str:
    """Format one strength, or the smallest and the largest: `0.2 to 0.6`."""
    low, high = min(strengths, default=0.0), max(strengths, default=0.0)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _format_effects(shot_id: str, record: Manifest) -> Iterator[RenderableType]:
    """Format how much each measured velocity changed, and the cross-attention output of every block."""
    if not record.effects:
        return
    depth = record.model.sizes.num_layers
    blocks: dict[int, list[float]] = {}
    legacy: dict[int, list[float]] = {}
    for effect in record.effects:
        for block, value in effect.blocks.items():
            blocks.setdefault(block, []).append(100 * value)
            legacy.setdefault(block, []).append(effect.changed_percent[block])
    top = max(value for values in blocks.values() for value in values) or 1.0
    yield f"\nshot {shot_id}: changes by the injection, relative L2; a full bar is {top:.1f} %"
    yield f"{'step':>6} {'branch':<7} velocity  {draw_ruler(depth)}"
    for effect in record.effects:
        shares = [100 * effect.blocks.get(block, 0.0) / top for block in range(depth)]
        yield f"{effect.step:>6} {effect.branch:<7} {100 * effect.velocity:6.2f} %  {draw_bar(shares)}"
    yield "cross-attention output, mean over steps, % (in brackets the legacy share of |change| > 0.01)"
    cells = [f"{b:>2}: {_mean(blocks[b]):5.1f} ({_mean(legacy[b]):3.0f})" for b in sorted(blocks)]
    for start in range(0, len(cells), 4):
        yield "  " + "  ".join(cells[start : start + 4])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
