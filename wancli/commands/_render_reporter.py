"""What `wancli render` tells: results on stdout, all else on stderr, and its report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from wancli.commands._common import again, complain, posters_of, rates_of, result
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
class Telling:
    """Who is told what: programs by events, by one document or by `paths`, people on stderr."""

    context: typer.Context
    display: Progress
    level: LogLevel
    quiet: bool
    as_json: bool
    paths: bool

    @property
    def measuring(self) -> bool:
        """Whether it is to be told what injections changed."""
        return self.level in (LogLevel.verbose, LogLevel.trace)

    def planned(self, plan: Plan) -> None:
        self.display.planned(plan)
        for warning in plan.warnings:
            self.display.warn(warning)

    def came_to(self, outcome: Outcome) -> None:
        """A shot's error on stderr, and if wanted its path on stdout."""
        self.display.came_to(outcome)
        if outcome.error:
            where = f"shot {outcome.shot.id}"
            complain(outcome.error, "" if outcome.error.where == where else f"{where}: ")
        elif outcome.record and self.paths:
            result(str(outcome.shot.output))

    def ended(self, plan: Plan, outcomes: Sequence[Outcome], cache_dir: Path | None) -> ExitStatus:
        """The report, and what the command exits with if nobody stopped it."""
        report, path = _reported(plan, outcomes, cache_dir)
        if self.as_json:
            result(json.dumps(report, indent=2))
        if not self.quiet:
            self._summarize(report, path, plan, outcomes)
        status = outcome.exit_status(outcome.error for outcome in outcomes if outcome.error)
        self.display.ended(status, path)
        return status

    def _summarize(self, report: dict[str, Any], path: Path, plan: Plan, outcomes: Sequence[Outcome]) -> None:
        """The report for people, and how to try again what failed."""
        from wancli.report import terminal

        injections = self.level is not LogLevel.off
        shown = terminal.summary(report, path, injections=injections, effects=self.measuring)
        terminal.show(shown, stderr=True)
        failed = [outcome.shot.index for outcome in outcomes if outcome.error]
        if failed and self.context.params["force"]:  # the same command would make again what it has made
            failed = _unmade(plan, outcomes)
        taken = [outcome.shot.index for outcome in outcomes if isinstance(outcome.error, OutputExists)]
        ways = []
        if left := [index for index in failed if index not in taken]:
            ways.append(f"again: {again(self.context, format_ranges(left))}")
        if taken:
            anew = again(self.context, format_ranges(taken), without="force")
            ways.append(f"in the way: name another `output`, or move what is there aside: {anew} --force")
        if ways:
            terminal.show(terminal.failures(report, ways), stderr=True)

    def stopped(self, error: Stopped, plan: Plan, outcomes: Sequence[Outcome]) -> Stopped:
        """The end of a render with --force, and how to go on from it."""
        error.command = self._going_on(plan, outcomes)
        if any(outcome.status == "stopped" for outcome in outcomes):
            error.hint = "--force begins anew what was on its way"
        return error

    def _going_on(self, plan: Plan, outcomes: Sequence[Outcome]) -> str:
        """What --force has made is not made once more."""
        if left := _unmade(plan, outcomes):
            return again(self.context, format_ranges(left))
        return again(self.context, format_ranges([shot.index for shot in plan.shots]), without="force")


def _unmade(plan: Plan, outcomes: Sequence[Outcome]) -> list[int]:
    made = {outcome.shot.index for outcome in outcomes if outcome.record}
    return [shot.index for shot in plan.shots if shot.index not in made]


def _reported(plan: Plan, outcomes: Sequence[Outcome], cache_dir: Path | None) -> tuple[dict[str, Any], Path]:
    """What the batch did, as data and as the file it is in, with a page beside it; what it learned about time
    is kept."""
    from wancli.plan import throughput
    from wancli.report import batch_report
    from wancli.report.html import page

    known = throughput.read_rates(rates_of(cache_dir))
    fresh = [(o.shot, o.record) for o in outcomes if o.status == "rendered" and o.record]
    forked = {o.shot.index for o in outcomes if o.shared_steps}
    throughput.remember_rates(rates_of(cache_dir), throughput.measured_rates(fresh, forked))
    report = batch_report.build_report(plan, outcomes, known)
    path = batch_report.write_report(plan, report)
    page.write_page(path, posters_of(cache_dir))
    return report, path
