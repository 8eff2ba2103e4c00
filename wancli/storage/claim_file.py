"""Write and read the file of a claim, and find out whether the process that it names is alive."""

from __future__ import annotations

import errno
import json
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wancli.errors import NoSuchFile, Unreadable
from wancli.storage import disk


@dataclass(frozen=True)
class Holder:
    """The process that renders a shot, and when it began, by the clock of its host."""

    host: str
    pid: int
    since: str

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}"


@dataclass(frozen=True)
class Process:
    """The unique identity of a process.

    Containers share a boot id but not a namespace of process ids; ids are reused, but not with the same start
    time."""

    host: str
    boot: str
    pid_namespace: str
    pid: int
    start_time: str  # ticks after boot

    def as_dict(self) -> dict[str, str | int]:
        """Return the identity under the keys of a claim file."""
        return {
            "host": self.host,
            "boot": self.boot,
            "space": self.pid_namespace,
            "pid": self.pid,
            "born": self.start_time,
        }


@dataclass(frozen=True)
class ClaimSnapshot:
    """A claim file as it was read once. `body` is {} if it is not a claim, None if it cannot be read."""

    mtime_ns: int  # only ever compared with itself
    body: dict[str, Any] | None

    @property
    def token(self) -> str:
        return str((self.body or {}).get("token", ""))

    @property
    def holder(self) -> Holder:
        body = self.body or {}
        pid = body.get("pid")
        return Holder(
            str(body.get("host", "unknown")), pid if isinstance(pid, int) else 0, str(body.get("started", ""))
        )


def read_claim(path: Path) -> ClaimSnapshot | None:
    """Read a claim; return None if there is no file, or not even its status can be read."""
    try:
        with disk.opened(path) as file:  # opening is what makes NFS ask its server
            mtime_ns, data = os.fstat(file.fileno()).st_mtime_ns, file.read(4096)
    except NoSuchFile:
        return None
    except Unreadable:
        with suppress(Unreadable):
            found = disk.status(path)
            return ClaimSnapshot(found.st_mtime_ns, None) if found else None
        return None
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        body = {}
    return ClaimSnapshot(mtime_ns, body if isinstance(body, dict) else {})


def create_new(path: Path) -> int:
    """Create a new file and return its descriptor. Raises FileExistsError.

    Its folder may vanish at any time: another worker removes it with its last claim.
    """
    for _ in range(100):
        with suppress(FileNotFoundError):
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def is_dead(claim: ClaimSnapshot) -> bool:
    """Return whether the process of a claim ran on this host and has ended."""
    me, body = current_process().as_dict(), claim.body or {}
    if any(body.get(name) != me[name] for name in ("host", "boot", "space")):
        return False
    start_time = _read_start_time(body.get("pid"))
    return start_time is None or (start_time != "" and start_time != body.get("born"))


def current_process() -> Process:
    boot = (disk.read_system_text("/proc/sys/kernel/random/boot_id") or "").strip()
    pid_namespace = disk.read_system_link("/proc/self/ns/pid") or ""
    return Process(
        socket.gethostname(), boot, pid_namespace, os.getpid(), _read_start_time(os.getpid()) or ""
    )


def _read_start_time(pid: object) -> str | None:
    """Return when a process of this host began: "" if that is secret, None if it is dead or a zombie."""
    if not isinstance(pid, int) or pid <= 0:
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass  # another user's
    stat = disk.read_system_text(f"/proc/{pid}/stat")
    if not stat:
        return ""
    state, *fields = stat.rpartition(")")[2].split()  # a name may hold anything, also brackets
    return None if state in "ZX" else fields[18]
