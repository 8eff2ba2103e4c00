"""The plan as people read it, within 80 columns: shots, prompts, memory, time, and what else there is."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from wancli import alternatives
from wancli.events import printable
from wancli.report.data import cached, memory_rows, most_needing, state, time_of
from wancli.report.terminal import grid, lora_line, memory_table, shot_lines
from wancli.units import duration

if TYPE_CHECKING:
    from rich.console import RenderableType

    from wancli.alternatives import Alternative
    from wancli.rates import Rate
    from wancli.shot import Plan
    from wancli.store import Store


def plan_tables(
    plan: Plan, store: Store, known: Sequence[Rate] = (), *, verbose: bool = False, others: bool = False
) -> Iterator[RenderableType]:
    """The shots, what stage 1 has to do, the memory that the largest shot needs and why so, the time; with
    `others` what other settings would need."""
    for model in dict.fromkeys(shot.model for shot in plan.shots):
        sizes = model.checkpoint.transformer
        width = f"{sizes.num_layers} blocks of width {sizes.dim}"
        runs = f"{model.dtype} on {model.device}, {model.residency}"
        yield f"{plan.name}: {model.checkpoint.root.name}, {width}, {runs}"
    table = grid(
        "shot", "size", ">frames", ">tokens", ">seed", "solver", ">steps", ">shift", ">guidance", "state"
    )
    for shot in plan.shots:
        size = f"{shot.width}x{shot.height}"
        guidance = "/".join(f"{stage.guidance:g}" for stage in shot.stages)
        numbers = (shot.frames, f"{shot.tokens:,}", shot.seed, shot.solver, shot.steps)
        table.add_row(printable(shot.id), size, *map(str, numbers), f"{shot.shift:g}", guidance, state(shot))
    yield table
    if verbose:
        for shot in plan.shots:
            yield from shot_lines(shot)
    yield from dict.fromkeys(lora_line(use) for shot in plan.shots for use in shot.loras)
    prompts = cached(plan.shots, store)
    hits = sum(prompt["cached"] for prompt in prompts)
    yield f"\nprompts: {len(prompts)} distinct, {hits} in the cache, {len(prompts) - hits} to encode"
    todo = [shot for shot in plan.shots if state(shot) != "done"]
    time = time_of(todo, store, known)
    yield memory_table(memory_rows(plan.shots), time["phases"])
    for line in dict.fromkeys(line for shot in plan.shots for line in shot.model.why):
        yield textwrap.fill(line, 80, subsequent_indent="  ")
    yield from time_lines(time)
    if others:
        for shot in most_needing(plan.shots):
            yield f"\nshot {printable(shot.id)}, {shot.frames} frames: what other settings would need, GiB"
            yield alternatives_table(alternatives.alternatives(shot))
            yield "✓ fits, ✗ does not, [ ] chosen; the text encoder is not in it: see encode above"


def time_lines(time: Mapping[str, Any]) -> Iterator[str]:
    """What the whole job will take, and which renders say so."""
    seconds = time["seconds"]
    if seconds is None:
        unknown = ", ".join(name for name, took in time["phases"].items() if took is None)
        yield f"time: measured by the first render here (unknown: {unknown})"
    elif seconds:
        yield f"time: {duration(seconds)} for what is to do"
    if "sample" in time["rates"]:
        rate = time["rates"]["sample"]
        size, tokens = f"width {rate['width']}", f"{rate['tokens']:,} tokens"
        yield f"sampling at {rate['per_second'] / 1e9:,.0f} GFLOP/s, as on {rate['date']} at {size}, {tokens}"


def alternatives_table(ways: Sequence[Alternative]) -> RenderableType:
    """Rows of precision, residency and attention; a column for each size."""
    sizes = list(dict.fromkeys((way.width, way.height) for way in ways))
    table = grid("weights", "", "attention", *(f">{width}x{height}" for width, height in sizes))
    rows: dict[tuple[str, str, str], list[str]] = {}
    for way in ways:
        label = f"{way.total / 2**30:.1f} {'✓' if way.fits else '✗'}"
        attention = "whole" if way.chunk is None else f"{way.chunk:,} tokens"
        row = rows.setdefault((way.dtype, way.residency, attention), [])
        row.append(f"[{label}]" if way.chosen else f"{label} ")
    for names, cells in rows.items():
        table.add_row(*names, *cells)
    return table
