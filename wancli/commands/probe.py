"""`wancli probe`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from wancli.commands._common import (
    collect_flags,
    create_display,
    hashes_path,
    load_job,
    open_store,
    print_json,
    resolve_cache_dir,
)
from wancli.commands._options import CacheDir, JobArgument, Json, ProgressMode, ProgressOption, Quiet, Sets
from wancli.errors import ExitStatus, OutputExists
from wancli.progress import make_printable
from wancli.storage import disk


class MethodName(StrEnum):
    inject = "inject"
    skip = "skip"
    gradient = "gradient"
    render = "render"


class Parts(StrEnum):
    region = "region"
    frame = "frame"


def probe_command(
    job: JobArgument,
    method: Annotated[
        MethodName,
        typer.Option(
            help="inject: each block reads the injected prompt or picture. skip: each block reads none. "
            "gradient: all blocks at once, to first order. render: whole videos, compared in pixels."
        ),
    ] = MethodName.inject,
    levels: Annotated[
        int | None,
        typer.Option(
            metavar="K", help="Number of noise levels to measure at, from early to late. Default: 3."
        ),
    ] = None,
    ranges: Annotated[
        str | None,
        typer.Option(
            metavar="N|SETS",
            help="Measure N ranges, or sets (early,middle,late), not single blocks. Default of render: 8.",
        ),
    ] = None,
    by: Annotated[
        Parts | None,
        typer.Option(
            help="Also measure parts of the video: the inside and the outside of the first region or mask of "
            "a rule, or each latent frame."
        ),
    ] = None,
    shot: Annotated[
        str | None, typer.Option(metavar="ID", help="The shot. Default: the first that injects.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="The map. Default: JOB.map.METHOD.json."),
    ] = None,
    sets: Sets = None,
    as_json: Json = False,
    cache_dir: CacheDir = None,
    progress: ProgressOption = ProgressMode.auto,
    quiet: Quiet = False,
) -> int:
    """Measure which block's text or picture matters.

    For the model, prompts and pictures of a job. Shows the map, suggests `blocks:`, and keeps the map for
    `inject.blocks: auto:top8`.
    """
    from wancli import signals
    from wancli.engine.context import RenderContext
    from wancli.injection import block_map, block_map_store
    from wancli.plan import planner
    from wancli.probe import parts, request, run
    from wancli.report import block_map_text, terminal

    display = create_display(progress.value, quiet)
    plan = planner.build_plan(
        load_job(job, collect_flags(sets)), hashes_path(cache_dir), allow_missing_maps=True
    )
    chosen = next(m for m in block_map.METHODS if m == method)
    told_apart = next((one for one in parts.ALL if one == by), None)
    probe_request = request.plan_probe(plan, chosen, levels, ranges, shot, told_apart)
    path = _require_writable(output or plan.sidecar_path(f"map.{probe_request.method}.json"))
    for warning in plan.warnings:
        display.warn(warning)
    with signals.stop_on_signal() as stop:
        result = run.run_probe(probe_request, RenderContext(open_store(cache_dir), display, stop=stop))
        block_map_store.BlockMapStore(resolve_cache_dir(cache_dir) / "maps").put(result)
        block_map.write(path, result)
    if as_json:
        print_json(result.as_dict())
    else:
        terminal.show(block_map_text.format_map(result))
        terminal.show(block_map_text.format_next_step(result, job))
        print(make_printable(f"map: {path}"))
    return ExitStatus.OK


def _require_writable(path: Path) -> Path:
    """Check before the measurement that a map can be written to the path."""
    from wancli.storage import atomic

    if disk.is_folder(path):
        raise OutputExists("a folder has the name of an output", where=str(path))
    atomic.require_writable(path.parent)
    return path
