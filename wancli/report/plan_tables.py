"""The plan for people, within 80 columns: shots, prompts, memory, time, and alternatives."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from wancli.plan import alternatives
from wancli.progress import make_printable
from wancli.report.plan_document import (
    OutputState,
    count_steps,
    estimate_time,
    largest_shots,
    memory_rows,
    prompt_rows,
    shots_to_render,
)
from wancli.report.render_summary import build_memory_table
from wancli.report.shorten import fit_columns
from wancli.report.shot_text import (
    describe_added_shots,
    describe_cache,
    format_lora,
    format_shot,
    name_given_pictures,
)
from wancli.report.terminal import create_table, state_text
from wancli.units import format_ranges, format_seconds, pluralize

if TYPE_CHECKING:
    from rich.console import RenderableType

    from wancli.plan.alternatives import Alternative
    from wancli.plan.render_plan import Plan
    from wancli.plan.shot import Shot
    from wancli.plan.throughput import Rate
    from wancli.sampling.solvers import SigmaSchedule
    from wancli.storage.cache import Store

MANY, HEAD, TAIL = 24, 8, 4  # a plan with more than MANY shots shows the first and the last


def format_plan(
    plan: Plan,
    outputs: Sequence[OutputState],
    store: Store,
    known: Sequence[Rate] = (),
    *,
    verbose: bool = False,
    others: bool = False,
) -> Iterator[RenderableType]:
    """Format the shots and the states of their `outputs`, the prompts to encode, the memory of the largest
    shot with its reasons, and the time. With `others`, also format the memory of other settings."""
    for model in dict.fromkeys(shot.model for shot in plan.shots):
        sizes = model.checkpoint.transformer_config
        width = f"{sizes.num_layers} blocks of width {sizes.dim}"
        runs = f"{model.dtype} on {model.device}, {model.residency}"
        runs += "" if model.kernels.chunk is None else f", {model.kernels.chunk:,} tokens at a time"
        runs += "" if model.kernels.attention == "auto" else f", {model.kernels.attention} attention"
        runs += ", products in fp8" if model.kernels.fp8_matmul else ""
        yield f"{plan.name}: {model.checkpoint.name}, {width}, {runs}"
        if reason := model.checkpoint.variant_reason:
            yield f"variant: {model.checkpoint.variant.name}, {reason}"
    hidden = range(HEAD, len(outputs) - TAIL) if len(outputs) > MANY and not verbose else range(0)
    yield from _format_shots(plan.shots, outputs, hidden)
    yield from _format_reasons(plan.shots, outputs)
    if (sharing := max(plan.schedule.placement(shot).batch_size for shot in plan.shots)) > 1:
        yield f"\nup to {sharing} shots share each pass over the weights"
    steps = count_steps(plan)
    if steps["shared"]:
        taken = steps["all"] - steps["shared"]
        yield f"\nsampling {taken:,} of {steps['all']:,} steps; {steps['shared']:,} are shared"
    if len(outputs) > 1:
        states = [found.state for found in outputs]
        counts = ", ".join(
            f"{states.count(s):,} {state_text(s)}"
            for s in ("done", "to do", "damaged", "in the way", "unreadable")
            if s in states
        )
        yield f"{len(states):,} shots: {counts}{'; -v shows all' if hidden else ''}"
    if added := describe_added_shots(plan):
        yield textwrap.fill(added, 80, subsequent_indent="  ")
    if verbose:
        first_with: dict[SigmaSchedule, Shot] = {}
        for shot in plan.shots:
            same = first_with.setdefault(shot.sigma_schedule, shot)
            yield from format_shot(shot, plan.schedule.placement(shot), same)
    cached = [f"cache: {describe_cache(shot, shot.cache)}" for shot in plan.shots if shot.cache]
    yield from (textwrap.fill(line, 80, subsequent_indent="  ") for line in dict.fromkeys(cached))
    yield from dict.fromkeys(format_lora(use) for shot in plan.shots for use in shot.loras)
    prompts = prompt_rows(plan.shots, store)
    hits = sum(prompt["cached"] for prompt in prompts)
    yield f"\nprompts: {len(prompts)} distinct, {hits} in the cache, {len(prompts) - hits} to encode"
    time = estimate_time(shots_to_render(plan.shots, outputs), store, known, plan.schedule.shared_steps())
    yield build_memory_table(memory_rows(plan), time["phases"])
    for line in dict.fromkeys(line for shot in plan.shots for line in shot.model.residency_reasons):
        yield textwrap.fill(line, 80, subsequent_indent="  ")
    yield from format_time(time)
    if others:
        for shot in largest_shots(plan):
            frames = pluralize(shot.frames, "frame")
            yield f"\nshot {make_printable(shot.id)}, {frames}: what other settings would need, GiB"
            yield format_alternatives(alternatives.alternatives(shot))
            yield "✓ fits, ✗ does not, [ ] chosen; without the text encoder: see encode above"


def _format_reasons(shots: Sequence[Shot], outputs: Sequence[OutputState]) -> Iterator[str]:
    """Format why outputs are what they are: a line for each reason, with the numbers of its shots."""
    reasons: dict[OutputState, list[int]] = {}
    for shot, found in zip(shots, outputs, strict=True):
        if found.why and found.state != "unreadable":  # these are warnings
            reasons.setdefault(found, []).append(shot.index)
    for found, indices in list(reasons.items())[:MANY]:
        line = f"{format_ranges(indices)} {state_text(found.state)}: {make_printable(found.why)}"
        yield textwrap.fill(line, 80, subsequent_indent="  ", break_on_hyphens=False)
    if len(reasons) > MANY:
        yield f"and {len(reasons) - MANY:,} more reasons; --json has all"


def _format_shots(
    shots: Sequence[Shot], outputs: Sequence[OutputState], hidden: range
) -> Iterator[RenderableType]:
    """Format a row for each shot, with its number if there are several. If the terminal is too narrow, values
    that all shots share are a line above the table."""
    from rich.console import Console

    numbers = (">frames", ">tokens", ">seed", "solver", ">steps", ">shift", ">guidance")
    images = name_given_pictures(shots)
    several = len(shots) > 1
    first = [">#", "shot"] if several else ["shot"]
    heads: Sequence[str] = (*first, *(["image"] if any(images) else []), "size", *numbers, "state")
    rows = [
        [
            *([str(shot.index)] if several else []),
            shot.id,
            *([image] if any(images) else []),
            *_shot_cells(shot),
            state_text(found.state),
        ]
        for shot, image, found in zip(shots, images, outputs, strict=True)
    ]
    line, heads, rows = fit_columns(heads, rows, Console().width, ("image",))
    if line:
        yield line
    table = create_table(*heads)
    for index, row in enumerate(rows):
        if index not in hidden:
            table.add_row(*row)
        elif index == hidden[0]:
            table.add_row("…")
    yield table


def _shot_cells(shot: Shot) -> list[str]:
    size = f"{shot.width}x{shot.height}"
    guidance = "/".join(f"{stage.guidance:g}" for stage in shot.stages)
    numbers = (shot.frames, f"{shot.tokens:,}", shot.seed, shot.solver, shot.steps)
    return [size, *map(str, numbers), f"{shot.shift:g}", guidance]


def format_time(time: Mapping[str, Any]) -> Iterator[str]:
    """Format the expected time of the whole job, and the render that its rate is from."""
    seconds = time["seconds"]
    if seconds is None:
        unknown = ", ".join(name for name, took in time["phases"].items() if took is None)
        yield f"time: measured by the first render here (unknown: {unknown})"
    elif seconds:
        rough = "; a rough guess, from shots of another size" if time["rough"] else ""
        yield f"time: {format_range(seconds, *time['range'])} for the shots to render{rough}"
    if "sample" in time["rates"]:
        rate = time["rates"]["sample"]
        size, tokens = f"width {rate['width']}", f"{rate['tokens']:,} tokens"
        yield f"sampling at {rate['per_second'] / 1e9:,.0f} GFLOP/s, as on {rate['date']} at {size}, {tokens}"


def format_range(seconds: float, low: float, high: float) -> str:
    """Format an expected time: `about 40.0 s`, or `35.0 s to 2 min 20 s` if earlier renders differ by more
    than a tenth."""
    if high - low <= seconds / 10:
        return f"about {format_seconds(seconds)}"
    return f"{format_seconds(low)} to {format_seconds(high)}"


def format_alternatives(options: Sequence[Alternative]) -> RenderableType:
    """Build a table of precision, residency and attention, with a column for each size."""
    sizes = list(dict.fromkeys((option.width, option.height) for option in options))
    table = create_table("weights", "", "attention", *(f">{width}x{height}" for width, height in sizes))
    rows: dict[tuple[str, str, str], list[str]] = {}
    digits = 1 if max(option.total for option in options) > 4 * 2**30 else 2
    for option in options:
        label = f"{option.total / 2**30:.{digits}f} {'✓' if option.fits else '✗'}"
        attention = "whole" if option.chunk is None else f"{option.chunk:,} tokens"
        row = rows.setdefault((option.dtype, option.residency, attention), [])
        row.append(f"[{label}]" if option.chosen else f"{label} ")
    for names, cells in rows.items():
        table.add_row(*names, *cells)
    return table
