"""The file of a claim, as it is written and read, and the process that is named in it."""

from __future__ import annotations

import errno
import json
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Holder:
    """Who renders a shot: a process, and when it began with it by the clock of its host."""

    host: str
    pid: int
    since: str

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}"


@dataclass(frozen=True)
class Process:
    """A process as no other ever is: containers share a boot, but no space of process ids; ids come again,
    but not with the same start."""

    host: str
    boot: str
    pid_namespace: str
    pid: int
    start_time: str  # ticks after boot

    def as_dict(self) -> dict[str, str | int]:
        """The process as a claim file names it."""
        return {
            "host": self.host,
            "boot": self.boot,
            "space": self.pid_namespace,
            "pid": self.pid,
            "born": self.start_time,
        }


@dataclass(frozen=True)
class ClaimSnapshot:
    """A claim as it was seen once. `body` is {} where the content is nothing of ours, None where it cannot be
    read."""

    mtime_ns: int  # mtime, only ever compared with itself
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
    """None where there is no claim, or none that can be seen."""
    try:
        with path.open("rb") as file:  # opening is what makes NFS ask its server
            mtime_ns, data = os.fstat(file.fileno()).st_mtime_ns, file.read(4096)
    except FileNotFoundError:
        return None
    except OSError:
        with suppress(OSError):
            return ClaimSnapshot(path.stat().st_mtime_ns, None)
        return None
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        body = {}
    return ClaimSnapshot(mtime_ns, body if isinstance(body, dict) else {})


def create_new(path: Path) -> int:
    """A file that was not there. Its folder may go at any time: with the last claim of another worker."""
    for _ in range(100):
        with suppress(FileNotFoundError):
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def is_dead(claim: ClaimSnapshot) -> bool:
    """Whether the process of a claim is of this host and no more."""
    me, body = current_process().as_dict(), claim.body or {}
    if any(body.get(name) != me[name] for name in ("host", "boot", "space")):
        return False
    start_time = _read_start_time(body.get("pid"))
    return start_time is None or (start_time != "" and start_time != body.get("born"))


def current_process() -> Process:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    pid_namespace = Path("/proc/self/ns/pid").readlink().name
    return Process(
        socket.gethostname(), boot, pid_namespace, os.getpid(), _read_start_time(os.getpid()) or ""
    )


def _read_start_time(pid: object) -> str | None:
    """When a process of this host began, "" where that is secret; None where there is none, or one that is
    dead but for the question how it ended."""
    if not isinstance(pid, int) or pid <= 0:
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass  # another user's
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()  # a name may hold anything, also brackets
    return None if state in "ZX" else fields[18]
