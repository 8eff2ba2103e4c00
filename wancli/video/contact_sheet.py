"""Draw a contact sheet as a PNG: for each video a row of frames, from first to last, under its name.

Letters: Y rows, X columns, 3 colours; pictures are uint8 [Y, X, 3].
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from wancli.storage import sidecars
from wancli.storage.injection_schema import RuleRecord
from wancli.storage.prompt_schema import describe_injected
from wancli.units import format_ranges
from wancli.video.clip import Clip
from wancli.video.labels import PAPER, draw_line, shorten_end

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Picture: TypeAlias = NDArray[np.uint8]

FRAMES_PER_VIDEO = 5
MAX_CELL_WIDTH = 160  # columns of a frame at most; smaller ones are shown as a whole multiple
MAX_VIDEOS = 60  # videos on a sheet
GAP = 16  # between two videos
FRAME_GAP = 3  # between two frames of a video
CAPTION_GAP = 4  # below a line
_SOFTWARE = ("Software", "wancli")  # of the PNG, a text that tells our sheets from other pictures
MARKER = "\0".join(_SOFTWARE).encode()


def draw_contact_sheet(clips: Sequence[Clip], notes: Sequence[str]) -> bytes:
    """Draw the PNG, with a line of notes for each video, in as many columns as make it about square.

    Raises FfmpegError if a video does not decode.
    """
    import numpy as np

    frame_rows = [draw_frame_row(clip) for clip in clips]
    width = max(strip.shape[1] for strip in frame_rows)
    entries = [
        _stack_vertically(
            [
                *(draw_line(shorten_end(line, width), width) for line in _caption_lines(clip, note)),
                pad_to_width(strip, width),
            ],
            GAP,
        )
        for clip, note, strip in zip(clips, notes, frame_rows, strict=True)
    ]
    height = sum(len(entry) for entry in entries)
    columns = max(1, round(math.sqrt(height / (width + GAP))))
    entries_per_column = -(-len(entries) // columns)
    sheet_columns = [
        np.concatenate(entries[at : at + entries_per_column])
        for at in range(0, len(entries), entries_per_column)
    ]
    return encode_png(_place_side_by_side(sheet_columns))


def write(path: Path, data: bytes) -> None:
    """Write a sheet over an earlier sheet; move another file of that name aside."""
    sidecars.write_sidecar(path, data, MARKER, 128)


def encode_png(picture_YX3: Picture) -> bytes:
    """Encode a picture as PNG, with the text by which a later sheet recognises it."""
    from PIL import Image, PngImagePlugin

    texts, file = PngImagePlugin.PngInfo(), io.BytesIO()
    texts.add_text(*_SOFTWARE)
    Image.fromarray(picture_YX3).save(file, "PNG", pnginfo=texts)
    return file.getvalue()


def upscale(picture_YX3: Picture, factor: int) -> Picture:
    """Repeat each pixel as a square of `factor` x `factor`."""
    return picture_YX3.repeat(factor, axis=0).repeat(factor, axis=1)


def downscale(picture_YX3: Picture, factor: int) -> Picture:
    """Average each square of `factor` x `factor` to a pixel; at the ends, what is left of a square."""
    import numpy as np
    from PIL import Image

    return np.asarray(Image.fromarray(picture_YX3).reduce(factor))


def draw_frame_row(clip: Clip, count: int = FRAMES_PER_VIDEO) -> Picture:
    """Draw frames from first to last, side by side; the middle one if `count` is 1."""
    import numpy as np

    last = clip.info.frame_count - 1
    chosen = sorted({round(i * last / (count - 1)) for i in range(count)}) if count > 1 else [last // 2]
    cells = [_fit_to_cell(picture) for index, picture in enumerate(clip.read_pictures()) if index in chosen]
    gap = np.full((len(cells[0]), FRAME_GAP, 3), PAPER, dtype=np.uint8)
    return np.concatenate([part for cell in cells for part in (cell, gap)][:-1], axis=1)


def _fit_to_cell(picture_YX3: Picture) -> Picture:
    """Scale a picture to at most MAX_CELL_WIDTH columns."""
    width = picture_YX3.shape[1]
    if width <= MAX_CELL_WIDTH:
        return upscale(picture_YX3, MAX_CELL_WIDTH // width)
    return downscale(picture_YX3, -(-width // MAX_CELL_WIDTH))


def _caption_lines(clip: Clip, note: str) -> Iterator[str]:
    """Yield the lines above a video: its id, prompt and injections if it has a manifest, then the note."""
    if clip.manifest_body is None:
        yield clip.id
    else:
        yield f"{clip.id}: {clip.manifest_body.prompt_text}"
        if clip.manifest_body.pictures:
            yield "  from " + " and ".join(picture.name for picture in clip.manifest_body.pictures)
        rules = zip(clip.manifest_body.injection, clip.manifest_body.injected)
        yield from (
            _describe_rule(rule, describe_injected(other))
            for rule, other in rules
            if any(rule.blocks.values())
        )
    if note:
        yield f"  {note}"


def _describe_rule(rule: RuleRecord, text: str) -> str:
    blocks = format_ranges([*rule.blocks])
    strengths = sorted({f"{strength:g}" for strength in rule.blocks.values()}, key=float)
    strength = " to ".join(dict.fromkeys((strengths[0], strengths[-1])))
    return f"  blocks {blocks} at {strength} read: {text}"


def pad_to_width(picture_YX3: Picture, width: int) -> Picture:
    import numpy as np

    padded = np.full((len(picture_YX3), width, 3), PAPER, dtype=np.uint8)
    padded[:, : picture_YX3.shape[1]] = picture_YX3
    return padded


def _stack_vertically(pictures: Sequence[Picture], below: int) -> Picture:
    """Stack pictures of one width, with a small gap between them and `below` under the last."""
    import numpy as np

    gaps = [*[CAPTION_GAP] * (len(pictures) - 1), below]
    padded = [
        np.pad(part, ((0, gap), (0, 0), (0, 0)), constant_values=PAPER) for part, gap in zip(pictures, gaps)
    ]
    return np.concatenate(padded)


def _place_side_by_side(columns: Sequence[Picture]) -> Picture:
    """Place columns of one width on the page, with gaps around them."""
    import numpy as np

    height, width = max(len(stack) for stack in columns), columns[0].shape[1]
    page = np.full((height + GAP, len(columns) * (width + GAP) + GAP, 3), PAPER, dtype=np.uint8)
    for index, stack in enumerate(columns):
        left = GAP + index * (width + GAP)
        page[GAP : GAP + len(stack), left : left + width] = stack
    return page
