"""Calls of `os` that fail for some paths: a private folder, a stale handle, a disk that is gone."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

READING = ("stat", "lstat", "scandir", "statvfs", "readlink")
CHANGING = ("link", "rename", "replace", "unlink", "mkdir", "rmdir", "utime")


def fail_reading(
    monkeypatch: pytest.MonkeyPatch,
    concerned: Callable[[Path], bool],
    error: str,
    calls: tuple[str, ...] = ("open",),
) -> None:
    """Let `open` for reading, or other calls, fail with an errno for the paths that are concerned."""
    _fail(monkeypatch, concerned, error, calls, writing=False)


def forbid(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make a folder one that this user may not enter, as for root none is."""
    _fail(
        monkeypatch,
        lambda path: folder in path.parents,
        "EACCES",
        ("open", *READING, *CHANGING),
        writing=True,
    )
    _fail(monkeypatch, lambda path: folder == path, "EACCES", ("open", "scandir"), writing=True)


def _fail(
    monkeypatch: pytest.MonkeyPatch,
    concerned: Callable[[Path], bool],
    error: str,
    calls: tuple[str, ...],
    *,
    writing: bool,
) -> None:
    number = getattr(errno, error)

    def failing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any = ".", *rest: Any, **options: Any) -> Any:
            changes = name == "open" and rest and rest[0] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            known = isinstance(path, str | os.PathLike)
            if known and not (changes and not writing) and concerned(Path.cwd() / path):
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *rest, **options)

        return call

    for name in calls:
        monkeypatch.setattr(os, name, failing(name, getattr(os, name)))
