"""`wancli status`: the state of a batch."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from wancli.commands._common import load_job, open_store, plan_job, print_json, rates_path
from wancli.commands._option_groups import JobChanges, takes_groups
from wancli.commands._options import CacheDir, JobArgument, Json
from wancli.errors import ExitStatus, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from wancli.plan.render_plan import Plan

_WATCH_SECONDS = 3.0


@takes_groups
def status_command(
    job: JobArgument,
    *,
    changes: JobChanges,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it again every few seconds, until nothing is left to do.")
    ] = False,
    as_json: Json = False,
    cache_dir: CacheDir = None,
) -> int:
    """Show the state of a batch.

    Per shot: done, rendered by which worker, half done, failed and why, to do; and the time left.
    """
    from wancli.plan import throughput
    from wancli.report import status

    if watch and as_json:
        raise UsageError("--watch shows text again and again, --json is one document")
    plan = plan_job(load_job(job, changes.flags), cache_dir)
    if as_json:
        rates = throughput.read_rates(rates_path(cache_dir))
        print_json(status.status_document(plan, open_store(cache_dir), rates))
        return ExitStatus.OK
    with suppress(KeyboardInterrupt):  # the usual end of a watch
        while _show_status(plan, cache_dir, clear=watch) and watch:
            time.sleep(_WATCH_SECONDS)
    return ExitStatus.OK


def _show_status(plan: Plan, cache_dir: Path | None, *, clear: bool) -> bool:
    """Show the status once, on a cleared terminal if asked; return whether anything is left to do."""
    from datetime import UTC, datetime

    from rich.console import Console

    from wancli.plan import throughput
    from wancli.report import status, terminal

    found = status.status_document(plan, open_store(cache_dir), throughput.read_rates(rates_path(cache_dir)))
    if clear:
        Console().clear()  # nothing if stdout is no terminal
    terminal.show(status.format_status(found, datetime.now(UTC)))
    return any(found["counts"][state] for state in status.UNFINISHED)
