"""`wancli render`: parse, plan, choose who renders, report."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from wancli import signals, stdio
from wancli.commands._common import (
    Invocation,
    create_display,
    load_job,
    open_store,
    plan_job,
    resolve_cache_dir,
)
from wancli.commands._finish_batch import finish_batch
from wancli.commands._option_groups import takes_groups
from wancli.commands._options import Engine, LogLevel, RenderProgress
from wancli.commands._render_options import RenderOptions
from wancli.commands._render_reporter import RenderReporter
from wancli.errors import JobError, Stopped, UsageError, WancliError, format_frames
from wancli.storage import disk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wancli.engine.context import RenderContext
    from wancli.engine.outcome import FailurePolicy, Outcome
    from wancli.farm.ray_driver import Cluster
    from wancli.job.loader import JobFile
    from wancli.plan.render_plan import Plan


@takes_groups
def render_command(context: typer.Context, options: RenderOptions) -> int:
    """Render every shot of a job, or a prompt.

    Writes MP4s, a manifest beside each, and a report. A shot whose manifest verifies is not
    rendered again; a shot that was stopped resumes from its saved state. Prints one path per
    finished shot. If a shot fails, the others are still rendered.
    """
    from wancli.engine import batch  # noqa: F401 - slow: a signal meanwhile ends the process, as at its start

    context.with_resource(stdio.work_without_waiting())
    display = context.with_resource(
        create_display(options.progress.value, options.quiet, as_stream=options.json_stream)
    )
    stop = context.with_resource(signals.stop_on_signal(at_once=True))
    if options.as_json + options.json_stream + (options.progress is RenderProgress.openjd) > 1:
        raise UsageError("stdout can take one of --json, --json-stream and --progress openjd")
    reporter = RenderReporter(context, display, options)
    cluster = _resolve_cluster(context, options)
    policy = options.failure_policy
    plan = plan_job(_load_job_or_prompt(options), options.cache_dir, measure=options.measures_effects)
    reporter.on_plan(plan)
    render_context = _create_render_context(context, plan, reporter, policy, stop)
    outcomes, stopped = _collect_outcomes(
        plan, _render_shots(plan, render_context, cluster, options), render_context, reporter
    )
    report, path = finish_batch(plan, outcomes, options.cache_dir)
    status = reporter.on_end(plan, outcomes, report, path)
    if stopped:
        raise reporter.add_resume_command(stopped, plan, outcomes) if options.force else stopped
    return status


def _load_job_or_prompt(options: RenderOptions) -> JobFile:
    """Load the job file, or make a job of `--prompt`."""
    from wancli.job.loader import build_prompt_job

    if options.prompt is not None and options.job is None:
        output = options.output or "{slug}.mp4"
        jobs = build_prompt_job(options.prompt, options.image, output, options.flags)
        if options.save_job is not None:
            from wancli.job.prompt_job import save_prompt_job

            save_prompt_job(options.save_job, options.prompt, options.image, output, options.flags)
        return jobs
    if options.job is None or options.prompt is not None or options.image is not None or options.save_job:
        raise JobError(
            "give a job file, or --prompt",
            hint='wancli render JOB, or wancli render --prompt "A red circle drifts to the left" -o out.mp4',
        )
    return load_job(options.job, options.flags)


def _resolve_cluster(context: typer.Context, options: RenderOptions) -> Cluster | None:
    """Return where --engine ray finds its workers, None if this process renders."""
    if options.engine is Engine.local:
        if options.address or options.cpus_per_worker:
            raise UsageError("--address and --cpus-per-worker are options of --engine ray")
        return None
    from wancli.farm.ray_driver import Cluster

    source = context.get_parameter_source("socket")
    if source is not None and source.name == "COMMANDLINE":
        raise UsageError("--socket is for a server on this host; --engine ray has its own workers")
    if options.job is None or options.job == "-" or disk.is_pipe(Path(options.job)):
        raise JobError("--engine ray needs a job file, which its workers read themselves")
    return Cluster(options.address, options.cpus_per_worker)


def _create_render_context(
    context: typer.Context, plan: Plan, reporter: RenderReporter, policy: FailurePolicy, stop: signals.Stop
) -> RenderContext:
    """Create the render context. From here on signals request a stop, also while the reporter works."""
    stop.at_once = False
    from wancli.engine.context import Force, RenderContext
    from wancli.storage.claims import Claims

    invocation: Invocation = context.obj
    options, display = reporter.options, reporter.display
    claims = context.with_resource(Claims(waits_for_others=not options.no_wait))
    forced = Force.snapshot(plan.shots) if options.force else None
    store = open_store(options.cache_dir)
    return RenderContext(
        store, display, forced, stop, policy, claims, invocation.model_cache, invocation.began
    )


def _render_shots(
    plan: Plan, render_context: RenderContext, cluster: Cluster | None, options: RenderOptions
) -> Iterator[Outcome]:
    """Render the shots here, or by workers that plan the job themselves, and yield their outcomes."""
    if cluster is None:
        from wancli.engine import batch

        return batch.render(plan, render_context)
    from wancli.farm import ray_driver
    from wancli.farm.ray_worker import Task

    assert render_context.claims
    task = Task(
        job=str(options.job),
        folder=str(Path.cwd()),
        flags=options.flags,
        cache=str(resolve_cache_dir(options.cache_dir).absolute()),
        measure=options.measures_effects,
        force=render_context.force,
        retries=render_context.policy.retries,
        waits=render_context.claims.waits_for_others,
    )
    return ray_driver.render(plan, render_context, task, cluster)


def _collect_outcomes(
    plan: Plan, work: Iterator[Outcome], render_context: RenderContext, reporter: RenderReporter
) -> tuple[list[Outcome], Stopped | None]:
    """Collect the outcomes of all shots, then compare the videos; also return what stopped it, if so."""
    from wancli.engine import join
    from wancli.report import batch_report, comparison

    outcomes: list[Outcome] = []
    try:
        for outcome in _print_traces(work, reporter.options.log_level):
            outcomes.append(outcome)
            reporter.on_outcome(outcome)
        join.write_joins(plan, render_context)
        comparison.run_comparison(plan, render_context)
    except Stopped as error:
        return outcomes, error
    except BaseException:
        if outcomes:
            with suppress(WancliError):  # the first error is the one to report
                batch_report.write_report(plan, batch_report.build_report(plan, outcomes))
        raise
    return outcomes, None


def _print_traces(outcomes: Iterator[Outcome], log_level: LogLevel) -> Iterator[Outcome]:
    """With --log-level trace, print the frames of each error and the tensors in them."""
    try:
        for outcome in outcomes:
            if outcome.error and log_level is LogLevel.trace:
                print(outcome.stack, file=sys.stderr)
            yield outcome
    except Exception as error:
        if log_level is LogLevel.trace:
            print(format_frames(error), file=sys.stderr)
        raise
