"""`wancli decode`: finish a shot from its latent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from wancli.commands._common import create_display, hashes_path, print_json
from wancli.commands._options import ForceOption, Json, ModelDir, ProgressMode, ProgressOption, Quiet
from wancli.errors import ExitStatus, JobError, UsageError


def decode_command(
    latents: Annotated[
        Path, typer.Argument(metavar="FILE", help="A latent that a render saved; with --preview, a state.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="The video. Default: the output of its shot."),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Another video.fps, video.crf or video.codec. Repeatable."
        ),
    ] = None,
    preview: Annotated[
        bool,
        typer.Option("--preview", help="Show where a shot is: decode what its state predicts so far."),
    ] = False,
    model: ModelDir = None,
    force: ForceOption = False,
    as_json: Json = False,
    progress: ProgressOption = ProgressMode.auto,
    quiet: Quiet = False,
) -> int:
    """Finish a shot from its latent, or show the state of one.

    Decodes the latent, writes and verifies the MP4, and prints its path. Keeps the latent.
    """
    from wancli.engine import decode_stage
    from wancli.engine import preview as previews
    from wancli.engine.context import Force, RenderContext
    from wancli.storage import manifest

    display = create_display(progress.value, quiet)
    context = RenderContext(None, display, Force.snapshot(()) if force else None)
    video = _parse_video_settings(sets or [])
    if preview and (video or as_json):
        raise UsageError("--preview takes neither --set nor --json")
    if preview:
        print(previews.preview_state(latents, output, model, hashes_path(None), context))
        return ExitStatus.OK
    path = decode_stage.decode_file(latents, output, model, hashes_path(None), context, video)
    if as_json:
        body = manifest.read_json(manifest.manifest_path(path)) or {}
        print_json({"schema": "wancli/decode/1", "output": str(path), "manifest": body})
    else:
        print(path)
    return ExitStatus.OK


def _parse_video_settings(sets: list[str]) -> dict[str, Any]:
    """Parse `--set video.crf=10` as keys of `video:`. Raises JobError for other keys and wrong values."""
    from pydantic import ValidationError

    from wancli.commands._common import collect_flags
    from wancli.job.schema import Video
    from wancli.job.validation import describe_problems

    found: dict[str, Any] = {}
    for setting in collect_flags(sets).parse_settings():
        name = setting.key.removeprefix("video.")
        if setting.key not in ("video.fps", "video.crf", "video.codec"):
            raise JobError(
                "does not change how a latent is decoded",
                where=f"--set {setting.key}",
                hint="Write --set video.fps=24, video.crf=10 or video.codec=h265.",
            )
        found[name] = setting.layer.value
    try:
        read = Video.model_validate(found).model_dump(include={*found})
    except ValidationError as error:
        lines = describe_problems(error, lambda path, _: f"--set video.{path[0]}")
        raise JobError("\n".join(lines)) from None
    return {key: value for key, value in read.items() if value is not None}  # `null` is as it was
