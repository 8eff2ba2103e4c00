"""Read videos to compare, with the manifests beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from wancli.errors import EntryError, JobError
from wancli.storage import disk, manifest, sidecars
from wancli.storage.manifest_schema import Manifest
from wancli.units import pluralize
from wancli.video import mp4

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Clip:
    """A video file. `id` is the id of its shot, or the file name if there is no manifest."""

    path: Path
    id: str
    manifest_body: Manifest | None
    info: mp4.VideoInfo

    @property
    def latents_path(self) -> Path:
        return self.path.with_suffix(".latents.safetensors")

    @property
    def size(self) -> tuple[int, int]:
        """Return columns and rows."""
        return self.info.width, self.info.height

    def _other_frames(self, what: str) -> EntryError:
        width, height = self.size
        expected = f"{pluralize(self.info.frame_count, 'frame')} of {width}x{height}"
        return EntryError(f"{what}, where {expected} were expected", where=str(self.path))

    def read_pictures(self) -> Generator[Picture, None, None]:
        """Decode its frames, uint8 [Y, X, 3], one by one.

        Raises FfmpegError, and EntryError if they are others than its manifest says.
        """
        import numpy as np

        count = 0
        for frame in mp4.read_frames(self.path):
            if (frame.width, frame.height) != self.size:
                raise self._other_frames(f"a frame of {frame.width}x{frame.height}")
            count += 1
            yield np.frombuffer(frame.rgb, dtype=np.uint8).reshape(frame.height, frame.width, 3)
        if count != self.info.frame_count:
            raise self._other_frames(pluralize(count, "frame"))


def read_clips(paths: Sequence[Path]) -> list[Clip]:
    """Return videos under unique ids. A video is decoded once, unless the manifest of this file describes it.

    Raises JobError if a file does not exist, is not an MP4 or has no frame, FfmpegError if it does not
    decode, EntryError if its manifest is damaged.
    """
    if missing := [str(path) for path in paths if not disk.is_file(path)]:
        raise JobError("no such file", where=", ".join(missing))
    clips = [_read_clip(path) for path in paths]
    id_counts = Counter(clip.id for clip in clips)
    unique_clips = [clip if id_counts[clip.id] == 1 else replace(clip, id=str(clip.path)) for clip in clips]
    if duplicates := [id for id, count in Counter(clip.id for clip in unique_clips).items() if count > 1]:
        raise JobError("given twice", where=duplicates[0])
    return unique_clips


def _read_clip(path: Path) -> Clip:
    with disk.reading_for_job(str(path)):
        is_mp4 = sidecars.has_marker(path, b"ftyp", 8)
    if not is_mp4:
        hint = (
            "It takes MP4 files. `wancli decode` makes one from a latent, `wancli inspect` describes weights."
        )
        raise JobError("is not an MP4", where=str(path), hint=hint)
    body = manifest.read(manifest.manifest_path(path))
    if body and disk.sha256(path) not in [file.sha256 for file in body.files]:
        body = None  # another video under that name
    if body:  # whose frames were counted when they were written
        shot = body.shot
        return Clip(
            path, shot.id, body, mp4.VideoInfo(shot.frames, Fraction(shot.fps), shot.width, shot.height)
        )
    info = mp4.read_info(path)
    if not info.frame_count:
        raise JobError("has no frames", where=str(path))
    return Clip(path, path.stem, None, info)
