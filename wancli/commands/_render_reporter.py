"""What `wancli render` tells: results on stdout, all else on stderr, and its report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from wancli.commands._common import print_error, print_result, rates_path, rerun_command, thumbnails_dir
from wancli.commands._options import LogLevel
from wancli.engine import outcome
from wancli.errors import ExitStatus, OutputExists, Stopped
from wancli.units import format_ranges

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wancli.engine.outcome import Outcome
    from wancli.plan.shot import Plan
    from wancli.progress import Progress


@dataclass(frozen=True)
class RenderReporter:
    """Who is told what: programs by events, by one document or by `paths`, people on stderr."""

    context: typer.Context
    display: Progress
    level: LogLevel
    quiet: bool
    as_json: bool
    paths: bool

    @property
    def measures_effects(self) -> bool:
        """Whether it is to be told what injections changed."""
        return self.level in (LogLevel.verbose, LogLevel.trace)

    def on_plan(self, plan: Plan) -> None:
        self.display.on_plan(plan)
        for warning in plan.warnings:
            self.display.warn(warning)

    def on_outcome(self, outcome: Outcome) -> None:
        """A shot's error on stderr, and if wanted its path on stdout."""
        self.display.on_outcome(outcome)
        if outcome.error:
            where = f"shot {outcome.shot.id}"
            print_error(outcome.error, "" if outcome.error.where == where else f"{where}: ")
        elif outcome.record and self.paths:
            print_result(str(outcome.shot.output))

    def on_end(self, plan: Plan, outcomes: Sequence[Outcome], cache_dir: Path | None) -> ExitStatus:
        """The report, and what the command exits with if nobody stopped it."""
        report, path = _write_report(plan, outcomes, cache_dir)
        if self.as_json:
            print_result(json.dumps(report, indent=2))
        if not self.quiet:
            self._summarize(report, path, plan, outcomes)
        status = outcome.exit_status(outcome.error for outcome in outcomes if outcome.error)
        self.display.on_end(status, path)
        return status

    def _summarize(self, report: dict[str, Any], path: Path, plan: Plan, outcomes: Sequence[Outcome]) -> None:
        """The report for people, and how to try again what failed."""
        from wancli.report import terminal

        injections = self.level is not LogLevel.off
        shown = terminal.format_summary(report, path, injections=injections, effects=self.measures_effects)
        terminal.show(shown, stderr=True)
        failed = [outcome.shot.index for outcome in outcomes if outcome.error]
        if failed and self.context.params["force"]:  # the same command would make again what it has made
            failed = _unrendered(plan, outcomes)
        taken = [outcome.shot.index for outcome in outcomes if isinstance(outcome.error, OutputExists)]
        ways = []
        if left := [index for index in failed if index not in taken]:
            ways.append(f"again: {rerun_command(self.context, format_ranges(left))}")
        if taken:
            anew = rerun_command(self.context, format_ranges(taken), without="force")
            ways.append(f"in the way: name another `output`, or move what is there aside: {anew} --force")
        if ways:
            terminal.show(terminal.format_failures(report, ways), stderr=True)

    def describe_stop(self, error: Stopped, plan: Plan, outcomes: Sequence[Outcome]) -> Stopped:
        """The end of a render with --force, and how to go on from it."""
        error.resume_command = self._resume_command(plan, outcomes)
        if any(outcome.status == "stopped" for outcome in outcomes):
            error.hint = "--force begins anew what was on its way"
        return error

    def _resume_command(self, plan: Plan, outcomes: Sequence[Outcome]) -> str:
        """What --force has made is not made once more."""
        if left := _unrendered(plan, outcomes):
            return rerun_command(self.context, format_ranges(left))
        return rerun_command(
            self.context, format_ranges([shot.index for shot in plan.shots]), without="force"
        )


def _unrendered(plan: Plan, outcomes: Sequence[Outcome]) -> list[int]:
    made = {outcome.shot.index for outcome in outcomes if outcome.record}
    return [shot.index for shot in plan.shots if shot.index not in made]


def _write_report(
    plan: Plan, outcomes: Sequence[Outcome], cache_dir: Path | None
) -> tuple[dict[str, Any], Path]:
    """What the batch did, as data and as the file it is in, with a page beside it; what it learned about time
    is kept."""
    from wancli.plan import throughput
    from wancli.report import batch_report
    from wancli.report.html import page

    known = throughput.read(rates_path(cache_dir))
    fresh = [(o.shot, o.record) for o in outcomes if o.status == "rendered" and o.record]
    throughput.remember(rates_path(cache_dir), throughput.learned(fresh))
    report = batch_report.build(plan, outcomes, known)
    path = batch_report.write(plan, report)
    page.write(path, thumbnails_dir(cache_dir))
    return report, path
