"""`wancli status` and `wancli check`: where a batch stands, and whether what it made is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
    found = status.of_plan(plan, store_of(cache_dir), throughput.read(rates_of(cache_dir)))
    if as_json:
        emit(found)
    else:
        terminal.show(status.lines(found, datetime.now(UTC)))
    return ExitStatus.OK


def check_command(
    what: Annotated[str, typer.Argument(metavar="DIR|JOB", help="A folder of outputs, or a job file.")],
    deep: Annotated[
        bool, typer.Option("--deep", help="Also decode every video, and count its frames.")
    ] = False,
    sets: Sets = None,
    sweeps: Sweeps = None,
    items: Items = None,
    shard: Shard = None,
    as_json: Json = False,
    cache_dir: CacheDir = None,
) -> int:
    """Verify what was rendered.

    Videos against their manifests, latents and states against their checksums. Changes nothing;
    exits with 4 if anything does not verify.
    """
    from wancli.engine import verify
    from wancli.report import terminal

    if Path(what).is_dir():
        found = verify.folder(Path(what), deep=deep)
    else:
        plan = plan_of(job_of(what, flags_of(sets, sweeps, items, shard)), cache_dir)
        found = verify.shots(plan.shots, deep=deep)
    if as_json:
        emit(found.as_dict())
    else:
        terminal.show(terminal.check_lines(found))
    return ExitStatus.INTEGRITY if found.problems else ExitStatus.OK
