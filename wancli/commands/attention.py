"""`wancli attention`: attention maps of a finished video."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer

from wancli.commands._common import create_display, hashes_path, open_store, print_json
from wancli.commands._options import CacheDir, Json, ProgressMode, ProgressOption, Quiet
from wancli.errors import ExitStatus, JobError, OutputExists


def attention_command(
    source: Annotated[
        Path, typer.Argument(metavar="VIDEO|LATENT", help="A video with its manifest, or a kept latent.")
    ],
    *,
    words: Annotated[
        list[str], typer.Option("--word", metavar="WORDS", help="Words of the prompt. May be repeated.")
    ],
    sigmas: Annotated[
        str, typer.Option(metavar="S,S,...", help="Noise levels, from 0 to 1; a group of maps for each.")
    ] = "0.9,0.6,0.3",
    blocks: Annotated[
        list[str] | None,
        typer.Option(metavar="BLOCKS", help="A group of blocks. May be repeated. Default: all."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Another prompt than that of the video.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Default: NAME.levels.attention.npz."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Move an existing file aside.")] = False,
    as_json: Json = False,
    cache_dir: CacheDir = None,
    progress: ProgressOption = ProgressMode.auto,
    quiet: Quiet = False,
) -> int:
    """See where words act in a finished video.

    Adds noise to its latent, runs one forward for each noise level, and writes the probability of each word
    for every token, and the video with the heat of each word, as `attention:` in a job does while rendering.
    Without a kept latent the VAE encodes the video. Injections are left out. Prints the paths.
    """
    from wancli.engine import attention_levels, attention_stage
    from wancli.engine.context import RenderContext
    from wancli.report.html import recorded_shot
    from wancli.storage import disk
    from wancli.video.mp4 import VideoInfo

    levels = _parse_sigmas(sigmas)
    recorded = recorded_shot.read_recorded(source)
    path = output or recorded.video.with_suffix(".levels.attention.npz")
    if path.suffix != ".npz":
        raise JobError(f"{path.name!r} does not end in .npz", where="--output")
    if disk.is_taken(path) and not force:
        raise OutputExists(
            "already exists", where=str(path), hint="--force moves it aside; or give -o another name."
        )
    shot = recorded_shot.plan_recorded(recorded, words, blocks or ["all"], prompt, hashes_path(cache_dir))
    context = RenderContext(open_store(cache_dir), create_display(progress.value, quiet))
    maps = attention_levels.record_levels(shot, recorded.latent, levels, context)
    record = attention_stage.write_maps(path, maps, shot)
    paths = [path]
    if disk.is_file(recorded.video):
        info = VideoInfo(shot.frames, Fraction(shot.fps), shot.width, shot.height)
        paths.append(attention_stage.draw_overlay(path, recorded.video, info, path.with_suffix(".mp4")))
    if as_json:
        print_json({"schema": "wancli/attention/1", "outputs": [*map(str, paths)], **record})
    else:
        print(*paths, sep="\n")
    return ExitStatus.OK


def _parse_sigmas(text: str) -> list[float]:
    try:
        levels = [float(part) for part in text.split(",")]
    except ValueError:
        levels = []
    if not levels or any(not 0 < level <= 1 for level in levels):
        raise JobError(f"{text!r} is not a list of noise levels above 0 and up to 1", where="--sigmas")
    return levels
