"""`wancli status`: how far a batch is."""

from __future__ import annotations

from wancli.commands._common import emit, flags_of, job_of, plan_of, rates_of, store_of
from wancli.commands._options import CacheDir, Items, JobArgument, Json, Sets, Shard, Sweeps
from wancli.errors import ExitStatus


def status_command(
    job: JobArgument,
    sets: Sets = None,
    sweeps: Sweeps = None,
    items: Items = None,
    shard: Shard = None,
    as_json: Json = False,
    cache_dir: CacheDir = None,
) -> int:
    """Say how far a batch is.

    Per shot: done, on its way, in other hands, failed and why, to do; and the time that is left.
    """
    from datetime import UTC, datetime

    from wancli.plan import throughput
    from wancli.report import status, terminal

    plan = plan_of(job_of(job, flags_of(sets, sweeps, items, shard)), cache_dir)
    found = status.status_document(plan, store_of(cache_dir), throughput.read_rates(rates_of(cache_dir)))
    if as_json:
        emit(found)
    else:
        terminal.show(status.format_status(found, datetime.now(UTC)))
    return ExitStatus.OK
