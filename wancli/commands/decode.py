"""`wancli decode`: finish a shot from its latent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wancli.commands._common import create_display, hashes_path, print_json
from wancli.commands._options import ForceOption, Json, ModelDir, ProgressMode, ProgressOption, Quiet
from wancli.errors import ExitStatus


def decode_command(
    latents: Annotated[
        Path, typer.Argument(metavar="NAME.latents.safetensors", help="A latent that a render saved.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="The video. Default: the output of its shot."),
    ] = None,
    model: ModelDir = None,
    force: ForceOption = False,
    as_json: Json = False,
    progress: ProgressOption = ProgressMode.auto,
    quiet: Quiet = False,
) -> int:
    """Finish a shot from its latent.

    Decodes the latent, writes and verifies the MP4, and prints its path. Keeps the latent.
    """
    from wancli.engine import decode_stage
    from wancli.engine.context import Force, RenderContext
    from wancli.storage import manifest

    display = create_display(progress.value, quiet)
    context = RenderContext(None, display, Force.snapshot(()) if force else None)
    path = decode_stage.decode_file(latents, output, model, hashes_path(None), context)
    if as_json:
        body = manifest.read_json(manifest.manifest_path(path)) or {}
        print_json({"schema": "wancli/decode/1", "output": str(path), "manifest": body})
    else:
        print(path)
    return ExitStatus.OK
