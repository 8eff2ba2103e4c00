"""A disk that fails: the calls of `os` that change what is on disk, counted, recorded, and made to fail.

`install()` wraps them in this process, which is a forked child of the rig, and nothing outlives it. Calls
count only if they concern the watched folders. Calls that ask are recorded, and made to fail, by name and
path and as often as they come. An audit hook of the interpreter sees whatever opens, renames or removes there
past the wrapped calls, and notes it as a `stray`; what a test says holds only without any.
fsync does not reach the disk, which makes a trial quick: the recording says what was synced when.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

KINDS = ("kill before", "kill after", "short", "ENOSPC", "EIO")
_TAKES_SPACE = ("create", "write", "mkdir", "link")
_CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_AUDITED = ("open", "os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


class Fault(NamedTuple):
    """What happens at the call of this number, from 0. After ENOSPC the disk stays full."""

    at: int
    kind: str


class Ask(NamedTuple):
    """A call that asks for a path, all of which fail with this error; without one it is only recorded."""

    call: str
    path: str
    error: str = ""


class Shim:
    """Of one process: `log` is an open file that takes a line of JSON for each call."""

    def __init__(
        self, watched: list[str], faults: list[Fault], log: int, blobs: Path | None, asks: list[Ask]
    ) -> None:
        self.failing_asks = {(ask.call, ask.path): getattr(errno, ask.error) for ask in asks}
        self.asked: set[tuple[str, str]] = set()
        self.watched = tuple(os.path.realpath(folder) for folder in watched)
        self.faults = {fault.at: fault.kind for fault in faults}
        self.log, self.blobs = log, blobs
        self.count = 0
        self.full = False
        self.opened: dict[int, str] = {}
        self.inside = 0  # how many wrapped calls the audit hook finds itself in
        self.real = {name: getattr(os, name) for name in (*_WRAPPED, *_ASKING, "fdopen")}

    def tell(self, **what: Any) -> None:
        self.real["write"](self.log, json.dumps(what).encode() + b"\n")

    def concerns(self, path: Any) -> str | None:
        """The whole path, if it is in a watched folder. The last part is not followed."""
        if not isinstance(path, str | bytes | os.PathLike):
            return None
        name = os.fsdecode(path)
        self.inside += 1  # realpath asks, too
        try:
            whole = os.path.join(os.path.realpath(os.path.dirname(name) or "."), os.path.basename(name))
        finally:
            self.inside -= 1
        return whole if whole.startswith(self.watched) else None

    def perform(self, kind: str, path: str, call: Callable[[], Any], short: Callable[[], Any] | None) -> Any:
        """One counted call, or the fault that is due."""
        number, self.count = self.count, self.count + 1
        fault = self.faults.get(number, "")
        if fault == "kill before":
            os.kill(os.getpid(), signal.SIGKILL)
        self.full |= fault == "ENOSPC"
        if fault == "ENOSPC" or (self.full and kind in _TAKES_SPACE):
            self.tell(number=number, kind=kind, path=path, failed="ENOSPC")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if fault == "EIO":
            self.tell(number=number, kind=kind, path=path, failed="EIO")
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        self.inside += 1
        try:
            result = short() if fault == "short" and short else call()
        finally:
            self.inside -= 1
        self.tell(number=number, kind=kind, path=path, **self._state(kind, path, result))
        if fault == "kill after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def _state(self, kind: str, path: str, result: Any) -> dict[str, Any]:
        """What a recording needs to know of the disk: whose name, and what an fsync made durable."""
        if self.blobs is None:
            return {}
        if kind in ("create", "mkdir"):
            return {"inode": self.real["lstat"](path).st_ino}
        if kind != "fsync":
            return {}
        if os.path.isdir(path):
            with self.real["scandir"](path) as entries:
                return {
                    "inode": self.real["stat"](path).st_ino,
                    "entries": {e.name: e.inode() for e in entries},
                }
        with open(path, "rb") as file:
            data = file.read()
        digest = hashlib.sha256(data).hexdigest()
        blob = os.open(self.blobs / digest, os.O_WRONLY | os.O_CREAT)
        self.real["write"](blob, data)
        os.close(blob)
        return {"inode": self.real["stat"](path).st_ino, "blob": digest}

    # ---- the wrapped calls ----

    def open(self, path: Any, flags: int, *rest: Any, **options: Any) -> int:
        whole = self.concerns(path)
        if whole is None:
            fd = self.real["open"](path, flags, *rest, **options)
            self.opened.pop(fd, None)  # of a file that was closed past `close`
            return int(fd)
        if flags & _CHANGES:
            kind = "create" if flags & os.O_CREAT else "open"
            fd = self.perform(kind, whole, lambda: self.real["open"](path, flags, *rest, **options), None)
        else:
            fd = self.ask("open", whole, lambda: self.real["open"](path, flags, *rest, **options))
        self.opened[fd] = whole
        return int(fd)

    def close(self, fd: int) -> None:
        self.opened.pop(fd, None)
        self.real["close"](fd)

    def write(self, fd: int, data: Any) -> int:
        if fd not in self.opened:
            return int(self.real["write"](fd, data))
        return int(
            self.perform(
                "write",
                self.opened[fd],
                lambda: self.real["write"](fd, data),
                lambda: self.real["write"](fd, memoryview(data)[: len(data) // 2]),
            )
        )

    def fsync(self, fd: int) -> None:
        if fd in self.opened:
            self.perform("fsync", self.opened[fd], lambda: None, None)
        else:
            self.real["fsync"](fd)

    def ask(self, name: str, path: str, call: Callable[[], Any]) -> Any:
        """A call that changes nothing: recorded once, or failing."""
        if (name, path) not in self.asked and not self.inside:
            self.asked.add((name, path))
            self.tell(asked=name, path=path)
        if number := not self.inside and self.failing_asks.get((name, path)):
            if name == "access":
                return False
            raise OSError(number, os.strerror(number), path)
        self.inside += 1
        try:
            return call()
        finally:
            self.inside -= 1

    def asking(self, name: str) -> Callable[..., Any]:
        def call(path: Any = ".", *rest: Any, **options: Any) -> Any:
            whole = None if self.inside else self.concerns(path)
            if whole is None:
                return self.real[name](path, *rest, **options)
            return self.ask(name, whole, lambda: self.real[name](path, *rest, **options))

        return call

    def fdopen(self, fd: int, *rest: Any, **options: Any) -> Any:
        """The file that is read; what fails is `read`."""
        file = self.real["fdopen"](fd, *rest, **options)
        path = self.opened.get(fd)
        if path is None:
            return file
        return ReadFile(file, lambda: self.ask("read", path, lambda: None))

    def named(self, name: str) -> Callable[..., Any]:
        """A call whose paths say what it changes."""

        def call(*arguments: Any, **options: Any) -> Any:
            paths = [self.concerns(path) for path in arguments[:2]]
            if not any(paths):
                return self.real[name](*arguments, **options)
            where = " ".join(path for path in paths if path)
            return self.perform(name, where, lambda: self.real[name](*arguments, **options), None)

        return call

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.inside or event not in _AUDITED:
            return
        whole = self.concerns(arguments[0])
        if whole is None or (event == "open" and not arguments[2] & _CHANGES and not self.failing_asks):
            return
        self.tell(stray=event, path=whole)


_NAMED = (
    "link",
    "rename",
    "replace",
    "unlink",
    "remove",
    "mkdir",
    "rmdir",
    "symlink",
    "utime",
    "truncate",
    "chmod",
)
_WRAPPED = ("open", "close", "write", "fsync", *_NAMED)
_ASKING = ("stat", "lstat", "scandir", "statvfs", "readlink", "access", "listdir")
ASKS = ("open", "read", *_ASKING)


class ReadFile:
    """A file whose reading is a call of its own."""

    def __init__(self, file: Any, before: Callable[[], None]) -> None:
        self._file, self._before = file, before

    def __enter__(self) -> ReadFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, *size: int) -> bytes:
        self._before()
        return bytes(self._file.read(*size))

    def readinto(self, buffer: Any) -> int:
        self._before()
        return int(self._file.readinto(buffer))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Told:
    """stdout, whose lines also stand in the log: what the user was told, and when."""

    def __init__(self, stream: Any, shim: Shim) -> None:
        self._stream, self._shim = stream, shim

    def write(self, text: str) -> int:
        if text.strip():
            self._shim.tell(told=text.strip())
        return int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def install(
    watched: list[str],
    faults: list[Fault],
    log: int,
    blobs: Path | None = None,
    asks: list[Ask] | None = None,
) -> None:
    """From here on this process has a disk that fails. For a child that ends by `os._exit`.

    Calls that ask are wrapped only if `asks` is a list."""
    shim = Shim(watched, faults, log, blobs, asks or [])
    if asks is not None:
        os.fdopen = shim.fdopen
        for name in _ASKING:
            setattr(os, name, shim.asking(name))
    for name in ("open", "close", "write", "fsync"):
        setattr(os, name, getattr(shim, name))
    for name in _NAMED:
        setattr(os, name, shim.named(name))
    sys.addaudithook(shim.audit)
    sys.stdout = Told(sys.stdout, shim)
