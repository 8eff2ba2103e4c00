"""The pictures of a shot, resolved: which pixels become its first and last frame, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wancli.pictures.read import Alpha, Orient, PictureFacts
from wancli.pictures.sizes import Method, Preprocessing, Size

CLIP_ROWS = 257  # of a picture


@dataclass(frozen=True)
class PictureFile:
    """A file, and the facts of its pixels when it was planned."""

    path: Path
    orient: Orient
    alpha: Alpha
    facts: PictureFacts
    crop: Size | None = None  # of the pixels, before anything else is done with them; see `crop_middle`

    @property
    def size(self) -> Size:
        return self.facts.size

    @property
    def pixels_key(self) -> str:
        return crop_key(self.facts.sha256, self.crop)

    @property
    def name(self) -> str:
        return self.path.name


def crop_key(sha256: str, crop: Sequence[int] | None) -> str:
    """Name pixels of this digest, after the crop if there is one."""
    return f"{sha256} {crop[0]}x{crop[1]}" if crop else sha256


@dataclass(frozen=True)
class LinkedFrame:
    """A frame of another shot's video, as it was before compression."""

    shot: int  # the index of the other shot
    id: str
    output: Path  # of the other shot
    frame: int
    size: Size
    pixels_key: str  # hash of all that the frame depends on

    @property
    def name(self) -> str:
        return f"frame {self.frame} of shot {self.id}"


@dataclass(frozen=True)
class GivenFrame:
    """A frame of a video that is given, and how it is made."""

    source: PictureFile | LinkedFrame
    how: Preprocessing

    @property
    def pixel_settings(self) -> tuple[str, str, str, int]:
        """All that changes the pixels of the frame, except the size of the video."""
        return (self.source.pixels_key, self.how.method, self.how.fit, self.how.stride)


@dataclass(frozen=True)
class ShotPictures:
    """The frames of a video that are given."""

    first: GivenFrame
    last: GivenFrame | None = None

    @property
    def frames(self) -> tuple[GivenFrame, ...]:
        return (self.first, self.last) if self.last else (self.first,)

    @property
    def files(self) -> tuple[PictureFile, ...]:
        return tuple(frame.source for frame in self.frames if isinstance(frame.source, PictureFile))

    @property
    def name(self) -> str:
        """The name of the first picture without its suffix, or the id of the shot that the frame is of."""
        source = self.first.source
        return source.path.stem if isinstance(source, PictureFile) else source.id

    @property
    def pixel_settings(self) -> tuple[tuple[str, str, str, int], ...]:
        """All that changes the pixels of the given frames, except the size of the video."""
        return tuple(frame.pixel_settings for frame in self.frames)


@dataclass(frozen=True)
class ClipPictures:
    """Pictures that CLIP reads together: the rows of all are one context of the blocks. `id` is its key."""

    id: str
    sources: tuple[PictureFile | LinkedFrame, ...]
    method: Method

    @property
    def rows(self) -> int:
        """The number of keys that the blocks keep for them."""
        return CLIP_ROWS * len(self.sources)


@dataclass(frozen=True)
class InjectedPicture:
    """A picture that chosen blocks read. A model that reads two pictures reads this one twice."""

    source: PictureFile
    read: ClipPictures

    @property
    def id(self) -> str:
        return self.read.id


@dataclass(frozen=True)
class Join:
    """One video of a chain. `shots` are indices; each but the first begins with the last frame before it."""

    path: Path
    shots: tuple[int, ...]
