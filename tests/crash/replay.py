"""What a power cut would have left, worked out from a recording of the calls.

Two disks at the edges of what file systems promise. `Strict` has a file's bytes only as of its last fsync,
and a folder's names only as of the last fsync of the folder. `Eager` has every name at once, and bytes only
as of the last fsync, so that a renamed file that was not synced is empty, as ext4 did in 2009.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Disk:
    """What is durable. `names` are those of `Eager`, whole paths to inodes; `blobs` contents by inode."""

    home: Path
    blobs: dict[int, str] = field(default_factory=dict)
    folders: dict[str, dict[str, int]] = field(default_factory=dict)  # by path, as of the last fsync
    names: dict[str, int] = field(default_factory=dict)
    are_folders: set[int] = field(default_factory=set)

    def apply(self, call: dict[str, Any], *, syncs: bool = True) -> None:
        """One recorded call; without `syncs` a program that never calls fsync."""
        kind, where = call["kind"], call["path"].split(" ")
        if "failed" in call:
            return
        if kind in ("create", "mkdir"):
            self.names[where[0]] = call["inode"]
            self.blobs.pop(call["inode"], None)  # another file had that number before
            if kind == "mkdir":
                self.are_folders.add(call["inode"])
                self.folders.pop(where[0], None)
        elif kind == "link":
            self.names[where[1]] = self.names[where[0]]
        elif kind in ("replace", "rename"):
            self.names[where[1]] = self.names.pop(where[0])
        elif kind in ("unlink", "remove", "rmdir"):
            del self.names[where[0]]
        elif kind == "fsync" and syncs:
            if "entries" in call:
                self.folders[where[0]] = call["entries"]
            else:
                self.blobs[call["inode"]] = call["blob"]

    def strict(self, folder: str = "") -> Iterator[tuple[str, int]]:
        """Whole paths and inodes that only what was synced leaves."""
        folder = folder or str(self.home)
        for name, inode in self.folders.get(folder, {}).items():
            path = f"{folder}/{name}"
            if inode in self.are_folders:
                yield from self.strict(path)
            else:
                yield path, inode

    def eager(self) -> Iterator[tuple[str, int]]:
        """Whole paths and inodes if every name reached the disk."""
        return ((path, inode) for path, inode in self.names.items() if inode not in self.are_folders)

    def laid_out(self, found: Iterator[tuple[str, int]], blobs: Path, target: Path) -> None:
        """Puts these files under `target` as they are under `home`; what was not synced is empty."""
        for path, inode in found:
            copy = target / Path(path).relative_to(self.home)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((blobs / self.blobs[inode]).read_bytes() if inode in self.blobs else b"")


def reported_paths(log: Sequence[dict[str, Any]], until: int) -> list[str]:
    """The shots that a user was told were done in the first `until` lines."""
    return [Path(line["told"]).stem for line in log[:until] if "told" in line]
