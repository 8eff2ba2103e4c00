"""`wancli render`."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wancli.commands.common import (
    Invocation,
    again,
    cache_of,
    complain,
    display_of,
    flags_of,
    hush,
    job_of,
    plan_of,
    posters_of,
    rates_of,
    result,
    store_of,
)
from wancli.commands.options import (
    Address,
    CacheDir,
    CpusPerWorker,
    Engine,
    Engines,
    FailFast,
    Force,
    Items,
    Json,
    JsonStream,
    Level,
    LogLevel,
    MaxFailures,
    NoWait,
    Quiet,
    RenderProgress,
    RenderProgressing,
    Retries,
    SaveEvery,
    Sets,
    Shard,
    Socket,
    Sweeps,
)
from wancli.errors import JobError, OutputExists, Stopped, UsageError, WancliError, stack

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from wancli.farm.ray import Cluster
    from wancli.flags import Flags
    from wancli.jobfile import JobFile
    from wancli.outcome import Outcome
    from wancli.rates import Rate
    from wancli.shot import Plan
    from wancli.tools import Tools


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
    fail_fast: FailFast = False,
    max_failures: MaxFailures = None,
    retries: Retries = 0,
    no_wait: NoWait = False,
    engine: Engines = Engine.local,
    address: Address = None,
    cpus_per_worker: CpusPerWorker = None,
    force: Force = False,
    as_json: Json = False,
    json_stream: JsonStream = False,
    cache_dir: CacheDir = None,
    socket: Socket = None,  # noqa: ARG001 - heeded by wancli.__main__, before this is imported
    log_level: Level = LogLevel.basic,
    progress: RenderProgressing = RenderProgress.auto,
    quiet: Quiet = False,
) -> int:
    """Render every shot of a job, or a prompt.

    Writes MP4s, a manifest beside each, and a report. A shot whose manifest verifies is not
    rendered again, one that was stopped on its way goes on. Prints one path per finished shot.
    A shot that fails does not keep the others from being rendered.
    """
    from wancli import signals

    context.with_resource(signals.unwinding())
    invocation: Invocation = context.obj
    from wancli import batch, compare, policy, rates
    from wancli.farm.claims import Claims
    from wancli.report import data
    from wancli.tools import Tools

    hush(quiet)
    display = context.with_resource(display_of(progress.value, quiet, json_stream, "render"))
    if as_json + json_stream + (progress is RenderProgress.openjd) > 1:
        raise UsageError("stdout can take one of --json, --json-stream and --progress openjd")
    cluster = _cluster(context, engine, address, cpus_per_worker)
    measuring = log_level in (LogLevel.verbose, LogLevel.trace)
    failing = policy.of_flags(fail_fast, max_failures, retries)
    every = [] if save_every is None else [f"save_every={save_every}"]
    flags = flags_of([*(sets or []), *every], sweeps, items, shard)
    plan = plan_of(_said(job, prompt, output, flags), cache_dir, measure=measuring)
    display.planned(plan)
    for warning in plan.warnings:
        display.warn(warning)
    outcomes: list[Outcome] = []
    known = rates.read(rates_of(cache_dir))
    stopped: Stopped | None = None
    with signals.listening() as stop:  # also for the report: what was rendered is told
        try:
            with Claims(waits=not no_wait) as claims:
                store, kept, began = store_of(cache_dir), invocation.kept, invocation.began
                tools = Tools(store, display, force, stop, failing, claims, kept, began)
                if engine is Engine.local:
                    work = batch.render(plan, tools)
                else:
                    work = _by_ray(plan, tools, _task(tools, job, flags, cache_dir, measuring), cluster)
                for outcome in _traced(work, log_level):
                    outcomes.append(outcome)
                    display.came_to(outcome)
                    _tell(outcome, paths=not (as_json or json_stream))
                compare.after(plan, tools)
        except Stopped as error:
            stopped = error
        except BaseException:
            if outcomes:
                with suppress(WancliError):  # the first error is the one to tell
                    data.write(plan, data.build(plan, outcomes))
            raise
        report, path = _report(plan, outcomes, cache_dir, known)
        if as_json:
            result(json.dumps(report, indent=2))
        if not quiet:
            _summarize(context, report, path, outcomes, log_level)
        status = policy.exit_status(outcome.error for outcome in outcomes if outcome.error)
        display.ended(status, path)
    if stopped:
        if force:
            stopped.command = _going_on(context, plan, outcomes)
            stopped.hint = "--force begins anew what was on its way"
        raise stopped
    return status


def _report(
    plan: Plan, outcomes: Sequence[Outcome], cache_dir: Path | None, known: Sequence[Rate]
) -> tuple[dict[str, Any], Path]:
    """What the batch did, as data and as the file it is in, with a page beside it; what it learned about time
    is kept."""
    from wancli import rates
    from wancli.report import data, page

    fresh = [(o.shot, o.record) for o in outcomes if o.status == "rendered" and o.record]
    rates.remember(rates_of(cache_dir), rates.learned(fresh))
    report = data.build(plan, outcomes, known)
    path = data.write(plan, report)
    page.write(path, posters_of(cache_dir))
    return report, path


def _summarize(
    context: typer.Context,
    report: dict[str, Any],
    path: Path,
    outcomes: Sequence[Outcome],
    log_level: LogLevel,
) -> None:
    """The report for people, and how to try again what failed."""
    from wancli.report import terminal

    effects = log_level in (LogLevel.verbose, LogLevel.trace)
    shown = terminal.summary(report, path, injections=log_level is not LogLevel.off, effects=effects)
    terminal.show(shown, stderr=True)
    failed = [outcome.shot.index for outcome in outcomes if outcome.error]
    taken = [outcome.shot.index for outcome in outcomes if isinstance(outcome.error, OutputExists)]
    ways = []
    if left := [index for index in failed if index not in taken]:
        ways.append(f"again: {again(context, terminal.ranges(left))}")
    if taken:
        anew = again(context, terminal.ranges(taken), without="force")
        ways.append(f"in the way: name another `output`, or move what is there aside: {anew} --force")
    if ways:
        terminal.show(terminal.failures(report, ways), stderr=True)


def _going_on(context: typer.Context, plan: Plan, outcomes: Sequence[Outcome]) -> str:
    """How a render with --force goes on: what it has made is not made once more."""
    from wancli.report.terminal import ranges

    made = {outcome.shot.index for outcome in outcomes if outcome.record}
    every = [shot.index for shot in plan.shots]
    left = [index for index in every if index not in made]
    return again(context, ranges(left)) if left else again(context, ranges(every), without="force")


def _cluster(
    context: typer.Context, engine: Engine, address: str | None, cpus_per_worker: int | None
) -> Cluster:
    """Where --engine ray finds its workers."""
    from wancli.farm.ray import Cluster

    source = context.get_parameter_source("socket")
    if engine is Engine.ray and source is not None and source.name == "COMMANDLINE":
        raise UsageError("--socket is of a server on this host; --engine ray has workers of its own")
    if engine is not Engine.ray and (address or cpus_per_worker):
        raise UsageError("--address and --cpus-per-worker are of --engine ray")
    return Cluster(address, cpus_per_worker)


def _by_ray(plan: Plan, tools: Tools, task: dict[str, Any], cluster: Cluster) -> Iterator[Outcome]:
    from wancli.farm import ray

    return ray.render(plan, tools, ray.Task(**task), cluster)


def _task(
    tools: Tools, job: str | None, flags: Flags, cache_dir: Path | None, measuring: bool
) -> dict[str, Any]:
    """What the workers of an engine plan for themselves."""
    assert tools.claims
    if job is None or job == "-":
        raise JobError("--engine ray needs a job file, which its workers read for themselves")
    return asdict(flags) | {
        "job": job,
        "folder": str(Path.cwd()),
        "cache": str(cache_of(cache_dir).absolute()),
        "measure": measuring,
        "force": tools.force,
        "retries": tools.policy.retries,
        "waits": tools.claims.waits,
    }


def _tell(outcome: Outcome, *, paths: bool) -> None:
    """A shot's error on stderr, and if wanted its path on stdout."""
    if outcome.error:
        where = f"shot {outcome.shot.id}"
        complain(outcome.error, "" if outcome.error.where == where else f"{where}: ")
    elif outcome.record and paths:
        result(str(outcome.shot.output))


def _traced(outcomes: Iterator[Outcome], log_level: LogLevel) -> Iterator[Outcome]:
    """With --log-level trace, an error also shows its stack and the tensors in it."""
    try:
        for outcome in outcomes:
            if outcome.error and log_level is LogLevel.trace:
                print(outcome.stack, file=sys.stderr)
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
