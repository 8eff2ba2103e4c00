"""The prompts and pictures of a shot as typed data of its record."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import Field

from wancli.storage.schema import Count, Data, Index, PathText, Positive


class PromptRecord(Data):
    """A text as the encoder read it; `cached` if its embedding had been computed before."""

    id: str
    text: str
    tokens: Count
    pieces: list[str] = Field(default_factory=list)
    max_tokens: Positive = 256
    truncated: bool
    file: PathText | None
    index: Index = 0
    cached: bool


class SegmentRecord(Data):
    """Frames of a video, first and last included, and what blocks read there; see
    `injection.timeline.Segment`.
    """

    frames: tuple[Count, Count]
    id: str
    text: str
    rows: tuple[Count, Count] | None = None


class TimelineRecord(Data):
    """A prompt that changes over the frames; `fade` frames around each border mix two segments."""

    segments: Annotated[tuple[SegmentRecord, ...], Field(min_length=2)]
    blend: Literal["cut", "crossfade", "relay"]
    fade: Count = 0
    common: str = ""

    @property
    def text(self) -> str:
        """The texts of all segments, for people."""
        texts = " | ".join(segment.text for segment in self.segments)
        return f"{self.common} {texts}" if self.common else texts


class LinkRecord(Data):
    """The frame of another shot's video."""

    shot: str
    frame: Count


class InjectedPictureRecord(Data):
    """A picture that blocks read. `sha256`, `width` and `height` are of its decoded pixels. `cached`: it had
    been encoded before.
    """

    path: PathText
    sha256: str
    width: Positive
    height: Positive
    preprocess: str
    orient: str
    alpha: str
    cached: bool

    @property
    def name(self) -> str:
        """The name of the file."""
        return PurePath(self.path).name


class PictureRecord(InjectedPictureRecord):
    """A picture as a frame of the video.

    With a `link` it is a frame of another shot's video: `sha256` covers what that is made from, and
    `pixels_sha256` is that of its pixels. Of pixels with a `crop` the middle of that width and height was
    taken first, with grey around what is smaller.
    """

    role: Literal["first", "last"]
    fit: str
    link: LinkRecord | None = None
    pixels_sha256: str | None = None
    crop: tuple[Positive, Positive] | None = None

    @property
    def pixels_key(self) -> str:
        """What the pixels were planned by."""
        return f"{self.sha256} {self.crop[0]}x{self.crop[1]}" if self.crop else self.sha256

    @property
    def name(self) -> str:
        """The name of the file, or which frame of which shot it is."""
        if self.link:
            return f"frame {self.link.frame} of shot {self.link.shot}"
        return super().name


def describe_injected(other: PromptRecord | InjectedPictureRecord) -> str:
    """Return the text of a prompt, or the name of a picture."""
    return other.text if isinstance(other, PromptRecord) else other.name
