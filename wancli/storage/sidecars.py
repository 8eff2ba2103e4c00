"""Files beside outputs that describe them: pages, sheets, maps, tables. Files of other programs are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wancli.errors import NoSuchFile
from wancli.storage import atomic, disk


def write_sidecar(path: Path, data: bytes, marker: bytes, search_bytes: int) -> None:
    """Write a file over an earlier one of its kind; move another file of that name aside.

    A file is of this kind if `marker` is in its first `search_bytes` bytes. Raises OutputExists if a folder
    has the name, Unreadable if its kind cannot be told, NoSpace or MachineError.
    """
    if not has_marker(path, marker, search_bytes):
        atomic.move_aside(path)
    atomic.replace(path, data)


def has_marker(path: Path, marker: bytes, search_bytes: int) -> bool:
    """Return whether a file has this marker in its first bytes. Raises Unreadable."""
    try:
        with disk.opened(path) as file:
            return marker in file.read(search_bytes)
    except NoSuchFile:
        return False


def read_document(path: Path, schema: str) -> dict[str, Any] | None:
    """Return the JSON object of a file if its "schema" is this one, None for anything else.

    Raises Unreadable if the disk does not tell.
    """
    try:
        document = json.loads(disk.find_bytes(path) or b"")
        return document if document["schema"] == schema else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
