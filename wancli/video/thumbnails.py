"""Create a small JPEG of each video for a page, once, and keep it under the video's digest."""

from __future__ import annotations

import base64
import re
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

from wancli.errors import EntryError, Unreadable, WancliError
from wancli.storage import atomic, records
from wancli.storage.manifest_schema import Manifest
from wancli.video import mp4


def thumbnail_uri(output: Path, record: Manifest, cache_dir: Path, *, create: bool) -> str | None:
    """Return the middle frame of a shot's video as a data URI, from `cache_dir` or, with `create`, made now.

    Returns None if there is none: a page does without.
    """
    digest = next((file.sha256 for file in record.files if file.path.endswith(".mp4")), "")
    if not re.fullmatch("[0-9a-f]{64}", digest):
        return None
    path = cache_dir / f"{digest[:32]}.jpg"
    try:
        return _data_uri(records.read(path, records.POSTER))
    except (Unreadable, EntryError):
        if not create:
            return None
    with suppress(WancliError):
        picture = mp4.extract_thumbnail(output, float(record.shot.frames // 2 / Fraction(record.shot.fps)))
        with suppress(WancliError):  # a folder that cannot be written costs the work again
            atomic.replace(path, picture)
        return _data_uri(picture)
    return None


def _data_uri(picture: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
