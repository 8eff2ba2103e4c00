"""The metrics of videos against a baseline: the rows of JOB.compare.json, and captions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from wancli.engine.manifest_body import load_latent
from wancli.errors import EntryError, Unreadable
from wancli.report.comparison_areas import find_inside
from wancli.storage import disk, sidecars
from wancli.storage.report_schema import COMPARISON_SCHEMA as SCHEMA
from wancli.storage.report_schema import ComparisonRecord
from wancli.video import metrics
from wancli.video.clip import Clip

if TYPE_CHECKING:
    from wancli.report.comparison_areas import Inside

JsonObject: TypeAlias = dict[str, Any]
NO_BASELINE = "no figures: no shot differs in the injection alone"


def measure_clips(clips: Sequence[Clip], baselines: Mapping[str, Clip]) -> Iterator[JsonObject]:
    """Yield the row of each clip against its baseline, which `baselines` has by the clip's id; one without a
    baseline is compared with nothing.

    Baselines have rows too. A metric that cannot be measured is None, and `why` gives the reason. Raises
    FfmpegError."""
    motions: dict[str, float | None] = {}
    for one in clips:
        baseline = baselines.get(one.id)
        if baseline is None:
            yield _uncompared_row(one, metrics.measure_motion(one.read_pictures()))
            continue
        if baseline.id not in motions:
            motions[baseline.id] = metrics.measure_motion(baseline.read_pictures())
        baseline_motion = motions[baseline.id]
        yield (
            _baseline_row(one, baseline_motion)
            if one is baseline
            else _compared_row(one, baseline, baseline_motion)
        )


def read_comparison(path: Path) -> ComparisonRecord | None:
    """Read JOB.compare.json; None if it is not there. Raises EntryError if it is another document."""
    return sidecars.read_document(path, SCHEMA, ComparisonRecord)


def format_captions(document: JsonObject, *, name_baseline: bool) -> list[str]:
    """Format the caption of each video; it is empty if there is only one.

    With `name_baseline`, captions name the baseline if there are several.
    """
    shots = document["shots"]
    if len(shots) == 1:
        return [""]
    several = len({shot["baseline"] for shot in shots} - {None}) > 1
    return [_format_caption(shot, name_baseline and several) for shot in shots]


def _format_caption(shot: JsonObject, name_baseline: bool) -> str:
    is_baseline = shot["id"] == shot["baseline"]
    parts = ["baseline"] if is_baseline else []
    if shot["baseline"] is None:
        parts.append(NO_BASELINE)
    if not is_baseline and shot["identical"]:
        parts.append("identical")
    elif not is_baseline and shot["ssim"] is not None:
        parts.append(f"SSIM {shot['ssim']:.3f}")
        parts += [] if shot["psnr"] is None else [f"PSNR {shot['psnr']:.1f} dB"]
        if shot.get("psnr_inside") is not None and shot["psnr_outside"] is not None:
            parts.append(f"inside {shot['psnr_inside']:.1f}, outside {shot['psnr_outside']:.1f}")
    if not is_baseline and shot["latent_distance"] is not None:
        parts.append(f"latent {shot['latent_distance']:.3f}")
    if shot["motion"] is not None:
        parts.append(f"motion {shot['motion']:.2%}")
    if name_baseline and not is_baseline and shot["baseline"] is not None:
        parts.append(f"beside {shot['baseline']}")
    return "  ".join(parts)


def _uncompared_row(one: Clip, motion: float | None) -> JsonObject:
    why = dict.fromkeys(("latent_distance", "psnr", "ssim", "baseline_motion", "heatmap"), NO_BASELINE)
    if motion is None:
        why["motion"] = "a single frame"
    return {
        "id": one.id,
        "output": str(one.path),
        "baseline": None,
        "frames": one.info.frame_count,
        "identical": False,
        "latent_distance": None,
        "latent_from": None,
        "psnr": None,
        "ssim": None,
        "motion": _round(motion),
        "baseline_motion": None,
        "heatmap": None,
        "why": why,
    }


def _baseline_row(one: Clip, motion: float | None) -> JsonObject:
    why = {"psnr": "it is the baseline", "heatmap": "it is the baseline"}
    if motion is None:
        why |= {"motion": "a single frame", "baseline_motion": "a single frame"}
    return {
        "id": one.id,
        "output": str(one.path),
        "baseline": one.id,
        "frames": one.info.frame_count,
        "identical": True,
        "latent_distance": 0.0,
        "latent_from": None,
        "psnr": None,
        "ssim": 1.0,
        "motion": _round(motion),
        "baseline_motion": _round(motion),
        "heatmap": None,
        "why": why,
    }


def _compared_row(one: Clip, baseline: Clip, baseline_motion: float | None) -> JsonObject:
    inside = find_inside(one.manifest_body)
    like, motion = _compare_pixels(one, baseline, inside)
    distance, source = _latent_distance(one, baseline)
    why = {} if distance is not None else {"latent_distance": source}
    if motion is None:
        why["motion"] = "a single frame"
    if baseline_motion is None:
        why["baseline_motion"] = "a single frame"
    row: JsonObject = {
        "id": one.id,
        "output": str(one.path),
        "baseline": baseline.id,
        "frames": min(one.info.frame_count, baseline.info.frame_count),
        "identical": False,
        "latent_distance": _round(distance),
        "latent_from": None if distance is None else source,
        "psnr": None,
        "ssim": None,
        "motion": _round(motion),
        "baseline_motion": _round(baseline_motion),
        "heatmap": None,
        "why": why,
    }
    if like is None:
        sizes = " beside ".join(f"{width}x{height}" for width, height in (one.size, baseline.size))
        why |= dict.fromkeys(("psnr", "ssim", "heatmap"), sizes)
        return row
    if like.psnr is None:
        why["psnr"] = "no pixel differs"
    if like.ssim is None:
        why["ssim"] = f"smaller than {metrics.WINDOW}x{metrics.WINDOW}"
    height, width = like.heatmap_YX.shape
    if inside:
        row |= {"psnr_inside": _round(like.psnr_inside), "psnr_outside": _round(like.psnr_outside)}
        why |= {key: "no pixel differs there" for key in ("psnr_inside", "psnr_outside") if row[key] is None}
    return row | {
        "identical": like.identical and one.info.frame_count == baseline.info.frame_count,
        "psnr": _round(like.psnr),
        "ssim": _round(like.ssim),
        "heatmap": {
            "width": width,
            "height": height,
            "values": [round(float(value), 3) for value in like.heatmap_YX.ravel()],
        },
    }


def _compare_pixels(
    one: Clip, baseline: Clip, inside: Inside | None
) -> tuple[metrics.FrameMetrics | None, float | None]:
    """Decode a clip once: compare it with a baseline of its size, and measure its motion."""
    meter = metrics.MotionMeter()
    frames = meter.watch(one.read_pictures())
    like = None
    if one.size == baseline.size:
        like = metrics.compare_frames(zip(frames, baseline.read_pictures()), inside)
    for _ in frames:  # those that the baseline does not have
        pass
    return like, meter.mean


def _latent_distance(one: Clip, baseline: Clip) -> tuple[float | None, str]:
    """Return the distance of two latents and its source, `latents` or `sketch`; or None and the reason."""
    bodies = [clip.manifest_body for clip in (one, baseline)]
    sketches = [body.latent for body in bodies if body and body.latent]
    if len(sketches) < 2:
        return None, "a video without a manifest that knows its latent"
    if sketches[0].shape != sketches[1].shape:
        return None, f"latents of {sketches[0].shape} and {sketches[1].shape}"
    stored = [_load_latent(clip) for clip in (one, baseline)]
    if stored[0] is not None and stored[1] is not None:
        distance, source = metrics.relative_distance(stored[0], stored[1]), "latents"
    else:
        distance = metrics.sketched_relative_distance(*(sketch.as_dict() for sketch in sketches))
        source = "sketch"
    if distance is None or not math.isfinite(distance):
        return None, "the latent of the baseline is zero, or one is not finite"
    return distance, source


def _load_latent(clip: Clip) -> Any:
    """Load the latent that a video was decoded from. Returns None if it does not exist any more."""
    if clip.manifest_body is None or not disk.exists(clip.latents_path):
        return None
    try:
        z_CTYX, record = load_latent(clip.latents_path)
    except (EntryError, Unreadable):
        return None
    return z_CTYX.numpy() if record.latents_key == clip.manifest_body.latents_key else None


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
