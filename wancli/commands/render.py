"""`wancli render`: what its options mean, and who renders."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wancli import signals
from wancli.commands._common import (
    Invocation,
    collect_flags,
    create_display,
    load_job,
    open_store,
    plan_job,
    resolve_cache_dir,
)
from wancli.commands._options import (
    Address,
    CacheDir,
    CpusPerWorker,
    Engine,
    EngineOption,
    FailFast,
    Force,
    Items,
    Json,
    JsonEvents,
    LogLevel,
    LogLevelOption,
    MaxFailures,
    NoWait,
    Quiet,
    RenderProgress,
    RenderProgressOption,
    Retries,
    SaveEvery,
    Sets,
    Shard,
    Socket,
    Sweeps,
)
from wancli.commands._render_reporter import RenderReporter
from wancli.engine import outcome
from wancli.errors import JobError, Stopped, UsageError, WancliError, format_frames

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wancli.engine.context import RenderContext
    from wancli.engine.outcome import Outcome, Policy
    from wancli.farm.ray_driver import Cluster
    from wancli.job.cli_overrides import Flags
    from wancli.job.loader import JobFile
    from wancli.plan.shot import Plan
    from wancli.progress import Progress


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
    engine: EngineOption = Engine.local,
    address: Address = None,
    cpus_per_worker: CpusPerWorker = None,
    force: Force = False,
    as_json: Json = False,
    json_stream: JsonEvents = False,
    cache_dir: CacheDir = None,
    socket: Socket = None,  # noqa: ARG001 - heeded by wancli.__main__, before this is imported
    log_level: LogLevelOption = LogLevel.basic,
    progress: RenderProgressOption = RenderProgress.auto,
    quiet: Quiet = False,
) -> int:
    """Render every shot of a job, or a prompt.

    Writes MP4s, a manifest beside each, and a report. A shot whose manifest verifies is not
    rendered again, one that was stopped on its way goes on. Prints one path per finished shot.
    A shot that fails does not keep the others from being rendered.
    """
    context.with_resource(signals.raise_on_signal())
    from wancli.engine import batch  # noqa: F401 - takes long: what asks for an end meanwhile ends it at once

    display = context.with_resource(create_display(progress.value, quiet, as_stream=json_stream))
    if as_json + json_stream + (progress is RenderProgress.openjd) > 1:
        raise UsageError("stdout can take one of --json, --json-stream and --progress openjd")
    reporter = RenderReporter(context, display, log_level, quiet, as_json, paths=not (as_json or json_stream))
    cluster = _resolve_cluster(context, engine, job, address, cpus_per_worker)
    failing = outcome.of_flags(fail_fast, max_failures, retries)
    every = [] if save_every is None else [f"save_every={save_every}"]
    flags = collect_flags([*(sets or []), *every], sweeps, items, shard)
    plan = plan_job(
        _load_job_or_prompt(job, prompt, output, flags), cache_dir, measure=reporter.measures_effects
    )
    reporter.on_plan(plan)
    tools = _create_context(context, plan, cache_dir, display, failing, force=force, waits=not no_wait)
    work = _start_rendering(
        plan, tools, cluster, str(job), flags, cache_dir, measuring=reporter.measures_effects
    )
    outcomes, stopped = _collect_outcomes(plan, work, tools, reporter)
    status = reporter.on_end(plan, outcomes, cache_dir)
    if stopped:
        raise reporter.describe_stop(stopped, plan, outcomes) if force else stopped
    return status


def _load_job_or_prompt(job: str | None, prompt: str | None, output: str | None, flags: Flags) -> JobFile:
    from wancli.job.loader import of_prompt

    if prompt is not None and job is None:
        return of_prompt(prompt, output or "{slug}.mp4", flags)
    if job is None or prompt is not None or output is not None:
        raise JobError(
            "give a job file, or --prompt",
            hint='wancli render JOB, or wancli render --prompt "A red circle drifts to the left" -o out.mp4',
        )
    return load_job(job, flags)


def _resolve_cluster(
    context: typer.Context, engine: Engine, job: str | None, address: str | None, cpus_per_worker: int | None
) -> Cluster | None:
    """Where --engine ray finds its workers; None where this process does the work."""
    if engine is Engine.local:
        if address or cpus_per_worker:
            raise UsageError("--address and --cpus-per-worker are of --engine ray")
        return None
    from wancli.farm.ray_driver import Cluster

    source = context.get_parameter_source("socket")
    if source is not None and source.name == "COMMANDLINE":
        raise UsageError("--socket is of a server on this host; --engine ray has workers of its own")
    if job is None or job == "-":
        raise JobError("--engine ray needs a job file, which its workers read for themselves")
    return Cluster(address, cpus_per_worker)


def _create_context(
    context: typer.Context,
    plan: Plan,
    cache_dir: Path | None,
    display: Progress,
    failing: Policy,
    *,
    force: bool,
    waits: bool,
) -> RenderContext:
    """From here to the end of the command signals ask for an end, also while it tells what was rendered."""
    from wancli.engine.context import Force, RenderContext
    from wancli.storage.claims import Claims

    invocation: Invocation = context.obj
    stop = context.with_resource(signals.stop_on_signal())
    claims = context.with_resource(Claims(waits=waits))
    forced = Force.of(plan.shots) if force else None
    store, kept, began = open_store(cache_dir), invocation.kept, invocation.began
    return RenderContext(store, display, forced, stop, failing, claims, kept, began)


def _start_rendering(
    plan: Plan,
    tools: RenderContext,
    cluster: Cluster | None,
    job: str,
    flags: Flags,
    cache_dir: Path | None,
    *,
    measuring: bool,
) -> Iterator[Outcome]:
    """What becomes of the shots, here or by workers that plan the job for themselves."""
    if cluster is None:
        from wancli.engine import batch

        return batch.render(plan, tools)
    from wancli.farm import ray_driver
    from wancli.farm.ray_worker import Task

    assert tools.claims
    cache, retries, waits = (
        str(resolve_cache_dir(cache_dir).absolute()),
        tools.policy.retries,
        tools.claims.waits,
    )
    task = Task(job, str(Path.cwd()), flags, cache, measuring, tools.force, retries, waits)
    return ray_driver.render(plan, tools, task, cluster)


def _collect_outcomes(
    plan: Plan, work: Iterator[Outcome], tools: RenderContext, reporter: RenderReporter
) -> tuple[list[Outcome], Stopped | None]:
    """What became of the shots, and of those that are compared; and why that is not all."""
    from wancli.report import batch_report, comparison

    outcomes: list[Outcome] = []
    try:
        for outcome in _print_traces(work, reporter.level):
            outcomes.append(outcome)
            reporter.on_outcome(outcome)
        comparison.after(plan, tools)
    except Stopped as error:
        return outcomes, error
    except BaseException:
        if outcomes:
            with suppress(WancliError):  # the first error is the one to tell
                batch_report.write(plan, batch_report.build(plan, outcomes))
        raise
    return outcomes, None


def _print_traces(outcomes: Iterator[Outcome], log_level: LogLevel) -> Iterator[Outcome]:
    """With --log-level trace, an error also shows its stack and the tensors in it."""
    try:
        for outcome in outcomes:
            if outcome.error and log_level is LogLevel.trace:
                print(outcome.stack, file=sys.stderr)
            yield outcome
    except Exception as error:
        if log_level is LogLevel.trace:
            print(format_frames(error), file=sys.stderr)
        raise
