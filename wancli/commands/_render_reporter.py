"""The reporter of `wancli render`: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from wancli.commands._common import print_error, print_result, rerun_command
from wancli.commands._options import LogLevel
from wancli.engine.outcome import exit_status
from wancli.errors import ExitStatus, OutputExists, Stopped
from wancli.units import format_ranges

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wancli.commands._render_options import RenderOptions
    from wancli.engine.outcome import Outcome
    from wancli.plan.render_plan import Plan
    from wancli.progress import Progress
    from wancli.report.batch_report import Report


@dataclass(frozen=True)
class RenderReporter:
    """The output of a render: events, one document or paths for programs, a summary for people."""

    context: typer.Context
    display: Progress
    options: RenderOptions

    def on_plan(self, plan: Plan) -> None:
        from wancli.report.shot_text import describe_added_shots

        self.display.on_plan(plan)
        if added := describe_added_shots(plan):
            self.display.note(added)
        for warning in plan.warnings:
            self.display.warn(warning)

    def on_outcome(self, outcome: Outcome) -> None:
        """Print the error of a shot on stderr, or its path on stdout."""
        self.display.on_outcome(outcome)
        if outcome.error:
            where = f"shot {outcome.shot.id}"
            print_error(outcome.error, "" if outcome.error.where == where else f"{where}: ")
        elif outcome.record and self.options.prints_paths:
            print_result(str(outcome.shot.output))

    def on_end(self, plan: Plan, outcomes: Sequence[Outcome], report: Report, path: Path) -> ExitStatus:
        """Print the report, and return the exit code of the outcomes."""
        if self.options.as_json:
            print_result(json.dumps(report.as_dict(), indent=2))
        if not self.options.quiet:
            self._summarize(report, path, plan, outcomes)
        status = exit_status(outcome.error for outcome in outcomes if outcome.error)
        self.display.on_end(status, path)
        return status

    def _summarize(self, report: Report, path: Path, plan: Plan, outcomes: Sequence[Outcome]) -> None:
        """Print the summary for people, and the commands that try the failed shots again."""
        from wancli.report import render_summary, terminal

        injections = self.options.log_level is not LogLevel.off
        summary = render_summary.format_summary(
            report, path, injections=injections, effects=self.options.measures_effects
        )
        terminal.show(summary, stderr=True)
        failed = [outcome.shot.index for outcome in outcomes if outcome.error]
        if failed and self.options.force:  # the same command would render the finished shots again
            failed = _unfinished(plan, outcomes)
        existing = [outcome.shot.index for outcome in outcomes if isinstance(outcome.error, OutputExists)]
        hints = []
        if followers := sum(outcome.follows_failure for outcome in outcomes):
            hints.append(f"{followers} of them only because the shot that they continue failed")
        lasting = [o.shot.index for o in outcomes if o.error and not o.error.retryable]
        left = [index for index in failed if index not in existing]
        if retried := [index for index in left if index not in lasting]:
            hints.append(f"try again: {rerun_command(self.context, format_ranges(retried))}")
        if mended := [index for index in left if index in lasting]:
            rerun = rerun_command(self.context, format_ranges(mended))
            hints.append(f"another try alone does not help; once the cause is gone: {rerun}")
        if existing:
            forced = rerun_command(self.context, format_ranges(existing), without="force")
            hints.append(
                f"already exists: choose another `output`, or move the existing files aside: {forced} --force"
            )
        if hints:
            terminal.show(render_summary.format_failures(report, hints), stderr=True)

    def add_resume_command(self, error: Stopped, plan: Plan, outcomes: Sequence[Outcome]) -> Stopped:
        """Return the error of a stopped render with --force, with the command that resumes it.

        The same command would render the finished shots once more.
        """
        if left := _unfinished(plan, outcomes):
            error.resume_command = rerun_command(self.context, format_ranges(left))
        else:
            indices = format_ranges([shot.index for shot in plan.shots])
            error.resume_command = rerun_command(self.context, indices, without="force")
        if any(outcome.status == "stopped" for outcome in outcomes):
            error.hint = "--force starts shots in progress again from the first step"
        return error


def _unfinished(plan: Plan, outcomes: Sequence[Outcome]) -> list[int]:
    """Return the indices of the shots without a finished video."""
    finished = {outcome.shot.index for outcome in outcomes if outcome.record}
    return [shot.index for shot in plan.shots if shot.index not in finished]
