"""Which sheets and videos side by side a comparison writes, and what each of them shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wancli.errors import JobError
from wancli.storage import disk
from wancli.video import contact_sheet, side_by_side
from wancli.video.arrangement import Grid, split_grid
from wancli.video.clip import Clip


@dataclass(frozen=True)
class OutputFile:
    """A file and what it shows: clips in their order, or in the rows and columns of a grid."""

    path: Path
    clips: list[Clip]
    grid: Grid | None = None


@dataclass(frozen=True)
class OutputFiles:
    """The files of a comparison."""

    sheets: list[OutputFile]
    videos: list[OutputFile]

    @property
    def paths(self) -> list[Path]:
        return [file.path for file in (*self.sheets, *self.videos)]


def plan_outputs(
    clips: Sequence[Clip],
    baselines: Mapping[str, Clip],
    sheets: Path | None,
    videos: Path | None,
    reserved: Sequence[Path] = (),
    grid: Grid | None = None,
) -> OutputFiles:
    """Decide which sheets and videos side by side to write: one of each unless there are too many clips.

    With a `grid`, the files follow its rows and columns.

    Raises JobError if an output would replace a compared video or a `reserved` path."""
    outputs = OutputFiles(
        split_into_files(sheets, clips, baselines, contact_sheet.MAX_VIDEOS, grid) if sheets else [],
        split_into_files(videos, clips, baselines, side_by_side.MAX_VIDEOS, grid) if videos else [],
    )
    taken = {disk.resolve(path) for path in (*reserved, *(one.path for one in clips))}
    for path in outputs.paths:
        if disk.resolve(path) in taken:
            message = "is a video that is compared, or named twice"
            raise JobError(message, where=str(path), hint="Choose another name.")
        taken.add(disk.resolve(path))
    return outputs


def split_into_files(
    path: Path, clips: Sequence[Clip], baselines: Mapping[str, Clip], most: int, grid: Grid | None
) -> list[OutputFile]:
    """Divide clips among NAME.png, NAME-2.png and so on: at most `most` in a file, each with its baseline.

    A single file keeps the order of the clips. In several files, each baseline comes before its clips. A grid
    is divided between its rows, and repeats no baseline."""
    if grid:
        grids = split_grid(grid, most)
        return [OutputFile(name, part.clips, part) for name, part in zip(_number(path, len(grids)), grids)]
    if len(clips) <= most:
        return [OutputFile(path, [*clips])]
    parts: list[list[Clip]] = [[]]
    placed: set[str] = set()
    for one in clips:
        if one.id in placed:
            continue
        pair = {clip.id: clip for clip in (baselines.get(one.id, one), one)}
        wanted = [clip for clip in pair.values() if clip not in parts[-1]]
        if len(parts[-1]) + len(wanted) > most:
            parts.append([])
            wanted = [*pair.values()]
        parts[-1] += wanted
        placed |= pair.keys()
    return [OutputFile(name, part) for name, part in zip(_number(path, len(parts)), parts)]


def _number(path: Path, count: int) -> list[Path]:
    """Return NAME.png, NAME-2.png and so on."""
    return [path, *(path.with_stem(f"{path.stem}-{number}") for number in range(2, count + 1))]
