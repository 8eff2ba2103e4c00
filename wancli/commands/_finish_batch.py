"""Finish a batch: write the report, its page, and the measured rates."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wancli.commands._common import rates_path, thumbnails_dir
from wancli.errors import Unreadable

if TYPE_CHECKING:
    from wancli.engine.outcome import Outcome
    from wancli.plan.render_plan import Plan
    from wancli.report.batch_report import Report

log = logging.getLogger(__name__)


def finish_batch(plan: Plan, outcomes: Sequence[Outcome], cache_dir: Path | None) -> tuple[Report, Path]:
    """Write the report and its page, and remember the rates of the new renders. Returns the report and its
    path.

    Files in the way that cannot be looked at cost the report and not the render: they are a warning.
    """
    from wancli.plan import throughput
    from wancli.report import batch_report
    from wancli.report.html import page

    known = throughput.read_rates(rates_path(cache_dir))
    fresh = [(o.shot, o.record) for o in outcomes if o.status == "rendered" and o.record]
    forked = {o.shot.index for o in outcomes if o.shared_steps}
    throughput.remember_rates(rates_path(cache_dir), throughput.measured_rates(fresh, forked))
    report = batch_report.build_report(plan, outcomes, known)
    path = batch_report.report_path(plan)
    try:
        batch_report.write_report(plan, report)
        page.write_page(path, thumbnails_dir(cache_dir))
    except Unreadable as error:
        log.warning("wancli: %s; the report or its page is not written", error)
    return report, path
