"""Files about outputs, beside them: pages, sheets, maps, tables. Those of ours are replaced, others kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wancli.storage import atomic


def put(path: Path, data: bytes, mark: bytes, within: int) -> None:
    """Writes a file, over an earlier one of its kind; another file of that name is moved aside.

    The kind is told by a mark in the first bytes. Raises OutputExists where the name is that of a folder,
    NoSpace or MachineError.
    """
    if not marked(path, mark, within):
        atomic.set_aside(path)
    atomic.replace(path, data)


def marked(path: Path, mark: bytes, within: int) -> bool:
    """Whether a file that can be read has this mark in its first bytes."""
    try:
        with path.open("rb") as file:
            return mark in file.read(within)
    except OSError:
        return False


def document(path: Path, schema: str) -> dict[str, Any] | None:
    """The JSON object in a file that says it is of this schema; None for anything else."""
    try:
        found = json.loads(path.read_bytes())
        return found if found["schema"] == schema else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
