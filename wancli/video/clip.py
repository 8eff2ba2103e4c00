"""A video that is compared, and what the manifest beside it says it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from wancli.errors import JobError
from wancli.storage import atomic, manifest, sidecars
from wancli.storage.manifest_schema import Manifest
from wancli.video import mp4

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Clip:
    """`id` is the shot's, or the name of a file without a manifest; `record` the body of the manifest."""

    path: Path
    id: str
    record: Manifest | None
    about: mp4.About

    @property
    def latents(self) -> Path:
        return self.path.with_suffix(".latents.safetensors")

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows."""
        return self.about.width, self.about.height

    def pictures(self) -> Generator[Picture, None, None]:
        """Its frames, uint8 [Y, X, 3], one by one. Raises FfmpegError."""
        import numpy as np

        for frame in mp4.read_frames(self.path):
            yield np.frombuffer(frame.rgb, dtype=np.uint8).reshape(frame.height, frame.width, 3)


def read(paths: Sequence[Path]) -> list[Clip]:
    """The videos, each decoded once, under ids that differ.

    Raises JobError for files that are not there, are no MP4 or hold no frame, FfmpegError for one that does
    not decode, EntryError for a damaged manifest.
    """
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise JobError("no such file", where=", ".join(missing))
    clips = [_read(path) for path in paths]
    times = Counter(clip.id for clip in clips)
    named = [clip if times[clip.id] == 1 else replace(clip, id=str(clip.path)) for clip in clips]
    if twice := [id for id, count in Counter(clip.id for clip in named).items() if count > 1]:
        raise JobError("named twice", where=twice[0])
    return named


def _read(path: Path) -> Clip:
    if not sidecars.marked(path, b"ftyp", 8):
        hint = "It takes MP4 files. `wancli decode` makes one of a latent, `wancli inspect` tells of weights."
        raise JobError("is no MP4", where=str(path), hint=hint)
    record = manifest.read(manifest.manifest_path(path))
    if record and atomic.sha256(path) not in [file.sha256 for file in record.files]:
        record = None  # another video under that name
    about = mp4.about(path)
    if not about.frames:
        raise JobError("has no frames", where=str(path))
    return Clip(path, record.shot.id if record else path.stem, record, about)
