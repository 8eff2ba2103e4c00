"""`wancli status`: the state of a batch."""

from __future__ import annotations

from wancli.commands._common import collect_flags, load_job, open_store, plan_job, print_json, rates_path
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
    """Show the state of a batch.

    Per shot: done, claimed by a worker, half done, failed and why, to do; and the time left.
    """
    from datetime import UTC, datetime

    from wancli.plan import throughput
    from wancli.report import status, terminal

    plan = plan_job(load_job(job, collect_flags(sets, sweeps, items, shard)), cache_dir)
    found = status.status_document(plan, open_store(cache_dir), throughput.read_rates(rates_path(cache_dir)))
    if as_json:
        print_json(found)
    else:
        terminal.show(status.format_status(found, datetime.now(UTC)))
    return ExitStatus.OK
