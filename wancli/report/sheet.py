"""The contact sheet: one strip per video, from its first frame to its last, under its name. A PNG.

Letters: Y rows, X columns, 3 colours; pictures are uint8 [Y, X, 3].
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from wancli import files, manifest, video
from wancli.errors import JobError
from wancli.report import font
from wancli.report.terminal import ranges

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Picture: TypeAlias = NDArray[np.uint8]

FRAMES = 5
CELL = 160  # columns of a frame at most; smaller ones are shown as a whole multiple
GAP = 8
MARK = b"Software\0wancli"
PAPER, INK = 250, 40


def contact_sheet(videos: Sequence[Path]) -> bytes:
    """The PNG. Raises JobError for a file that is not there, FfmpegError for one that does not decode."""
    import numpy as np

    if missing := [str(path) for path in videos if not path.is_file()]:
        raise JobError("no such file", where=", ".join(missing))
    strips = [_strip(path) for path in videos]
    width = max(strip.shape[1] for strip in strips)
    parts = []
    for path, strip in zip(videos, strips, strict=True):
        parts += [_label(label, width) for label in _labels(path)]
        parts.append(_padded(strip, width))
    sheet = np.full((sum(len(p) + GAP for p in parts) + GAP, width + 2 * GAP, 3), PAPER, dtype=np.uint8)
    top = GAP
    for part in parts:
        sheet[top : top + len(part), GAP : GAP + width] = part
        top += len(part) + GAP
    return png(sheet)


def write(path: Path, data: bytes) -> None:
    """Puts a sheet there. An earlier sheet is replaced; another file of that name is moved aside."""
    if path.exists() and MARK not in path.read_bytes()[:128]:
        files.set_aside(path)
    files.replace(path, data)


def png(picture_YX3: Picture) -> bytes:
    """The file of a picture. https://www.w3.org/TR/png/"""
    height, width, _ = picture_YX3.shape
    lines = b"".join(b"\0" + row.tobytes() for row in picture_YX3)  # 0: no filter

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    parts = ((b"IHDR", header), (b"tEXt", MARK), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)


def _strip(path: Path) -> Picture:
    """Frames from first to last, side by side."""
    import numpy as np

    count = video.count_frames(path)
    chosen = sorted({round(i * (count - 1) / (FRAMES - 1)) for i in range(FRAMES)})
    cells = [
        _fitted(np.frombuffer(frame.rgb, dtype=np.uint8).reshape(frame.height, frame.width, 3))
        for index, frame in enumerate(video.read_frames(path))
        if index in chosen
    ]
    between = np.full((len(cells[0]), GAP, 3), PAPER, dtype=np.uint8)
    return np.concatenate([part for cell in cells for part in (cell, between)][:-1], axis=1)


def _fitted(frame_YX3: Picture) -> Picture:
    """At most CELL columns: each pixel repeated, or squares of pixels averaged."""
    import numpy as np

    height, width, _ = frame_YX3.shape
    if width <= CELL:
        times = CELL // width
        return frame_YX3.repeat(times, axis=0).repeat(times, axis=1)
    step = -(-width // CELL)
    rows, columns = height // step, width // step
    squares = frame_YX3[: rows * step, : columns * step].reshape(rows, step, columns, step, 3)
    averaged: Picture = squares.mean(axis=(1, 3)).round().astype(np.uint8)
    return averaged


def _labels(path: Path) -> list[str]:
    """What the manifest beside a video says of it, else its name."""
    body = manifest.read(manifest.manifest_path(path))
    if body is None:
        return [path.stem]
    texts = {prompt["id"]: prompt["text"] for prompt in body["prompts"]}
    first = f"{body['shot']['id']}: {body['prompts'][0]['text']}"
    return [first, *(_rule(rule, texts) for rule in body["injection"])]


def _rule(rule: dict[str, Any], texts: dict[str, str]) -> str:
    blocks = ranges([int(block) for block in rule["blocks"]])
    return f"  blocks {blocks} read: {texts[rule['text']]}"


def _label(words: str, width: int) -> Picture:
    import numpy as np

    most = width // font.WIDTH
    ink_YX = font.text(words if len(words) <= most else words[: most - 3] + "...")
    label = np.full((font.HEIGHT, width, 3), PAPER, dtype=np.uint8)
    label[:, : ink_YX.shape[1]][ink_YX] = INK
    return label


def _padded(picture_YX3: Picture, width: int) -> Picture:
    import numpy as np

    out = np.full((len(picture_YX3), width, 3), PAPER, dtype=np.uint8)
    out[:, : picture_YX3.shape[1]] = picture_YX3
    return out
