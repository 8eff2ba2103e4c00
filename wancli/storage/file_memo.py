"""Remember what was computed from a file, for as long as the file keeps its path, size, inode and times."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from wancli.errors import EntryError, MachineError, Unreadable
from wancli.storage import atomic, disk, records


def file_identity(path: Path) -> str:
    """Return a text that changes whenever the file behind the path may have changed; empty if it is gone."""
    real = disk.resolve(path)
    stat = disk.status(real)
    if stat is None:
        return ""
    return f"{real}|{stat.st_dev}|{stat.st_ino}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}"


def read_memo(path: Path) -> dict[str, Any]:
    """Read what is remembered, by the identity of the file; nothing if the memo is missing or damaged.

    An entry that was not written for this file and this value is left out: it would make a job believe that
    its files have changed.
    """
    try:
        known = records.read_json(path, records.MEMO)
    except (EntryError, Unreadable):
        return {}
    entries = known.items() if isinstance(known, dict) else ()
    return {
        identity: entry["value"]
        for identity, entry in entries
        if isinstance(entry, dict) and entry == _seal(identity, entry.get("value"))
    }


def _seal(identity: str, value: Any) -> dict[str, Any]:
    """Bind a value to the file that it was computed from."""
    text = json.dumps([identity, value], sort_keys=True)
    return {"value": value, "seal": hashlib.sha256(text.encode()).hexdigest()[:16]}


def write_memo(path: Path, known: Mapping[str, Any]) -> None:
    """Write the memo. A folder that cannot be written costs only the work again."""
    with suppress(MachineError):
        entries = {identity: _seal(identity, value) for identity, value in known.items()}
        atomic.replace(path, json.dumps(entries, indent=1).encode())
