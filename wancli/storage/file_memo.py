"""Remember what was computed from a file, for as long as the file keeps its path, size, inode and times."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from wancli.errors import MachineError, Unreadable
from wancli.storage import atomic, disk


def file_identity(path: Path) -> str:
    """Return a text that changes whenever the file behind the path may have changed; empty if it is gone."""
    real = disk.resolve(path)
    stat = disk.status(real)
    if stat is None:
        return ""
    return f"{real}|{stat.st_dev}|{stat.st_ino}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}"


def read_memo(path: Path) -> dict[str, Any]:
    """Read what is remembered; nothing if the memo is missing or damaged."""
    try:
        known = json.loads(disk.read_bytes(path))
    except (Unreadable, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def write_memo(path: Path, known: Mapping[str, Any]) -> None:
    """Write the memo. A folder that cannot be written costs only the work again."""
    with suppress(MachineError):
        atomic.replace(path, json.dumps(known, indent=1).encode())
