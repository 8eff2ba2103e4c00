"""`wancli inspect`: describe weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wancli.commands._common import print_json
from wancli.commands._options import Json
from wancli.errors import ExitStatus


def inspect_command(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="FILE-OR-FOLDER",
            help="Weights: a checkpoint, a part of one, a LoRA; or a name of the hub.",
        ),
    ],
    deep: Annotated[
        bool,
        typer.Option("--deep", help="Also look for NaN, Inf and zeros in every tensor, and hash the files."),
    ] = False,
    as_json: Json = False,
) -> int:
    """Describe a file or folder of weights.

    Model and variant, sizes, precision, quantization, LoRA targets, missing files. Reads headers only.
    """
    from wancli.report import inspect_text, terminal
    from wancli.weights import inspect
    from wancli.weights.hub import lookup

    document = inspect.inspect(lookup.resolve_argument(path), deep=deep)
    if as_json:
        print_json(document)
    else:
        terminal.show(inspect_text.format_inspection(document))
    return ExitStatus.INTEGRITY if inspect.is_damaged(document) else ExitStatus.OK
