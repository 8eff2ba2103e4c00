"""Files that grow over several runs: downloads that resume.

A partial file keeps what a run wrote, however that run ended. It gets its final name only when it is
complete, durably and atomically.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from wancli.storage import atomic, disk


@contextmanager
def appending(path: Path) -> Iterator[BinaryIO]:
    """Open a file to continue it at its end; it and its folder are created if missing.

    What the block wrote stays if the block fails. Raises NoSpace or MachineError.
    """
    with atomic.writing(path):
        atomic.make_folder(path.parent)
        fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o666)
        with os.fdopen(fd, "ab") as file:
            yield file


def complete(partial: Path, final: Path) -> None:
    """Give a partial file its final name in the same folder; it survives power loss then."""
    with atomic.writing(final):
        atomic.sync(partial)
        partial.replace(final)
        atomic.sync(final.parent)


def link(target: Path, name: Path) -> None:
    """Make `name` a relative link to `target`, replacing an old link; its folder is created if missing.

    On a file system without links the target gets that name instead.
    """
    with atomic.writing(name):
        atomic.make_folder(name.parent)
        atomic.remove(name)
        try:
            name.symlink_to(os.path.relpath(target, name.parent))
        except PermissionError:
            if disk.is_taken(name):
                raise
            target.rename(name)
        atomic.sync(name.parent)
