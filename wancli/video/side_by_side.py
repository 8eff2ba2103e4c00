"""Write videos side by side to one MP4: a grid of cells, each under its name, brightness unchanged.

Cells have one size, that of the largest video; a smaller video is centred in its cell. All videos have one
scale: pixels are repeated if videos are tiny, squares of pixels are averaged if the grid would be too large.
Letters: Y rows, X columns, 3 colours; pictures are uint8 [Y, X, 3].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from wancli.storage import atomic, sidecars
from wancli.video import mp4
from wancli.video.arrangement import Grid
from wancli.video.clip import Clip
from wancli.video.contact_sheet import downscale, upscale
from wancli.video.labels import LINE_HEIGHT, PAPER, draw_line, shorten_end, shorten_middle

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Picture: TypeAlias = NDArray[np.uint8]

MAX_VIDEOS = 16  # videos in one
MAX_SIZE = (3840, 2160)  # columns and rows of the grid
MIN_CELL_WIDTH = 320  # columns of a cell, if whole multiples of a pixel allow it
ASPECT_RATIO = 16 / 9  # of the grid, approximately
GAP = 8
BAR_COLOUR = 0
COMMENT = "side by side by wancli"
_COMMENT_WITHIN = 1 << 22  # bytes: the header comes first


@dataclass(frozen=True)
class Layout:
    """Number of cells, their pixels without the label, the scale, and the lines and size of letters."""

    columns: int
    rows: int
    cell_width: int
    cell_height: int
    upscale_factor: int  # repetitions of each pixel
    downscale_factor: int  # or side of the square of pixels that is averaged
    label_lines: int
    letter_scale: int

    @property
    def label_height(self) -> int:
        return self.label_lines * LINE_HEIGHT * self.letter_scale + GAP

    @property
    def grid_size(self) -> tuple[int, int]:
        """Return columns and rows of the whole grid; even, because chroma has half the resolution."""
        width = self.columns * (self.cell_width + GAP) + GAP
        height = self.rows * (self.cell_height + self.label_height + GAP) + GAP
        return width + width % 2, height + height % 2


def write(path: Path, clips: Sequence[Clip], notes: Sequence[str], grid: Grid | None = None) -> None:
    """Write the MP4, with the first line of `notes` under each name. In a grid the values of the axes are the
    names, and with two axes or more its columns are those of the MP4.

    An earlier file of this kind is replaced, another file of that name is moved aside. The grid runs as fast
    as the fastest video and as long as the longest; the others hold their last frame.

    Raises FfmpegError, NoSpace, MachineError.
    """
    if grid and len(grid.rows) > len(grid.columns) > 1:
        grid = grid.with_groups_across
        note_by_id = {clip.id: note for clip, note in zip(clips, notes, strict=True)}
        clips, notes = grid.clips, [note_by_id[clip.id] for clip in grid.clips]
    columns = len(grid.columns) if grid and len(grid.columns) > 1 else None
    cells = [index for index, clip in enumerate(grid.cells) if clip] if grid else [*range(len(clips))]
    count_cells = len(grid.cells) if grid else len(clips)
    layout = choose_layout(clips, 2 if any(notes) else 1, columns, count_cells)
    names = [grid.titles[cell] for cell in cells] if grid else [clip.id for clip in clips]
    fps = max(clip.info.fps for clip in clips)
    count = max(math.ceil(clip.info.frame_count * fps / clip.info.fps) for clip in clips)

    def draw_pages() -> Iterator[bytes]:
        page_YX3 = draw_empty_grid(layout, names, notes, cells)
        for pictures in _synchronize(clips, fps, count):
            for place, picture_YX3 in zip(cells, pictures):
                if picture_YX3 is not None:
                    paste(page_YX3, layout, place, picture_YX3)
            yield page_YX3.tobytes()

    write_pages(path, draw_pages(), layout, fps, count, COMMENT)


def write_pages(
    path: Path, pages: Iterator[bytes], layout: Layout, fps: Fraction, count: int, comment: str
) -> None:
    """Write `count` pages of a grid to an MP4. An earlier file with this comment is replaced, another file of
    that name is moved aside.

    Raises FfmpegError, NoSpace, MachineError.
    """

    def draw_then_replace() -> Iterator[bytes]:
        yield from pages
        # The comment of an MP4 begins after four zeros. Looks only now, when the replacement is complete.
        if sidecars.has_marker(path, b"\0\0\0\0" + comment.encode(), _COMMENT_WITHIN):
            atomic.remove(path)
        atomic.move_aside(path)

    width, height = layout.grid_size
    mp4.write_mp4(
        draw_then_replace(),
        path,
        width=width,
        height=height,
        fps=fps,
        frame_count=count,
        crf=16,
        codec="h264",
        comment=comment,
    )


def choose_layout(
    clips: Sequence[Clip], label_lines: int, columns: int | None = None, cells: int | None = None
) -> Layout:
    """Choose the grid at the largest scale that fits: of these columns, or that which comes closest to 16:9.

    `cells` counts its cells if some of them are empty."""
    cells = cells or len(clips)
    width, height = max(clip.info.width for clip in clips), max(clip.info.height for clip in clips)

    def grid(columns: int, times: int, step: int) -> Layout:
        cell = (-(-width // step) * times, -(-height // step) * times)
        return Layout(
            columns,
            -(-cells // columns),
            *cell,
            times,
            step,
            label_lines,
            letter_scale=1 if cell[0] < 640 else 2,
        )

    def aspect_error(columns: int) -> float:
        layout = grid(columns, upscale_factor, 1)
        wide, high = layout.grid_size
        empty = layout.columns * layout.rows - cells
        return abs(math.log(wide / high / ASPECT_RATIO)) + 0.5 * empty / cells

    upscale_factor, downscale_factor = max(1, MIN_CELL_WIDTH // width), 1
    columns = columns or min(range(1, cells + 1), key=aspect_error)
    while downscale_factor < width and any(
        length > most
        for length, most in zip(grid(columns, upscale_factor, downscale_factor).grid_size, MAX_SIZE)
    ):
        upscale_factor, downscale_factor = (
            (upscale_factor - 1, 1) if upscale_factor > 1 else (1, downscale_factor + 1)
        )
    return grid(columns, upscale_factor, downscale_factor)


def _synchronize(clips: Sequence[Clip], fps: Fraction, count: int) -> Iterator[list[Picture | None]]:
    """Yield at each of `count` times the new picture of each video, None if it keeps its last one."""
    with ExitStack() as stack:
        streams = [stack.enter_context(closing(clip.read_pictures())) for clip in clips]
        shown = [-1] * len(clips)
        for tick in range(count):
            pictures: list[Picture | None] = []
            for index, (clip, stream) in enumerate(zip(clips, streams)):
                due = min(clip.info.frame_count - 1, int(tick * clip.info.fps / fps))
                picture = None
                while shown[index] < due:
                    picture = next(stream)
                    shown[index] += 1
                pictures.append(picture)
            yield pictures


def cell_origin(layout: Layout, index: int) -> tuple[int, int]:
    """Return the row and column at which a cell begins, with its label."""
    row, column = divmod(index, layout.columns)
    return GAP + row * (layout.cell_height + layout.label_height + GAP), GAP + column * (
        layout.cell_width + GAP
    )


def paste(page_YX3: Picture, layout: Layout, index: int, picture_YX3: Picture) -> None:
    """Paste a picture into the middle of its cell."""
    scaled = (
        upscale(picture_YX3, layout.upscale_factor)
        if layout.downscale_factor == 1
        else downscale(picture_YX3, layout.downscale_factor)
    )
    top, left = cell_origin(layout, index)
    top += layout.label_height + (layout.cell_height - scaled.shape[0]) // 2
    left += (layout.cell_width - scaled.shape[1]) // 2
    page_YX3[top : top + scaled.shape[0], left : left + scaled.shape[1]] = scaled


def draw_empty_grid(
    layout: Layout, names: Sequence[str], notes: Sequence[str], cells: Sequence[int] | None = None
) -> Picture:
    """Draw the grid with its labels and without pictures; `cells` are the places of the videos."""
    import numpy as np

    width, height = layout.grid_size
    page_YX3 = np.full((height, width, 3), PAPER, dtype=np.uint8)
    across, scale = layout.cell_width, layout.letter_scale
    for index, name, note in zip(cells or range(len(names)), names, notes, strict=True):
        top, left = cell_origin(layout, index)
        below = top + layout.label_height
        page_YX3[below : below + layout.cell_height, left : left + across] = BAR_COLOUR
        lines = [shorten_middle(name, across, scale), shorten_end(note, across, scale)]
        for number, text in enumerate(lines[: layout.label_lines]):
            strip = draw_line(text, across, scale)
            line_top = top + number * len(strip)
            page_YX3[line_top : line_top + len(strip), left : left + across] = strip
    return page_YX3
