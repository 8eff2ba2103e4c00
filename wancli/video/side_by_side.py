"""Videos side by side in one MP4: a grid of cells, each under its name. Nobody's brightness is touched.

Cells are of one size, that of the largest video; a smaller one stands in the middle of its cell. All are
shown at one scale: pixels repeated where they are tiny, squares of them averaged where the grid would be too
large.
Letters: Y rows, X columns, 3 colours; pictures are uint8 [Y, X, 3].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from wancli.storage import atomic, sidecars
from wancli.video import bitmap_font, mp4
from wancli.video.clip import Clip
from wancli.video.contact_sheet import INK, PAPER, averaged, repeated

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Picture: TypeAlias = NDArray[np.uint8]

GRID = 16  # videos in one
LARGEST = (3840, 2160)  # columns and rows of the grid
SMALLEST = 320  # columns of a cell, where whole multiples of a pixel allow it
SHAPE = 16 / 9  # that the grid comes close to
GAP = 8
BARS = 0
COMMENT = "side by side by wancli"
_MARK = b"\0\0\0\0" + COMMENT.encode()  # the comment of an MP4 begins after four zeros


@dataclass(frozen=True)
class Layout:
    """How many cells, their pixels without the label, the scale, and the lines and size of letters."""

    columns: int
    rows: int
    width: int
    height: int
    times: int  # each pixel is repeated so often
    step: int  # or a square of so many is averaged
    lines: int
    letters: int

    @property
    def label(self) -> int:
        return self.lines * bitmap_font.HEIGHT * self.letters + GAP

    @property
    def size(self) -> tuple[int, int]:
        """Of the whole, columns and rows; even, as the chroma of a video wants it."""
        width = self.columns * (self.width + GAP) + GAP
        height = self.rows * (self.height + self.label + GAP) + GAP
        return width + width % 2, height + height % 2


def write(path: Path, clips: Sequence[Clip], notes: Sequence[str]) -> None:
    """Puts the MP4 there, with the first line of `notes` under each name. An earlier one of this kind is
    replaced, another file of that name moves aside. It runs as fast as the fastest video and as long as the
    longest; the others hold their last frame.

    Raises FfmpegError, NoSpace, MachineError.
    """
    plan = layout(clips, lines=2 if any(notes) else 1)
    fps = max(clip.about.fps for clip in clips)
    count = max(math.ceil(clip.about.frames * fps / clip.about.fps - 1e-6) for clip in clips)
    width, height = plan.size

    def grids() -> Iterator[bytes]:
        page_YX3 = _page(plan, clips, notes)
        for pictures in _in_step(clips, fps, count):
            for place, picture_YX3 in enumerate(pictures):
                if picture_YX3 is not None:
                    _put(page_YX3, plan, place, picture_YX3)
            yield page_YX3.tobytes()
        if sidecars.marked(path, _MARK, 1 << 22):  # not before there is something to put in its place
            atomic.remove(path)
        atomic.set_aside(path)

    mp4.write_mp4(
        grids(),
        path,
        width=width,
        height=height,
        fps=fps,
        frame_count=count,
        crf=16,
        codec="h264",
        comment=COMMENT,
    )


def layout(clips: Sequence[Clip], lines: int) -> Layout:
    """The grid that comes closest to 16:9, at the largest scale that fits."""
    width, height = max(clip.about.width for clip in clips), max(clip.about.height for clip in clips)

    def grid(columns: int, times: int, step: int) -> Layout:
        cell = (-(-width // step) * times, -(-height // step) * times)
        return Layout(
            columns, -(-len(clips) // columns), *cell, times, step, lines, letters=1 if cell[0] < 640 else 2
        )

    def odd(columns: int) -> float:
        wide, high = grid(columns, times, 1).size
        return abs(math.log(wide / high / SHAPE))

    times, step = max(1, SMALLEST // width), 1
    columns = min(range(1, len(clips) + 1), key=odd)
    while step < width and any(
        length > most for length, most in zip(grid(columns, times, step).size, LARGEST)
    ):
        times, step = (times - 1, 1) if times > 1 else (1, step + 1)
    return grid(columns, times, step)


def _in_step(clips: Sequence[Clip], fps: float, count: int) -> Iterator[list[Picture | None]]:
    """At each of `count` times the picture that a video then begins to show; None where it keeps its last."""
    with ExitStack() as stack:
        streams = [stack.enter_context(closing(clip.pictures())) for clip in clips]
        shown = [-1] * len(clips)
        for now in range(count):
            pictures: list[Picture | None] = []
            for place, (clip, stream) in enumerate(zip(clips, streams)):
                due = min(clip.about.frames - 1, int(now * clip.about.fps / fps + 1e-6))
                picture = None
                while shown[place] < due:
                    picture = next(stream)
                    shown[place] += 1
                pictures.append(picture)
            yield pictures


def _corner(plan: Layout, place: int) -> tuple[int, int]:
    """Row and column where a cell begins, with its label."""
    row, column = divmod(place, plan.columns)
    return GAP + row * (plan.height + plan.label + GAP), GAP + column * (plan.width + GAP)


def _put(page_YX3: Picture, plan: Layout, place: int, picture_YX3: Picture) -> None:
    """A picture into the middle of its cell."""
    shown = repeated(picture_YX3, plan.times) if plan.step == 1 else averaged(picture_YX3, plan.step)
    top, left = _corner(plan, place)
    top += plan.label + (plan.height - shown.shape[0]) // 2
    left += (plan.width - shown.shape[1]) // 2
    page_YX3[top : top + shown.shape[0], left : left + shown.shape[1]] = shown


def _page(plan: Layout, clips: Sequence[Clip], notes: Sequence[str]) -> Picture:
    """The grid without pictures."""
    import numpy as np

    width, height = plan.size
    page_YX3 = np.full((height, width, 3), PAPER, dtype=np.uint8)
    letters = plan.width // (bitmap_font.WIDTH * plan.letters)
    for place, (clip, note) in enumerate(zip(clips, notes, strict=True)):
        top, left = _corner(plan, place)
        below = top + plan.label
        page_YX3[below : below + plan.height, left : left + plan.width] = BARS
        for line, words in enumerate(
            [bitmap_font.cut_middle(clip.id, letters), bitmap_font.cut(note, letters)]
        ):
            ink_YX = bitmap_font.text(words).repeat(plan.letters, axis=0).repeat(plan.letters, axis=1)
            high, wide = ink_YX.shape
            page_YX3[top + line * high :, left:][:high, :wide][ink_YX] = INK
    return page_YX3
