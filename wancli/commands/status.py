"""`wancli status`: the state of a batch."""

from __future__ import annotations

from wancli.commands._common import load_job, open_store, plan_job, print_json, rates_path
from wancli.commands._option_groups import JobChanges, takes_groups
from wancli.commands._options import CacheDir, JobArgument, Json
from wancli.errors import ExitStatus


@takes_groups
def status_command(
    job: JobArgument,
    *,
    changes: JobChanges,
    as_json: Json = False,
    cache_dir: CacheDir = None,
) -> int:
    """Show the state of a batch.

    Per shot: done, claimed by a worker, half done, failed and why, to do; and the time left.
    """
    from datetime import UTC, datetime

    from wancli.plan import throughput
    from wancli.report import status, terminal

    plan = plan_job(load_job(job, changes.flags), cache_dir)
    found = status.status_document(plan, open_store(cache_dir), throughput.read_rates(rates_path(cache_dir)))
    if as_json:
        print_json(found)
    else:
        terminal.show(status.format_status(found, datetime.now(UTC)))
    return ExitStatus.OK
