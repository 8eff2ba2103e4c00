"""`wancli check`: verify what was rendered."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wancli.commands._common import emit, flags_of, job_of, plan_of
from wancli.commands._options import CacheDir, Items, Json, Sets, Shard, Sweeps
from wancli.errors import ExitStatus


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
        found = verify.check_folder(Path(what), deep=deep)
    else:
        plan = plan_of(job_of(what, flags_of(sets, sweeps, items, shard)), cache_dir)
        found = verify.check_shots(plan.shots, deep=deep)
    if as_json:
        emit(found.as_dict())
    else:
        terminal.show(terminal.check_lines(found))
    return ExitStatus.INTEGRITY if found.problems else ExitStatus.OK
