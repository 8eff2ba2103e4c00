"""`wancli compare`: videos side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wancli.commands._common import create_display, print_json
from wancli.commands._options import Json, ProgressMode, ProgressOption, Quiet
from wancli.errors import ExitStatus


def compare_command(
    videos: Annotated[list[Path], typer.Argument(metavar="VIDEO...", help="MP4 files.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The contact sheet.")] = Path(
        "contact-sheet.png"
    ),
    video: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write an MP4 of all videos, side by side.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="N|ID", help="The video that the others are compared with. Default: 0, the first."
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(metavar="LABEL[,LABEL]", help="Arrange by these labels, the last across."),
    ] = None,
    as_json: Json = False,
    progress: ProgressOption = ProgressMode.auto,
    quiet: Quiet = False,
) -> int:
    """Put videos side by side: a contact sheet, an MP4, metrics.

    The PNG shows frames of each video from first to last, with the settings from its manifest and its
    difference to the baseline: distance of the latents, PSNR, SSIM, motion.
    """
    from wancli.engine.context import RenderContext
    from wancli.report import comparison, comparison_files
    from wancli.video import clip

    display = create_display(progress.value, quiet)
    clips = clip.read_clips(videos)
    context = RenderContext(None, display)
    chosen = comparison.select_baseline(clips, baseline)
    baselines = {each.id: chosen for each in clips}
    grid = None if by is None else comparison.arrange_clips(clips, [name.strip() for name in by.split(",")])
    outputs = comparison_files.plan_outputs(clips, baselines, output, video, grid=grid)
    document = comparison.measure_document(clips, chosen, baselines, context)
    comparison.write_outputs(document, outputs, context)
    if as_json:
        print_json(document | {"sheet": str(output), "video": None if video is None else str(video)})
    else:
        print(*outputs.paths, sep="\n")
    return ExitStatus.OK
