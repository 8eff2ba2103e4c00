"""Files beside outputs that describe them: pages, sheets, maps, tables. Files of other programs are kept."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TypeVar

from wancli.errors import EntryError, NoSuchFile, Unreadable
from wancli.storage import atomic, disk, records
from wancli.storage.schema import Data

log = logging.getLogger(__name__)

Form = TypeVar("Form", bound=Data)


def write_sidecar(path: Path, data: bytes, marker: bytes, search_bytes: int) -> None:
    """Write a file over an earlier one of its kind; move another file of that name aside.

    A file is of this kind if `marker` is in its first `search_bytes` bytes. Raises OutputExists if a folder
    has the name, NoSpace or MachineError.
    """
    try:
        if not has_marker(path, marker, search_bytes):
            atomic.move_aside(path)
    except Unreadable as error:
        set_aside_unread(path, error)
    atomic.replace(path, data)


def set_aside_unread(path: Path, why: Unreadable) -> None:
    """Move a file aside that cannot be read and may be of any kind, with a warning. Raises MachineError."""
    aside = atomic.move_aside(path, "unreadable")
    log.warning("wancli: %s; moved aside to %s", why, aside)


def has_marker(path: Path, marker: bytes, search_bytes: int) -> bool:
    """Return whether this is a plain file with this marker in its first bytes. Raises Unreadable."""
    if not disk.is_file(path):
        return False
    try:
        with disk.opened(path) as file:
            return marker in file.read(search_bytes)
    except NoSuchFile:
        return False


def read_document(path: Path, schema: str, form: type[Form]) -> Form | None:
    """Read a JSON record whose "schema" is this one. Returns None if there is no such file.

    Raises EntryError if the file is damaged, of another version, or another program's, and Unreadable if the
    disk does not tell.
    """
    document = records.read_json(path, form.KIND)
    if document is None:
        return None
    if not isinstance(document, dict) or document.get("schema") != schema:
        raise EntryError(f"not {schema}", where=str(path))
    return form.parse(document, path)
