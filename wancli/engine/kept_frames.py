"""Frames before compression, kept as PNG beside a video for the shots that begin with them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from wancli.errors import EntryError, NoSuchFile, Unreadable
from wancli.plan.pictures import LinkedFrame
from wancli.storage import atomic, records

if TYPE_CHECKING:
    from wancli.pictures.read import Pixels
    from wancli.plan.shot import Shot

_KEY = "wancli frame"  # the text of the PNG that holds the key of the frame


def frame_path(output: Path, frame: int) -> Path:
    """Return the path of a kept frame of a video."""
    return output.with_suffix(f".frame{frame}.png")


def keep_frames(
    chunks: Iterable[memoryview], output: Path, size: tuple[int, int], keys: Mapping[int, str]
) -> Iterator[memoryview]:
    """Pass on chunks of RGB frames, and write the frames whose numbers have a key. Raises MachineError."""
    start = 0
    frame_bytes = size[0] * size[1] * 3
    for chunk in chunks:
        data = chunk.cast("B")
        count = len(data) // frame_bytes
        for number in range(start, start + count):
            if number in keys:
                at = (number - start) * frame_bytes
                _write(frame_path(output, number), bytes(data[at : at + frame_bytes]), size, keys[number])
        start += count
        yield chunk


def _write(path: Path, rgb: bytes, size: tuple[int, int], key: str) -> None:
    from PIL import Image, PngImagePlugin

    texts, file = PngImagePlugin.PngInfo(), io.BytesIO()
    texts.add_text(_KEY, key)
    Image.frombytes("RGB", size, rgb).save(file, "PNG", pnginfo=texts)
    atomic.replace(path, file.getvalue())


def lacks_frames(shot: Shot) -> bool:
    """Return whether a frame that other shots begin with is missing, damaged or of another video.

    Raises Unreadable if the disk does not tell.
    """
    size = (shot.width, shot.height)
    for frame in shot.kept_frames:
        try:
            load_frame(LinkedFrame(shot.index, shot.id, shot.output, frame, size, shot.frame_key(frame)))
        except EntryError:
            return True
    return False


def load_frame(link: LinkedFrame) -> Pixels:
    """Load the frame that a shot begins with. Raises EntryError if it is not the planned one."""
    import numpy as np
    from PIL import Image

    path = frame_path(link.output, link.frame)
    hint = f"Render shot {link.id}, too: it is decoded, or rendered again, for this frame."
    try:
        with Image.open(io.BytesIO(records.read(path, records.FRAME)), formats=["PNG"]) as image:
            image.load()
            key, size = image.info.get(_KEY), image.size
            pixels_YX3 = np.asarray(image.convert("RGB"))
    except NoSuchFile:
        message = f"frame {link.frame} of shot {link.id} not found"
        raise EntryError(message, where=str(path), hint=hint) from None
    except Unreadable:
        raise
    except Exception as error:  # decoders raise errors of many types for damaged files
        raise EntryError(f"is damaged: {error}", where=str(path), hint=hint) from None
    if key != link.pixels_key or size != link.size:
        raise EntryError(f"is not of shot {link.id} as it is planned now", where=str(path), hint=hint)
    return pixels_YX3
