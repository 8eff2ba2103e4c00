"""`wancli check`: verify what was rendered."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wancli.commands._common import collect_flags, load_job, plan_job, print_json
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
        found = verify.folder(Path(what), deep=deep)
    else:
        plan = plan_job(load_job(what, collect_flags(sets, sweeps, items, shard)), cache_dir)
        found = verify.shots(plan.shots, deep=deep)
    if as_json:
        print_json(found.as_dict())
    else:
        terminal.show(terminal.format_check(found))
    return ExitStatus.INTEGRITY if found.problems else ExitStatus.OK
