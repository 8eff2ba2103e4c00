"""`wancli check`: verify rendered files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wancli.commands._common import load_job, plan_job, print_json
from wancli.commands._option_groups import JobChanges, takes_groups
from wancli.commands._options import CacheDir, Json
from wancli.errors import ExitStatus
from wancli.storage import disk
from wancli.units import pluralize

if TYPE_CHECKING:
    from wancli.engine.verify import Verdict


@takes_groups
def check_command(
    what: Annotated[str, typer.Argument(metavar="DIR|JOB", help="A folder of outputs, or a job file.")],
    *,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also decode every video and count its frames.")
    ] = False,
    changes: JobChanges,
    as_json: Json = False,
    cache_dir: CacheDir = None,
) -> int:
    """Verify rendered files.

    Checks videos against their manifests, latents and states against their checksums. Changes
    nothing; exits with 4 if a file does not verify or cannot be looked at.
    """
    from wancli.engine import verify
    from wancli.report import terminal

    if disk.is_folder(Path(what)):
        found = verify.check_folder(Path(what), deep=deep)
    else:
        plan = plan_job(load_job(what, changes.flags), cache_dir)
        found = verify.check_shots(plan.shots, deep=deep)
    if as_json:
        print_json(found.as_dict())
    else:
        terminal.show(_format_verdict(found))
    return ExitStatus.INTEGRITY if found.problems or found.unreadable else ExitStatus.OK


def _format_verdict(verdict: Verdict) -> Iterator[str]:
    """Format the problems, the other files, and the number of files that verify."""
    yield from map(str, verdict.problems)
    yield from map(str, verdict.unreadable)
    yield from (f"orphan, no manifest: {path}" for path in verdict.orphans)
    yield from (f"stray, of no comparison: {path}" for path in verdict.strays)
    yield from (f"left by a dead process: {path}" for path in verdict.debris)
    kinds = {"video": verdict.videos, "latent": verdict.latents, "state": verdict.states}
    verified = ", ".join(pluralize(count, what) for what, count in kinds.items())
    yield f"verified: {verified}; problems: {len(verdict.problems):,}"
    if verdict.unreadable:
        yield f"not verified, because they cannot be looked at: {len(verdict.unreadable):,}"
    if verdict.missing:
        yield f"not rendered yet: {len(verdict.missing):,}"
    if verdict.aside:
        yield f"moved aside by --force, not verified: {len(verdict.aside):,}"
