"""`wancli new`: a commented job to start from."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from wancli.commands._common import print_result
from wancli.errors import ExitStatus

JOBS = Path(__file__).parents[1] / "assets" / "new"


class JobKind(StrEnum):
    sweep = "sweep"
    render = "render"
    chain = "chain"
    injection = "injection"


def new_command(
    kind: Annotated[JobKind, typer.Argument(metavar="sweep|render|chain|injection", help="What it renders.")],
) -> int:
    """Print a commented job to start from: wancli new sweep > job.yaml.

    It renders as it is with wan-mini; a chain needs a model that takes pictures.
    """
    from wancli.storage import disk

    print_result(disk.read_bytes(JOBS / f"{kind.value}.yaml").decode().removesuffix("\n"))
    return ExitStatus.OK
