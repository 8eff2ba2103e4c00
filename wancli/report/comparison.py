"""Comparisons of videos with a baseline: a contact sheet, an MP4 side by side, and metrics.

A job's comparison is written to JOB.compare.json, .png and .mp4 beside the outputs. Files that were made from
the same videos are kept. Only a few decoded frames are in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from wancli import __version__
from wancli.engine.context import RenderContext
from wancli.errors import EntryError, JobError, NoSuchFile, Stopped, Unreadable, WancliError
from wancli.report import comparison_metrics, earlier_shots
from wancli.report.comparison_files import OutputFiles, plan_outputs
from wancli.report.comparison_metrics import JsonObject
from wancli.storage import atomic, disk, manifest, sidecars
from wancli.storage.report_schema import COMPARISON_SCHEMA as SCHEMA
from wancli.storage.report_schema import ComparisonRecord
from wancli.video import clip, contact_sheet, grid_sheet, side_by_side
from wancli.video.arrangement import Grid, arrange, find_axes, require_axes
from wancli.video.clip import Clip

if TYPE_CHECKING:
    from wancli.plan.render_plan import Comparison, Plan
    from wancli.plan.shot import Shot


def select_baseline(clips: Sequence[Clip], requested: str | None) -> Clip:
    """Return the baseline: the first clip, or the one with this id or number, from 0. Raises JobError."""
    if requested is None:
        return clips[0]
    for candidate in clips:
        if candidate.id == requested:
            return candidate
    if requested.isdecimal() and int(requested) < len(clips):
        return clips[int(requested)]
    ids = ", ".join(one.id for one in clips[:8])
    raise JobError(
        f"{requested!r} is none of the videos", where="--baseline", hint=f"0 to {len(clips) - 1}, or {ids}"
    )


def measure_document(
    clips: Sequence[Clip],
    baseline: Clip,
    baselines: Mapping[str, Clip],
    context: RenderContext,
    job: str | None = None,
) -> JsonObject:
    """Measure every clip against its baseline, which `baselines` has by the clip's id; a clip without one is
    compared with nothing. `baseline` is the first. Raises FfmpegError, and Stopped between two videos."""
    shots = []
    with context.progress.phase("compare", [one.id for one in clips], len(clips)) as bar:
        for shot in comparison_metrics.measure_clips(clips, baselines):
            shots.append(shot)
            bar.advance()
            _raise_if_stopped(context)
    return {
        "schema": SCHEMA,
        "job": job,
        "baseline": baseline.id,
        "shots": shots,
        "sheet": None,
        "video": None,
    }


def _raise_if_stopped(context: RenderContext) -> None:
    if context.stop.reason:  # that enough shots failed ends rendering alone
        raise context.stop.error("shots are done, comparing them is not")


def arrange_clips(clips: Sequence[Clip], axes: Sequence[str]) -> Grid:
    """Arrange clips by labels of their manifests. Raises JobError for a label that no clip has."""
    labels = {one.id: one.manifest_body.shot.labels if one.manifest_body else {} for one in clips}
    require_axes(axes, [*labels.values()], "--by")
    return arrange(clips, labels, axes)


def write_outputs(document: JsonObject, outputs: OutputFiles, context: RenderContext) -> None:
    """Write the sheets and the videos. Raises FfmpegError, NoSpace, MachineError, and Stopped between two."""
    ids = [shot["id"] for shot in document["shots"]]
    captions, short_captions = (
        dict(zip(ids, comparison_metrics.format_captions(document, name_baseline=named)))
        for named in (True, False)
    )
    with context.progress.phase("draw", ids, len(outputs.paths)) as bar:
        for file in outputs.sheets:
            if file.grid:
                sheet = grid_sheet.draw_grid_sheet(file.grid, short_captions)
            else:
                sheet = contact_sheet.draw_contact_sheet(file.clips, [captions[one.id] for one in file.clips])
            contact_sheet.write(file.path, sheet)
            bar.advance()
        for file in outputs.videos:
            _raise_if_stopped(context)
            side_by_side.write(
                file.path, file.clips, [short_captions[one.id] for one in file.clips], file.grid
            )
            bar.advance()


def run_comparison(plan: Plan, context: RenderContext) -> None:
    """Compare the finished shots of a job, if it asks for that. An error is a warning and fails no shot.

    Raises Stopped after a stop request."""
    if plan.comparison is None:
        return
    try:
        _compare_shots(plan, plan.comparison, context)
    except Stopped:
        raise
    except WancliError as error:
        context.progress.warn(f"not compared: {error}")


def _compare_shots(plan: Plan, wanted: Comparison, context: RenderContext) -> None:
    finished = {
        shot.id: shot
        for shot in plan.all_shots
        if shot.id in wanted.baselines and manifest.is_done(shot.output, shot.key)
    }
    done = [shot for shot in finished.values() if wanted.baselines[shot.id] in (None, *finished)]
    _warn_missing_baselines(finished, wanted, context)
    if not done:
        return
    if missing := len(wanted.baselines) - len(finished):
        context.progress.warn(f"{missing} of {len(wanted.baselines)} shots are not done, and not compared")
    path = plan.sidecar_path("compare.json")
    shown_before = earlier_shots.read_earlier_comparison(path)
    earlier = earlier_shots.earlier_clips(path, shown_before, plan.all_shots)
    labels = {shot.id: shot.labels for shot in done} | {one.id: one.record.shot.labels for one in earlier}
    axes = find_axes([*labels.values()])
    key = _comparison_key(done, wanted, earlier, axes)
    if _is_current(path, key):
        return
    # A manifest may be of a time when the shot had another id.
    ids = [*(shot.id for shot in done), *(one.id for one in earlier)]
    videos = [*(shot.output for shot in done), *(one.output for one in earlier)]
    clips = [replace(one, id=id) for one, id in zip(clip.read_clips(videos), ids, strict=True)]
    by_id = {one.id: one for one in clips}
    pairs = {id: wanted.baselines[id] for id in ids[: len(done)]} | {one.id: one.baseline for one in earlier}
    baselines = {id: by_id[other] for id, other in pairs.items() if other in by_id}
    clips = _move_baselines_ahead(clips, baselines)
    baseline = by_id.get(wanted.default_baseline, next(iter(baselines.values()), clips[0]))
    png, mp4 = path.with_suffix(".png"), path.with_suffix(".mp4")
    outputs = [shot.output for shot in plan.all_shots]
    files = plan_outputs(
        clips,
        baselines,
        png if wanted.sheet else None,
        mp4 if wanted.video else None,
        outputs,
        arrange(clips, labels, axes) if axes else None,
    )
    document = measure_document(clips, baseline, baselines, context, plan.name)
    write_outputs(document, files, context)
    for shot in document["shots"]:
        shot["output"] = Path(os.path.relpath(shot["output"], path.parent)).as_posix()
    document |= {
        "sheet": png.name if wanted.sheet else None,
        "video": mp4.name if wanted.video else None,
        "key": key,
        "files": [manifest.file_record(one, path.parent) for one in files.paths],
    }
    _write_document(path, document)
    _remove_old_pieces(path, shown_before, files.paths)
    count = f"{len(done)} of {len(wanted.baselines)} shots"
    count += f", and {len(earlier)} of earlier runs of this job that are still there" if earlier else ""
    context.progress.note(f"compared {count}: {', '.join(str(one) for one in (path, *files.paths))}")


def _remove_old_pieces(path: Path, earlier: ComparisonRecord | None, paths: Sequence[Path]) -> None:
    """Remove the sheets and videos of an earlier comparison that the new one does not have, unless somebody
    changed them since."""
    for file in earlier.files if earlier else []:
        piece = path.parent / file.path
        try:
            if piece not in paths and disk.is_file(piece) and disk.sha256(piece) == file.sha256:
                atomic.remove(piece)
        except (Unreadable, NoSuchFile):
            continue


def _move_baselines_ahead(clips: Sequence[Clip], baselines: Mapping[str, Clip]) -> list[Clip]:
    """Return the clips in their order, but each baseline before the first clip that is compared with it."""
    pairs = [(baselines.get(one.id, one), one) for one in clips]
    return list({clip.id: clip for pair in pairs for clip in pair}.values())


def _warn_missing_baselines(finished: Mapping[str, Shot], wanted: Comparison, context: RenderContext) -> None:
    """Warn once of all baselines that are not done although their shots are."""
    baselines = [wanted.baselines[id] for id in finished] or [wanted.default_baseline]
    absent = list(dict.fromkeys(id for id in baselines if id not in (None, *finished)))
    if len(absent) == 1:
        context.progress.warn(f"not compared: the baseline, shot {absent[0]}, is not done")
    elif absent:
        count = sum(id in absent for id in baselines)
        which = f"{absent[0]} and {len(absent) - 1:,} more"
        context.progress.warn(f"{count:,} shots are not compared: their baselines, {which}, are not done")


def _write_document(path: Path, document: JsonObject) -> None:
    """Write the document over an earlier one. Another file of that name moves aside."""
    text = json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n"
    sidecars.write_sidecar(path, text.encode(errors="backslashreplace"), SCHEMA.encode(), 100)


def _comparison_key(
    shots: Sequence[Shot],
    wanted: Comparison,
    earlier: Sequence[earlier_shots.EarlierClip],
    axes: Sequence[str],
) -> str:
    """Hash everything that a comparison of finished shots depends on."""
    records = [manifest.read(shot.manifest) for shot in shots]
    files = [[file.as_dict() for file in record.files] if record else [] for record in records]
    videos = [[shot.id, listed, disk.exists(shot.latents)] for shot, listed in zip(shots, files)]
    requested = [[wanted.baselines[shot.id] for shot in shots], wanted.sheet, wanted.video, [*axes]]
    more = [[one.id, one.baseline, [file.as_dict() for file in one.record.files]] for one in earlier]
    made_of = [SCHEMA, __version__, requested, videos, *([more] if more else [])]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def _is_current(path: Path, key: str) -> bool:
    """Return whether the comparison with this key exists and all its files are intact."""
    try:
        found = sidecars.read_document(path, SCHEMA, ComparisonRecord)
        return (
            found is not None
            and found.key == key
            and all(disk.sha256(path.parent / file.path) == file.sha256 for file in found.files)
        )
    except (Unreadable, EntryError):
        return False
