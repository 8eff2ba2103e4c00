"""`wancli render` and `wancli plan`."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from wancli.commands.common import (
    Invocation,
    complain,
    emit,
    flags_of,
    hush,
    job_of,
    plan_of,
    rates_of,
    store_of,
)
from wancli.commands.options import (
    CacheDir,
    Force,
    Items,
    JobArgument,
    Json,
    Level,
    LogLevel,
    Progressing,
    ProgressMode,
    Quiet,
    SaveEvery,
    Sets,
    Shard,
    Socket,
    Sweeps,
)
from wancli.errors import ExitStatus, JobError, Stopped, WancliError, stack
from wancli.events import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wancli.flags import Flags
    from wancli.jobfile import JobFile
    from wancli.pipeline import Outcome


def render(
    context: typer.Context,
    job: Annotated[
        str | None, typer.Argument(metavar="JOB", help="A job file; - reads it from stdin.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Instead of a job: one video of this, by wan-mini.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="FILE", help="Where it goes. Default: {slug}.mp4"),
    ] = None,
    sets: Sets = None,
    sweeps: Sweeps = None,
    items: Items = None,
    shard: Shard = None,
    save_every: SaveEvery = None,
    force: Force = False,
    as_json: Json = False,
    cache_dir: CacheDir = None,
    socket: Socket = None,  # noqa: ARG001 - heeded by wancli.__main__, before this is imported
    log_level: Level = LogLevel.basic,
    progress: Progressing = ProgressMode.auto,
    quiet: Quiet = False,
) -> int:
    """Render every shot of a job, or a prompt.

    Writes MP4s, a manifest beside each, and a report. A shot whose manifest verifies is not
    rendered again, one that was stopped on its way goes on. Prints one path per finished shot.
    """
    invocation: Invocation = context.obj
    from wancli import events, pipeline, rates, signals
    from wancli.report import data, terminal
    from wancli.tools import Tools

    hush(quiet)
    measuring = log_level in (LogLevel.verbose, LogLevel.trace)
    every = [] if save_every is None else [f"save_every={save_every}"]
    flags = flags_of([*(sets or []), *every], sweeps, items, shard)
    plan = plan_of(_said(job, prompt, output, flags), cache_dir, measure=measuring)
    display = events.progress(sys.stderr, "none" if quiet else progress.value)
    for warning in plan.warnings:
        display.warn(warning)
    outcomes: list[pipeline.Outcome] = []
    known = rates.read(rates_of(cache_dir))
    stopped: Stopped | None = None
    try:
        with signals.listening() as stop:
            store, kept, began = store_of(cache_dir), invocation.kept, invocation.began
            tools = Tools(store, display, force, stop, kept=kept, began=began)
            for outcome in _traced(pipeline.render(plan, tools), log_level):
                outcomes.append(outcome)
                if outcome.error:
                    complain(outcome.error, f"shot {outcome.shot.id}: ")
                elif outcome.record and not as_json:
                    print(outcome.shot.output, flush=True)
    except Stopped as error:
        stopped = error
    except BaseException:
        if outcomes:
            with suppress(WancliError):  # the first error is the one to tell
                data.write(plan, data.build(plan, outcomes))
        raise
    fresh = [(o.shot, o.record) for o in outcomes if o.status == "rendered" and o.record]
    rates.remember(rates_of(cache_dir), rates.learned(fresh))
    report = data.build(plan, outcomes, known)
    path = data.write(plan, report)
    if as_json:
        emit(report)
    if not quiet:
        shown = terminal.summary(report, path, injections=log_level is not LogLevel.off, effects=measuring)
        terminal.show(shown, stderr=True)
    if stopped:
        raise stopped
    return ExitStatus.SOME_FAILED if any(o.error for o in outcomes) else ExitStatus.OK


def plan_command(
    job: JobArgument,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Also prompts, sigmas and the strip of blocks.")
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Plan for this much, 24GiB; also show what other settings need."),
    ] = None,
    sets: Sets = None,
    sweeps: Sweeps = None,
    items: Items = None,
    shard: Shard = None,
    as_json: Json = False,
    cache_dir: CacheDir = None,
) -> int:
    """Show what a render would do.

    Shots, noise levels, injection per block, prompts to encode, memory, time. Loads no model.
    """
    from wancli import choose, rates
    from wancli.report import data, planned, terminal
    from wancli.units import parse_size

    budget = None if memory is None else parse_size(memory, "--memory")
    plan = plan_of(job_of(job, flags_of(sets, sweeps, items, shard)), cache_dir, budget=budget)
    store, known = store_of(cache_dir), rates.read(rates_of(cache_dir))
    if as_json:
        emit(data.of_plan(plan, store, known))
    else:
        terminal.show(planned.plan_tables(plan, store, known, verbose=verbose, others=budget is not None))
        for warning in plan.warnings:
            print(printable(f"wancli: warning: {warning}"), file=sys.stderr)
    for shot in plan.shots:
        if data.state(shot) != "done":
            choose.require(shot, encoded=all(text["cached"] for text in data.cached([shot], store)))
    return ExitStatus.OK


def _traced(outcomes: Iterator[Outcome], log_level: LogLevel) -> Iterator[Outcome]:
    """With --log-level trace, an error also shows its stack and the tensors in it."""
    try:
        for outcome in outcomes:
            if outcome.error and log_level is LogLevel.trace:
                print(stack(outcome.error), file=sys.stderr)
            yield outcome
    except Exception as error:
        if log_level is LogLevel.trace:
            print(stack(error), file=sys.stderr)
        raise


def _said(job: str | None, prompt: str | None, output: str | None, flags: Flags) -> JobFile:
    from wancli.jobfile import of_prompt

    if prompt is not None and job is None:
        return of_prompt(prompt, output or "{slug}.mp4", flags)
    if job is None or prompt is not None or output is not None:
        raise JobError(
            "give a job file, or --prompt",
            hint='wancli render JOB, or wancli render --prompt "A red circle drifts to the left" -o out.mp4',
        )
    return job_of(job, flags)
