"""`wancli decode`: finish a shot from its latent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wancli.commands._common import display_of, emit, memo_of
from wancli.commands._options import Force, Json, ModelDir, Progressing, ProgressMode, Quiet
from wancli.errors import ExitStatus


def decode_command(
    latents: Annotated[
        Path, typer.Argument(metavar="NAME.latents.safetensors", help="A latent that a render left.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Default: the name it was made for.")
    ] = None,
    model: ModelDir = None,
    force: Force = False,
    as_json: Json = False,
    progress: Progressing = ProgressMode.auto,
    quiet: Quiet = False,
) -> int:
    """Finish a shot from its latent.

    Decodes it, writes and verifies the MP4, prints its path. The latent stays.
    """
    from wancli.engine import decode_stage
    from wancli.engine.context import Force, RenderContext
    from wancli.storage import manifest

    display = display_of(progress.value, quiet)
    tools = RenderContext(None, display, Force.of(()) if force else None)
    path = decode_stage.decode_file(latents, output, model, memo_of(None), tools)
    if as_json:
        body = manifest.read_json(manifest.manifest_path(path)) or {}
        emit({"schema": "wancli/decode/1", "output": str(path), "manifest": body})
    else:
        print(path)
    return ExitStatus.OK
