"""The plan as people read it, within 80 columns: shots, prompts, memory, time, and what else there is."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from wancli.plan import alternatives
from wancli.progress import make_printable
from wancli.report.batch_report import (
    count_steps,
    estimate_time,
    largest_shots,
    memory_rows,
    prompt_rows,
    shots_to_render,
)
from wancli.report.shorten import fitted
from wancli.report.terminal import grid, lora_line, memory_table, shot_lines
from wancli.units import format_seconds, pluralize

if TYPE_CHECKING:
    from rich.console import RenderableType

    from wancli.plan.alternatives import Alternative
    from wancli.plan.shot import Plan, Shot
    from wancli.plan.throughput import Rate
    from wancli.storage.cache import Store

MANY, HEAD, TAIL = 24, 8, 4  # of a plan with more shots than this, the first and the last are shown


def plan_tables(
    plan: Plan,
    states: Sequence[str],
    store: Store,
    known: Sequence[Rate] = (),
    *,
    verbose: bool = False,
    others: bool = False,
) -> Iterator[RenderableType]:
    """The shots and their `states`, what stage 1 has to do, the memory that the largest shot needs and why
    so, the time; with `others` what other settings would need."""
    for model in dict.fromkeys(shot.model for shot in plan.shots):
        sizes = model.checkpoint.transformer
        width = f"{sizes.num_layers} blocks of width {sizes.dim}"
        runs = f"{model.dtype} on {model.device}, {model.residency}"
        runs += "" if model.kernels.chunk is None else f", {model.kernels.chunk:,} tokens at a time"
        runs += "" if model.kernels.attention == "auto" else f", {model.kernels.attention} attention"
        runs += ", products in fp8" if model.kernels.fp8_matmul else ""
        yield f"{plan.name}: {model.checkpoint.root.name}, {width}, {runs}"
    hidden = range(HEAD, len(states) - TAIL) if len(states) > MANY and not verbose else range(0)
    yield from _shots_table(plan.shots, states, hidden)
    if (sharing := max(plan.schedule.placement(shot).batch_size for shot in plan.shots)) > 1:
        yield f"\nup to {sharing} shots share each pass over the weights"
    steps = count_steps(plan)
    if steps["shared"]:
        taken = steps["all"] - steps["shared"]
        yield f"\nsampling {taken:,} of {steps['all']:,} steps; {steps['shared']:,} are shared"
    if len(states) > 1:
        counts = ", ".join(
            f"{states.count(s):,} {s}" for s in ("done", "to do", "damaged", "in the way") if s in states
        )
        yield f"{len(states):,} shots: {counts}{'; -v shows all' if hidden else ''}"
    if verbose:
        for shot in plan.shots:
            yield from shot_lines(shot, plan.schedule.placement(shot))
    yield from dict.fromkeys(lora_line(use) for shot in plan.shots for use in shot.loras)
    prompts = prompt_rows(plan.shots, store)
    hits = sum(prompt["cached"] for prompt in prompts)
    yield f"\nprompts: {len(prompts)} distinct, {hits} in the cache, {len(prompts) - hits} to encode"
    time = estimate_time(shots_to_render(plan.shots, states), store, known, plan.schedule.shared_steps())
    yield memory_table(memory_rows(plan), time["phases"])
    for line in dict.fromkeys(line for shot in plan.shots for line in shot.model.residency_reasons):
        yield textwrap.fill(line, 80, subsequent_indent="  ")
    yield from time_lines(time)
    if others:
        for shot in largest_shots(plan):
            frames = pluralize(shot.frames, "frame")
            yield f"\nshot {make_printable(shot.id)}, {frames}: what other settings would need, GiB"
            yield alternatives_table(alternatives.alternatives(shot))
            yield "✓ fits, ✗ does not, [ ] chosen; the text encoder is not in it: see encode above"


def _shots_table(shots: Sequence[Shot], states: Sequence[str], hidden: range) -> Iterator[RenderableType]:
    """A row for each shot. What is the same for all of them is a line above it where the terminal is too
    narrow for all columns."""
    from rich.console import Console

    numbers = (">frames", ">tokens", ">seed", "solver", ">steps", ">shift", ">guidance")
    heads: Sequence[str] = ("shot", "size", *numbers, "state")
    rows = [[shot.id, *_cells(shot), state] for shot, state in zip(shots, states, strict=True)]
    line, heads, rows = fitted(heads, rows, Console().width)
    if line:
        yield line
    table = grid(*heads)
    for index, row in enumerate(rows):
        if index not in hidden:
            table.add_row(*row)
        elif index == hidden[0]:
            table.add_row("…")
    yield table


def _cells(shot: Shot) -> list[str]:
    size = f"{shot.width}x{shot.height}"
    guidance = "/".join(f"{stage.guidance:g}" for stage in shot.stages)
    numbers = (shot.frames, f"{shot.tokens:,}", shot.seed, shot.solver, shot.steps)
    return [size, *map(str, numbers), f"{shot.shift:g}", guidance]


def time_lines(time: Mapping[str, Any]) -> Iterator[str]:
    """What the whole job will take, and which renders say so."""
    seconds = time["seconds"]
    if seconds is None:
        unknown = ", ".join(name for name, took in time["phases"].items() if took is None)
        yield f"time: measured by the first render here (unknown: {unknown})"
    elif seconds:
        rough = "; a rough guess, from shots of another size" if time["rough"] else ""
        yield f"time: {format_seconds(seconds)} for what is to do{rough}"
    if "sample" in time["rates"]:
        rate = time["rates"]["sample"]
        size, tokens = f"width {rate['width']}", f"{rate['tokens']:,} tokens"
        yield f"sampling at {rate['per_second'] / 1e9:,.0f} GFLOP/s, as on {rate['date']} at {size}, {tokens}"


def alternatives_table(ways: Sequence[Alternative]) -> RenderableType:
    """Rows of precision, residency and attention; a column for each size."""
    sizes = list(dict.fromkeys((way.width, way.height) for way in ways))
    table = grid("weights", "", "attention", *(f">{width}x{height}" for width, height in sizes))
    rows: dict[tuple[str, str, str], list[str]] = {}
    digits = 1 if max(way.total for way in ways) > 4 * 2**30 else 2
    for way in ways:
        label = f"{way.total / 2**30:.{digits}f} {'✓' if way.fits else '✗'}"
        attention = "whole" if way.chunk is None else f"{way.chunk:,} tokens"
        row = rows.setdefault((way.dtype, way.residency, attention), [])
        row.append(f"[{label}]" if way.chosen else f"{label} ")
    for names, cells in rows.items():
        table.add_row(*names, *cells)
    return table
