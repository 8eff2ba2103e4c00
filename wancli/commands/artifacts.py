"""`wancli decode`, `compare`, `inspect`, `schema`, `errors`: latents, videos, weights; what may be said."""

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
    from wancli.engine.context import Tools
    from wancli.engine.force import Force
    from wancli.storage import manifest

    display = display_of(progress.value, quiet)
    tools = Tools(None, display, Force.of(()) if force else None)
    path = decode_stage.decode_file(latents, output, model, memo_of(None), tools)
    if as_json:
        body = manifest.read(manifest.manifest_path(path)) or {}
        emit({"schema": "wancli/decode/1", "output": str(path), "manifest": body})
    else:
        print(path)
    return ExitStatus.OK


def compare_command(
    videos: Annotated[list[Path], typer.Argument(metavar="VIDEO...", help="MP4 files.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The picture.")] = Path(
        "contact-sheet.png"
    ),
    video: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also an MP4 of all of them, side by side.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="N|ID", help="What the others are measured by. Default: 0, the first."),
    ] = None,
    as_json: Json = False,
    progress: Progressing = ProgressMode.auto,
    quiet: Quiet = False,
) -> int:
    """Put videos side by side: a contact sheet, an MP4, figures.

    A PNG with frames of each, from first to last, under what its manifest says it is, and how it differs from
    the baseline: distance of the latents, PSNR, SSIM, motion.
    """
    from wancli.engine.context import Tools
    from wancli.report import comparison
    from wancli.video import clip

    display = display_of(progress.value, quiet)
    clips = clip.read(videos)
    tools = Tools(None, display)
    chosen = comparison.chosen(clips, baseline)
    beside = {one.id: chosen for one in clips}
    pages = comparison.pages(clips, beside, output, video)
    found = comparison.document(clips, chosen, beside, tools)
    comparison.draw(found, pages, tools)
    if as_json:
        emit(found | {"sheet": str(output), "video": None if video is None else str(video)})
    else:
        print(*pages.paths, sep="\n")
    return ExitStatus.OK


def inspect_command(
    path: Annotated[
        Path, typer.Argument(metavar="FILE-OR-FOLDER", help="Weights: a checkpoint, a part of one, a LoRA.")
    ],
    deep: Annotated[
        bool, typer.Option("--deep", help="Also look for NaN and Inf in every tensor, and hash the files.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Say what a file or folder of weights is.

    Model and variant, sizes, precision, quantization, LoRA targets, what is missing. Reads headers only.
    """
    from wancli.report import inspect_text, terminal
    from wancli.weights import inspect

    document = inspect.inspect(path, deep=deep)
    if as_json:
        emit(document)
    else:
        terminal.show(inspect_text.inspect_lines(document))
    return ExitStatus.INTEGRITY if inspect.damaged(document) else ExitStatus.OK


def schema_command(
    events: Annotated[
        bool, typer.Option("--events", help="Of the lines of `render --json-stream` instead.")
    ] = False,
) -> int:
    """Print the JSON Schema of a job file.

    Editors complete and check keys with it.
    """
    from wancli.job import json_schema
    from wancli.report import event_schema

    emit(event_schema.of_events() if events else json_schema.of_job())
    return ExitStatus.OK


def errors_command(as_json: Json = False) -> int:
    """List what can go wrong.

    Codes as events and reports have them, exit codes, whether another try may help.
    """
    from wancli import errors
    from wancli.report import terminal

    if as_json:
        emit([errors.described(kind) for kind in errors.kinds()])
    else:
        terminal.show(terminal.error_lines(errors.kinds()))
    return ExitStatus.OK
