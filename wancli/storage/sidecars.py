"""Files beside outputs that describe them: pages, sheets, maps, tables. Files of other programs are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wancli.storage import atomic


def write_sidecar(path: Path, data: bytes, marker: bytes, search_bytes: int) -> None:
    """Write a file over an earlier one of its kind; move another file of that name aside.

    A file is of this kind if `marker` is in its first `search_bytes` bytes. Raises OutputExists if a folder
    has the name, NoSpace or MachineError.
    """
    if not has_marker(path, marker, search_bytes):
        atomic.move_aside(path)
    atomic.replace(path, data)


def has_marker(path: Path, marker: bytes, search_bytes: int) -> bool:
    """Return whether a file can be read and has this marker in its first bytes."""
    try:
        with path.open("rb") as file:
            return marker in file.read(search_bytes)
    except OSError:
        return False


def read_document(path: Path, schema: str) -> dict[str, Any] | None:
    """Return the JSON object of a file if its "schema" is this one, None for anything else."""
    try:
        document = json.loads(path.read_bytes())
        return document if document["schema"] == schema else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
