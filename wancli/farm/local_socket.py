"""Where a client and a server of one user meet: a Unix socket in a private folder, and who may talk there.

A message is a line of JSON. The server says `{"turn": PID}` when it is the client's; the client sends its
standard streams and what it asks for, and later `{"signal": NAME}`; the server answers `{"begun": PID}` or
`{"refused": WHY}`, and in the end `{"code": N}`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import stat
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wancli import __version__
from wancli.errors import JobError, MachineError

AUTO = "auto"
_LONGEST = 107  # bytes of a path that a Unix socket can have
# What a process reads once, when it starts: a server cannot take these over from its client.
FIXED = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_ORDER",
    "CUDA_VISIBLE_DEVICES",
    "IMAGEIO_FFMPEG_EXE",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
)


def place(said: str, cache: Path) -> Path:
    """The socket that was said, or of `auto` the user's own on this host. Raises JobError for a long path."""
    if said == AUTO:
        # A cache may be shared by hosts, a socket never is.
        runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or "/nowhere")
        path = runtime / "wancli/serve" if runtime.is_dir() else cache / "run" / os.uname().nodename
    else:
        path = Path(said).expanduser()
    path = Path(os.path.abspath(path))  # noqa: PTH100 - Path.resolve would follow links and lengthen it
    if len(os.fsencode(path)) > _LONGEST:
        raise JobError(
            f"a path of {len(os.fsencode(path))} bytes; a socket's has {_LONGEST} at most",
            where=f"--socket {path}",
            hint="--socket DIR/NAME names a shorter one.",
        )
    return path


def private(folder: Path) -> None:
    """Raises MachineError unless the folder is ours and closed to everybody else."""
    found = folder.stat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise MachineError(
            f"not a private folder (owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):04o}), so what "
            "is behind a socket in it may be somebody else",
            where=str(folder),
            hint="It must be yours, mode 0700: --socket DIR/NAME with a DIR that does not exist makes one.",
        )


def make_private(folder: Path) -> None:
    """The folder, made if it is missing. Raises MachineError."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(0o700, exist_ok=True)
    except OSError as error:
        raise MachineError(f"cannot be made: {error.strerror}", where=str(folder)) from error
    private(folder)


@contextmanager
def reserved(path: Path) -> Iterator[None]:
    """While the block runs no other server takes this socket. Raises MachineError where one has."""
    make_private(path.parent)
    lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise MachineError(
            "another server is there" if isinstance(error, BlockingIOError) else str(error.strerror),
            where=str(path),
            hint="wancli serve --stop ends it; --socket DIR/NAME names another place.",
        ) from None
    try:
        yield
    finally:
        os.close(lock)


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """The socket of a place that is `reserved`, for its user alone; it goes with the block. Raises
    MachineError where something else is there."""
    _clear(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(mask)
        listener.listen()
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _clear(path: Path) -> None:
    """Removes the socket of a server that died."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise MachineError(
            "is there, and is no socket", where=str(path), hint="--socket names another place."
        )
    path.unlink()


def peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end, as the kernel knows them."""
    pid, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, user


def connect(path: Path) -> socket.socket | None:
    """A connection to the server there, None if there is none. Raises MachineError if it is not our own."""
    try:
        path.lstat()
        private(path.parent)
    except OSError:
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(path))
    except OSError:  # none, or one that died
        connection.close()
        return None
    if (user := peer(connection)[1]) != os.geteuid():
        connection.close()
        raise MachineError(f"is served by user {user}", where=str(path))
    return connection


def identity() -> dict[str, str]:
    """What must be the same at both ends, so that a render is the same at either."""
    digest = hashlib.sha256()
    for file in sorted(_modules(str(Path(__file__).parent.parent))):
        found = os.stat(file)  # noqa: PTH116 - some hundred in a few milliseconds
        digest.update(f"{file} {found.st_size} {found.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return {
        "the version of wancli": __version__,
        "Python's folder": sys.prefix,
        "wancli's code": digest.hexdigest()[:16],
    } | {name: os.environ.get(name, "not set") for name in FIXED}


def _modules(folder: str) -> Iterator[str]:
    for entry in os.scandir(folder):
        if entry.is_dir():
            yield from _modules(entry.path)
        elif entry.name.endswith(".py"):
            yield entry.path


def difference(server: Mapping[str, str], client: Mapping[str, str]) -> str | None:
    """What a client must know that is not as here; None where all is the same."""
    for name, here in server.items():
        if (there := client.get(name)) != here:
            return f"{name} is {here} at the server, {there} at the client"
    return None


def send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


class Lines:
    """The messages that come over a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._rest = b""

    def next(self) -> dict[str, Any] | None:
        """Waits for one; None where the other end has gone."""
        while b"\n" not in self._rest:
            try:
                more = self._connection.recv(1 << 16)
            except (ConnectionError, TimeoutError):
                more = b""
            if not more:
                return None
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return dict(json.loads(line))
