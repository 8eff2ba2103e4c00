"""Attention maps on disk: the numbers once a shot is sampled, the overlay once its video is made."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wancli.engine.context import RenderContext
from wancli.injection.attention_spec import AttentionSpec
from wancli.plan.shot import Shot
from wancli.storage import atomic, attention_file, disk, manifest
from wancli.storage.attention_file import AttentionFile
from wancli.storage.attention_schema import AttentionRecord, AttentionSpecRecord
from wancli.storage.manifest_schema import Manifest, ShotRecord
from wancli.video import heat_overlay
from wancli.video.mp4 import VideoInfo

if TYPE_CHECKING:
    from wancli.injection.attention_maps import AttentionMaps


def describe_spec(spec: AttentionSpec) -> dict[str, Any]:
    """Return the record of which maps there are."""
    return {
        "words": list(spec.words),
        "rows": [list(rows) for rows in spec.rows],
        "blocks": [{"label": group.label, "members": list(group.members)} for group in spec.blocks],
        "steps": [{"label": group.label, "members": list(group.members)} for group in spec.steps],
    }


def is_of(record: AttentionSpecRecord | None, spec: AttentionSpec) -> bool:
    """Return whether recorded maps are those of a shot, however their groups were written."""
    return record is not None and (
        tuple(record.words) == spec.words
        and tuple(map(tuple, record.rows)) == spec.rows
        and [group.members for group in record.blocks] == [[*group.members] for group in spec.blocks]
        and [group.members for group in record.steps] == [[*group.members] for group in spec.steps]
    )


def are_missing(shot: Shot, record: ShotRecord) -> bool:
    """Return whether the maps that a shot asks for are not all there as its record says. Hashes them."""
    if shot.attention is None:
        return False
    found = record.attention
    if found is None or not is_of(found, shot.attention):
        return True
    files = [found.maps, found.video] if isinstance(record, Manifest) else [found.maps]
    return any(file is None or any(manifest.check_file(shot.output.parent, file)) for file in files)


def find_problems(output: Path) -> list[manifest.Problem]:
    """Find what is wrong with the files of attention maps that the manifest of a video lists. Hashes them."""
    record = manifest.read_if_usable(manifest.manifest_path(output))
    if record is None or record.attention is None:
        return []
    files = (record.attention.maps, record.attention.video)
    return [problem for file in files if file for problem in manifest.check_file(output.parent, file)]


def write_maps(path: Path, maps: AttentionMaps, shot: Shot) -> dict[str, Any]:
    """Write the maps of a shot durably, and return their record. Another file of that name moves aside."""
    _, t, y, x = shot.latent_shape
    spec = maps.spec
    means_WGSL = maps.average().cpu()
    file = AttentionFile(
        means_WGSL.view(*means_WGSL.shape[:3], t, y // 2, x // 2).numpy(),
        spec.words,
        tuple(group.label for group in spec.blocks),
        tuple(group.label for group in spec.steps),
        {
            "prompt": shot.prompt.tokens.text,
            "pieces": list(shot.prompt.tokens.pieces),
            **describe_spec(spec),
        },
    )
    data = file.to_bytes()
    if disk.find_bytes(path) != data:
        atomic.move_aside(path)  # those of another render
        atomic.replace(path, data)
    return describe_spec(spec) | {"maps": manifest.file_record(path, path.parent)}


def write_overlay(record: ShotRecord, output: Path, context: RenderContext) -> AttentionRecord | None:
    """Write the overlay of a video with the maps that its latent was recorded with; return their record.

    Returns None, with a warning, if the maps are not beside the video any more.
    """
    found = record.attention
    assert found
    maps_path = output.with_name(found.maps.path)
    if problems := [*manifest.check_file(output.parent, found.maps)]:
        context.progress.warn(f"{problems[0]}; {output.name} has no attention maps")
        return None
    shot = record.shot
    info = VideoInfo(shot.frames, Fraction(shot.fps), shot.width, shot.height)
    path = draw_overlay(maps_path, output, info, output.with_suffix(".attention.mp4"))
    return AttentionRecord(**found.as_dict() | {"video": manifest.file_record(path, path.parent)})


def draw_overlay(maps: Path, video: Path, info: VideoInfo, path: Path) -> Path:
    """Draw the maps of a file over their video, each word in the mean over all groups, and return `path`."""
    file = attention_file.read(maps)
    heat_overlay.write(path, video, info, file.maps_WGSTYX.mean(axis=(1, 2)), file.words)
    return path
