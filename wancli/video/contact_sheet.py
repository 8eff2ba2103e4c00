"""The contact sheet: one strip per video, from its first frame to its last, under its name. A PNG.

Letters: Y rows, X columns, 3 colours; pictures are uint8 [Y, X, 3].
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from wancli.storage import sidecars
from wancli.storage.manifest_schema import RuleRecord
from wancli.units import format_ranges
from wancli.video import bitmap_font
from wancli.video.clip import Clip

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Picture: TypeAlias = NDArray[np.uint8]

FRAMES = 5
CELL = 160  # columns of a frame at most; smaller ones are shown as a whole multiple
PAGE = 60  # videos on a sheet
GAP = 8
MARK = b"Software\0wancli"
PAPER, INK = 250, 40


def contact_sheet(clips: Sequence[Clip], notes: Sequence[str]) -> bytes:
    """The PNG, with a line of figures for each video, in as many columns as make it about square. Raises
    FfmpegError for a video that does not decode."""
    strips = [_strip(clip) for clip in clips]
    width = max(strip.shape[1] for strip in strips)
    entries = [
        _stacked([*(_label(line, width) for line in _lines(clip, note)), _padded(strip, width)])
        for clip, note, strip in zip(clips, notes, strips, strict=True)
    ]
    height = sum(len(entry) for entry in entries)
    columns = max(1, round(math.sqrt(height / (width + GAP))))
    most = -(-len(entries) // columns)
    stacks = [_stacked(entries[at : at + most]) for at in range(0, len(entries), most)]
    return png(_beside(stacks))


def write(path: Path, data: bytes) -> None:
    """Puts a sheet there. An earlier sheet is replaced; another file of that name is moved aside."""
    sidecars.put(path, data, MARK, 128)


def png(picture_YX3: Picture) -> bytes:
    """The file of a picture. https://www.w3.org/TR/png/"""
    height, width, _ = picture_YX3.shape
    lines = b"".join(b"\0" + row.tobytes() for row in picture_YX3)  # 0: no filter

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    parts = ((b"IHDR", header), (b"tEXt", MARK), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)


def repeated(picture_YX3: Picture, times: int) -> Picture:
    """Each pixel as a square of `times` x `times`."""
    return picture_YX3.repeat(times, axis=0).repeat(times, axis=1)


def averaged(picture_YX3: Picture, step: int) -> Picture:
    """A pixel for each square of `step` x `step`; what is left over at the ends is cut off."""
    import numpy as np

    rows, columns = (max(1, length // step) for length in picture_YX3.shape[:2])
    whole_YX3 = picture_YX3[: rows * step, : columns * step]
    squares = whole_YX3.reshape(rows, len(whole_YX3) // rows, columns, -1, 3)
    means: Picture = squares.mean(axis=(1, 3)).round().astype(np.uint8)
    return means


def _strip(clip: Clip) -> Picture:
    """Frames from first to last, side by side."""
    import numpy as np

    last = clip.about.frames - 1
    chosen = sorted({round(i * last / (FRAMES - 1)) for i in range(FRAMES)})
    cells = [_fitted(picture) for index, picture in enumerate(clip.pictures()) if index in chosen]
    between = np.full((len(cells[0]), GAP, 3), PAPER, dtype=np.uint8)
    return np.concatenate([part for cell in cells for part in (cell, between)][:-1], axis=1)


def _fitted(picture_YX3: Picture) -> Picture:
    """At most CELL columns."""
    width = picture_YX3.shape[1]
    if width <= CELL:
        return repeated(picture_YX3, CELL // width)
    return averaged(picture_YX3, -(-width // CELL))


def _lines(clip: Clip, note: str) -> Iterator[str]:
    """What the manifest of a video says of it, else its name; then the figures."""
    if clip.record is None:
        yield clip.id
    else:
        yield f"{clip.id}: {clip.record.prompt.text}"
        rules = zip(clip.record.injection, clip.record.injected)
        yield from (_rule(rule, prompt.text) for rule, prompt in rules if any(rule.blocks.values()))
    if note:
        yield f"  {note}"


def _rule(rule: RuleRecord, text: str) -> str:
    blocks = format_ranges([*rule.blocks])
    strengths = sorted({f"{strength:g}" for strength in rule.blocks.values()}, key=float)
    strength = " to ".join(dict.fromkeys((strengths[0], strengths[-1])))
    return f"  blocks {blocks} at {strength} read: {text}"


def _label(words: str, width: int) -> Picture:
    import numpy as np

    ink_YX = bitmap_font.text(bitmap_font.cut(words, width // bitmap_font.WIDTH))
    label = np.full((bitmap_font.HEIGHT, width, 3), PAPER, dtype=np.uint8)
    label[:, : ink_YX.shape[1]][ink_YX] = INK
    return label


def _padded(picture_YX3: Picture, width: int) -> Picture:
    import numpy as np

    out = np.full((len(picture_YX3), width, 3), PAPER, dtype=np.uint8)
    out[:, : picture_YX3.shape[1]] = picture_YX3
    return out


def _stacked(parts: Iterable[Picture]) -> Picture:
    """Pictures of one width, a gap below each."""
    import numpy as np

    spaced = [np.pad(part, ((0, GAP), (0, 0), (0, 0)), constant_values=PAPER) for part in parts]
    return np.concatenate(spaced)


def _beside(stacks: Sequence[Picture]) -> Picture:
    """Stacks of one width on the page, with gaps around."""
    import numpy as np

    height, width = max(len(stack) for stack in stacks), stacks[0].shape[1]
    page = np.full((height + GAP, len(stacks) * (width + GAP) + GAP, 3), PAPER, dtype=np.uint8)
    for place, stack in enumerate(stacks):
        left = GAP + place * (width + GAP)
        page[GAP : GAP + len(stack), left : left + width] = stack
    return page
