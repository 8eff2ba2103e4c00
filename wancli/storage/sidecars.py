"""Files about outputs, beside them: pages, sheets, maps, tables. Those of ours are replaced, others kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wancli.storage import atomic


def write_sidecar(path: Path, data: bytes, marker: bytes, search_bytes: int) -> None:
    """Writes a file, over an earlier one of its kind; another file of that name is moved aside.

    The kind is told by a mark in the first bytes. Raises OutputExists where the name is that of a folder,
    NoSpace or MachineError.
    """
    if not has_marker(path, marker, search_bytes):
        atomic.move_aside(path)
    atomic.replace(path, data)


def has_marker(path: Path, marker: bytes, search_bytes: int) -> bool:
    """Whether a file that can be read has this mark in its first bytes."""
    try:
        with path.open("rb") as file:
            return marker in file.read(search_bytes)
    except OSError:
        return False


def read_document(path: Path, schema: str) -> dict[str, Any] | None:
    """The JSON object in a file that says it is of this schema; None for anything else."""
    try:
        document = json.loads(path.read_bytes())
        return document if document["schema"] == schema else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
