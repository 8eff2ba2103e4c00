"""A cache folder of sealed entries, one file each, under a key that hashes all inputs of the entry.

`get()` returns exactly the bytes that were `put()` under that key, or None: an entry that is
damaged, cut short, foreign, of another format version or filed under the wrong key is a miss, and
is kept as NAME.bad for inspection. A seal proves integrity, not origin, so a folder that others may
write to is refused. The cache is optional: if a `put()` fails, the work is done again next time.

An entry is magic, version, payload length, SHA-256, payload. The digest covers all of these and the key.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import stat
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from wancli.errors import EntryError, MachineError, Unreadable
from wancli.storage import atomic, disk, records

_MAGIC = b"\x89wancli\n"
_VERSION = 1
_HEADER = struct.Struct("<8sIQ32s")  # magic, version, payload length, SHA-256

log = logging.getLogger(__name__)


def seal(payload: bytes, key: str = "") -> bytes:
    """Wrap a payload so that `unseal()` notices any change to it, or another key."""
    start = _MAGIC + struct.pack("<IQ", _VERSION, len(payload))
    return start + _digest(start, payload, key) + payload


def unseal(data: bytes, key: str = "") -> bytes:
    """Return the payload of a sealed entry. Raises EntryError unless every byte is as `seal()` wrote it."""
    if len(data) < _HEADER.size or not data.startswith(_MAGIC):
        raise EntryError("not a sealed entry")
    _, version, length, digest = _HEADER.unpack_from(data)
    if version != _VERSION:
        raise EntryError(f"entry of format version {version}; this wancli reads {_VERSION}")
    payload = data[_HEADER.size :]
    if len(payload) != length:
        raise EntryError(f"entry of {len(payload)} bytes, but {length} were sealed")
    if _digest(data[: _HEADER.size - len(digest)], payload, key) != digest:
        raise EntryError("the seal does not match the content")
    return payload


def _digest(start: bytes, payload: bytes, key: str) -> bytes:
    hasher = hashlib.sha256(start)
    hasher.update(key.encode() + b"\0")
    hasher.update(payload)
    return hasher.digest()


@dataclass(frozen=True)
class Entry:
    """One file of a store: `bytes` is its size on disk, `mtime` when it was last written or read."""

    key: str
    bytes: int
    mtime: float
    path: Path


class Store:
    """The sealed entries under `root`, which the first `put()` creates for this user alone.

    Raises MachineError if `root` belongs to another user, or if others may write to it or replace it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._warned = False
        status, above = disk.status(root), disk.status(root.parent)
        if status:
            hint = f"chmod go-w {root}, or choose another folder with --cache-dir"
            if status.st_uid != os.geteuid():
                raise MachineError("the cache folder belongs to another user", where=str(root), hint=hint)
            if status.st_mode & 0o022:
                raise MachineError("others may write to the cache folder", where=str(root), hint=hint)
        if above and above.st_mode & 0o002 and not above.st_mode & stat.S_ISVTX:
            hint = f"chmod o-w {root.parent}, or choose another folder with --cache-dir"
            raise MachineError("anybody may replace the cache folder", where=str(root), hint=hint)

    def path(self, key: str) -> Path:
        """Return the path of the entry of a key, whether it exists or not. Keys are hex digits."""
        if not re.fullmatch(r"[0-9a-f]{8,}", key):
            raise ValueError(f"not a key: {key!r}")
        return self.root / key[:2] / f"{key}.entry"

    def has(self, key: str) -> bool:
        """Return whether there is an entry of a key that can be looked at. It is not verified."""
        try:
            return disk.exists(self.path(key))
        except Unreadable:
            return False

    def get(self, key: str) -> bytes | None:
        """Return the payload that was put under `key`, or None. Reading marks the entry as used."""
        path = self.path(key)
        try:
            if disk.is_link(path.parent):
                return None
            payload = read_entry(path, key)
        except Unreadable:
            return None  # not found, pruned meanwhile, stale handle, a link: all the same to the caller
        except EntryError as error:
            log.warning("%s: %s; kept as .bad, computed again", path, error.message)
            with suppress(OSError):
                path.replace(path.with_suffix(".bad"))
            return None
        with suppress(OSError):
            os.utime(path)
        return payload

    def put(self, key: str, payload: bytes) -> bool:
        """Keep a payload; return False, with one warning per store, if the disk does not take it."""
        path = self.path(key)
        try:
            with atomic.writing(self.root):
                self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if disk.is_link(path.parent):
                raise MachineError("a symbolic link leads out of the cache", where=str(path.parent))
            atomic.replace(path, seal(payload, key))
        except MachineError as error:
            if not self._warned:
                log.warning("continuing without the cache: %s", error)
                self._warned = True
            return False
        return True

    def entries(self) -> list[Entry]:
        """Return all entries, sorted by key, without reading or verifying them."""
        paths = [path for shard in self._shards() for path in disk.list_folder(shard)]
        return [
            Entry(path.stem, status.st_size, status.st_mtime, path)
            for path in paths
            if path.suffix == ".entry" and (status := disk.link_status(path))
        ]

    def _shards(self) -> list[Path]:
        return [path for path in disk.list_folder(self.root) if len(path.name) == 2 and disk.is_folder(path)]

    def verify(self) -> list[Entry]:
        """Return the entries that `get()` would not return. Changes nothing."""
        return [entry for entry in self.entries() if not _is_intact(entry)]

    def prune(self, max_bytes: int | None = None, older_than_days: float | None = None) -> list[Entry]:
        """Remove damaged entries, entries unused for so many days, and the longest unused beyond `max_bytes`.

        Also removes .bad files and the temporary files of dead processes. Returns the removed entries.
        """
        for shard in self._shards():
            atomic.remove_stale_temp_files(shard)
            for bad in disk.list_folder(shard):
                if bad.suffix == ".bad":
                    atomic.remove(bad)
        entries = sorted(self.entries(), key=lambda entry: entry.mtime)
        total = sum(entry.bytes for entry in entries)
        now = time.time()
        removed = []
        for entry in entries:
            too_old = older_than_days is not None and now - entry.mtime > older_than_days * 86400
            if too_old or (max_bytes is not None and total > max_bytes) or not _is_intact(entry):
                with atomic.writing(entry.path):
                    entry.path.unlink(missing_ok=True)
                total -= entry.bytes
                removed.append(entry)
        return removed


def read_entry(path: Path, key: str) -> bytes:
    """Return the payload of an entry. Raises Unreadable, and EntryError if it does not verify."""
    return unseal(records.read(path, records.CACHE_ENTRY, links=False), key)


def _is_intact(entry: Entry) -> bool:
    try:
        read_entry(entry.path, entry.key)
    except (Unreadable, EntryError):
        return False
    return True
