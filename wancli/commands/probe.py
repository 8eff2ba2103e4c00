"""`wancli probe`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from wancli.commands._common import cache_of, display_of, emit, flags_of, job_of, memo_of, store_of
from wancli.commands._options import CacheDir, JobArgument, Json, Progressing, ProgressMode, Quiet, Sets
from wancli.errors import ExitStatus, OutputExists
from wancli.progress import make_printable


class MethodName(StrEnum):
    inject = "inject"
    skip = "skip"
    gradient = "gradient"
    render = "render"


def probe_command(
    job: JobArgument,
    method: Annotated[
        MethodName,
        typer.Option(
            help="inject: each block reads the injected prompt. skip: it reads nothing. gradient: all at "
            "once, by first order. render: whole videos, compared in pixels."
        ),
    ] = MethodName.inject,
    levels: Annotated[
        int | None,
        typer.Option(metavar="K", help="Noise levels to measure at, from early to late. Default: 3."),
    ] = None,
    ranges: Annotated[
        str | None,
        typer.Option(
            metavar="N|SETS",
            help="Instead of single blocks N ranges, or sets: early,middle,late. Default of render: 8.",
        ),
    ] = None,
    shot: Annotated[
        str | None, typer.Option(metavar="ID", help="The shot. Default: the first that injects a prompt.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="The map. Default: JOB.map.METHOD.json."),
    ] = None,
    sets: Sets = None,
    as_json: Json = False,
    cache_dir: CacheDir = None,
    progress: Progressing = ProgressMode.auto,
    quiet: Quiet = False,
) -> int:
    """Measure which block's text matters.

    For the model and prompts of a job. Shows the map, suggests `blocks:`, and keeps it where
    `inject.blocks: auto:top8` finds it.
    """
    from wancli import signals
    from wancli.engine.context import RenderContext
    from wancli.injection import block_map
    from wancli.plan import planner
    from wancli.probe import request, run
    from wancli.report import block_map_text, terminal

    display = display_of(progress.value, quiet)
    planned = planner.build_plan(job_of(job, flags_of(sets)), memo_of(cache_dir), allow_missing_maps=True)
    asked = request.plan_probe(
        planned, next(m for m in block_map.METHODS if m == method), levels, ranges, shot
    )
    path = _free(output or planned.sidecar_path(f"map.{asked.method}.json"))
    for warning in planned.warnings:
        display.warn(warning)
    with signals.listening() as stop:
        found = run.run_probe(asked, RenderContext(store_of(cache_dir), display, stop=stop))
    block_map.BlockMapStore(cache_of(cache_dir) / "maps").put(found)
    block_map.write(path, found)
    if as_json:
        emit(found.as_dict())
    else:
        terminal.show(block_map_text.map_lines(found))
        print(make_printable(f"map: {path}"))
    return ExitStatus.OK


def _free(path: Path) -> Path:
    """Where a map can be written: found out before anything is measured."""
    from wancli.storage import atomic

    if path.is_dir():
        raise OutputExists("a folder has the name of an output", where=str(path))
    atomic.require_writable(path.parent)
    return path
