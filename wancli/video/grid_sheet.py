"""Draw a contact sheet that follows the axes of a sweep: headings across and down, a video in each cell.

Letters: Y rows, X columns, 3 colours; pictures are uint8 [Y, X, 3].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, TypeAlias

from wancli.storage.prompt_schema import describe_injected
from wancli.video.arrangement import Grid
from wancli.video.clip import Clip
from wancli.video.contact_sheet import (
    CAPTION_GAP,
    FRAMES_PER_VIDEO,
    GAP,
    MAX_CELL_WIDTH,
    draw_frame_row,
    encode_png,
    pad_to_width,
)
from wancli.video.labels import LINE_HEIGHT, PAPER, draw_line, shorten_end, shorten_middle

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Picture: TypeAlias = NDArray[np.uint8]

MAX_WIDTH = 3200  # columns of the sheet; with more columns of videos, each shows fewer frames
SIDE = 150  # columns of the headings at the left
_RULE = 200  # brightness of the line above a group


def draw_grid_sheet(grid: Grid, notes: Mapping[str, str]) -> bytes:
    """Draw the PNG, with a line of notes for each video, by its id.

    Raises FfmpegError if a video does not decode.
    """
    import numpy as np

    room = (MAX_WIDTH - SIDE) // len(grid.columns)
    frames = max(1, min(FRAMES_PER_VIDEO, room // (MAX_CELL_WIDTH + 3)))
    strips = {clip.id: draw_frame_row(clip, frames) for clip in grid.clips}
    width = max(strip.shape[1] for strip in strips.values())
    height = max(strip.shape[0] for strip in strips.values())
    across = SIDE + len(grid.columns) * (width + GAP)
    bands = [_draw_text(line, across, 1) for line in _shared_lines(grid.clips)]
    if any(grid.columns):
        headings = [_draw_text(title, width, 1) for title in grid.columns]
        bands.append(_join([_blank(len(headings[0]), SIDE - GAP), *headings]))
    group = ""
    for row in grid.rows:
        if row.group != group:
            group = row.group
            bands += [np.full((1, across, 3), _RULE, np.uint8), _draw_text(group, across, 2)]
        cells = [_draw_cell(clip, strips, notes, width, height) for clip in row.clips]
        heading = _blank(len(cells[0]), SIDE - GAP)
        title = _draw_text(row.title, SIDE - GAP, 1)
        heading[: len(title)] = title
        bands.append(_join([heading, *cells]))
    parts = [
        np.pad(pad_to_width(band, across), ((0, GAP), (0, 0), (0, 0)), constant_values=PAPER)
        for band in bands
    ]
    return encode_png(np.pad(np.concatenate(parts), ((GAP, 0), (GAP, 0), (0, 0)), constant_values=PAPER))


def _shared_lines(clips: list[Clip]) -> Iterator[str]:
    """Yield what all videos have in common: the prompt, and the injected ones."""
    bodies = [clip.manifest_body for clip in clips if clip.manifest_body]
    prompts = {body.prompt_text for body in bodies}
    if len(prompts) == 1 and len(bodies) == len(clips):
        yield prompts.pop()
        injected = {tuple(map(describe_injected, body.injected)) for body in bodies if body.injected}
        if len(injected) == 1:
            yield "injected: " + "; ".join(injected.pop())


def _draw_cell(
    clip: Clip | None, strips: Mapping[str, Picture], notes: Mapping[str, str], width: int, height: int
) -> Picture:
    """Draw the frames of a video with its id and notes below; nothing for no video."""
    import numpy as np

    cell = _blank(height + 2 * LINE_HEIGHT + CAPTION_GAP, width)
    if clip is None:
        return cell
    strip = strips[clip.id]
    cell[: len(strip), : strip.shape[1]] = strip
    lines = [shorten_middle(clip.id, width), shorten_end(notes[clip.id], width)]
    cell[height + CAPTION_GAP :] = np.concatenate([draw_line(line, width) for line in lines])
    return cell


def _draw_text(text: str, width: int, scale: int) -> Picture:
    return draw_line(shorten_end(text, width, scale), width, scale)


def _join(pictures: list[Picture]) -> Picture:
    """Place pictures of one height in a row, with a gap after each."""
    import numpy as np

    return np.concatenate(
        [np.pad(part, ((0, 0), (0, GAP), (0, 0)), constant_values=PAPER) for part in pictures], axis=1
    )


def _blank(height: int, width: int) -> Picture:
    import numpy as np

    return np.full((height, width, 3), PAPER, np.uint8)
