"""Write and read the file of a claim, and find out whether the process that it names is alive."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from wancli.errors import EntryError, NoSuchFile, Unreadable
from wancli.storage import disk, records
from wancli.storage.schema import Data


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


class ClaimRecord(Data):
    """The whole of a claim file. One that is not a claim, or is torn, has none of these keys."""

    KIND: ClassVar[records.Kind] = records.CLAIM
    host: str = "unknown"
    boot: str = ""
    space: str = ""
    pid: Annotated[int, Field(ge=0, lt=2**31)] = 0
    born: str = ""
    started: str = ""
    token: str = ""


@dataclass(frozen=True)
class ClaimSnapshot:
    """A claim file as it was read once. `body` is None if it cannot be read."""

    mtime_ns: int  # only ever compared with itself
    body: ClaimRecord | None

    @property
    def token(self) -> str:
        return self.body.token if self.body else ""

    @property
    def holder(self) -> Holder:
        body = self.body or ClaimRecord()
        return Holder(body.host, body.pid, body.started)


def read_claim(path: Path) -> ClaimSnapshot | None:
    """Read a claim; return None if there is no file, or not even its status can be read."""
    try:
        with disk.opened(path) as file:  # opening is what makes NFS ask its server
            mtime_ns, data = os.fstat(file.fileno()).st_mtime_ns, file.read(records.CLAIM.max_bytes)
    except NoSuchFile:
        return None
    except Unreadable:
        with suppress(Unreadable):
            found = disk.status(path)
            return ClaimSnapshot(found.st_mtime_ns, None) if found else None
        return None
    try:
        return ClaimSnapshot(mtime_ns, ClaimRecord.parse(records.parse_json(data), path))
    except (ValueError, EntryError):
        return ClaimSnapshot(mtime_ns, ClaimRecord())


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
    me, body = current_process(), claim.body or ClaimRecord()
    if (body.host, body.boot, body.space) != (me.host, me.boot, me.pid_namespace):
        return False
    start_time = _read_start_time(body.pid)
    return start_time is None or (start_time != "" and start_time != body.born)


def current_process() -> Process:
    boot = (disk.read_system_text("/proc/sys/kernel/random/boot_id") or "").strip()
    pid_namespace = disk.read_system_link("/proc/self/ns/pid") or ""
    return Process(
        socket.gethostname(), boot, pid_namespace, os.getpid(), _read_start_time(os.getpid()) or ""
    )


def _read_start_time(pid: int) -> str | None:
    """Return when a process of this host began: "" if that is secret, None if it is dead or a zombie."""
    if pid <= 0:
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
