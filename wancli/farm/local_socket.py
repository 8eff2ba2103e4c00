"""A Unix socket in a private folder, on which a client and a server of the same user exchange messages.

A message is a line of JSON. The server sends `{"turn": PID}` when it is the client's turn. The client sends
its standard streams and its request, and later `{"signal": NAME}`. The server answers `{"begun": PID}` or
`{"refused": WHY}`, and at the end `{"code": N}`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import select
import socket
import stat
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wancli import __version__
from wancli.errors import JobError, MachineError, Unreadable
from wancli.storage import disk, records
from wancli.storage.paths import expand_home

AUTO = "auto"
_MAX_PATH_BYTES = 107  # of a Unix socket
# A process reads these once, when it starts: a server cannot take them over from its client.
FIXED_VARIABLES = (
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


def socket_path(socket_name: str, cache: Path) -> Path:
    """Return the path of a named socket; `auto` is the user's own on this host.

    Raises JobError if the path is too long for a socket.
    """
    if socket_name == AUTO:
        # A cache may be shared by hosts, a socket never is.
        runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or "/nowhere")
        path = runtime / "wancli/serve" if disk.is_folder(runtime) else cache / "run" / os.uname().nodename
    else:
        path = expand_home(socket_name, "--socket")
    path = Path(os.path.abspath(path))  # noqa: PTH100 - Path.resolve would follow links and lengthen it
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise JobError(
            f"is a path of {len(os.fsencode(path))} bytes; a socket can have {_MAX_PATH_BYTES}",
            where=f"--socket {path}",
            hint="--socket DIR/NAME names a shorter one.",
        )
    return path


def require_private(folder: Path) -> None:
    """Raise MachineError unless the folder belongs to this user and is closed to all others."""
    found = disk.status(folder)
    if found is None:
        raise MachineError("no such folder", where=str(folder))
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise MachineError(
            f"not a private folder (owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):04o}), so a "
            "socket in it may belong to another user",
            where=str(folder),
            hint="It must be yours, mode 0700: --socket DIR/NAME with a DIR that does not exist makes one.",
        )


def make_private_folder(folder: Path) -> None:
    """Make a folder if it is missing, and require it to be private. Raises MachineError."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(0o700, exist_ok=True)
    except OSError as error:
        raise MachineError(f"cannot be made: {error.strerror}", where=str(folder)) from error
    require_private(folder)


@contextmanager
def lock_socket(path: Path) -> Iterator[None]:
    """Keep other servers from this socket while the block runs. Raises MachineError if one holds it."""
    make_private_folder(path.parent)
    lock_path = path.with_name(path.name + ".lock")
    try:
        lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise MachineError(f"cannot be made: {error.strerror}", where=str(lock_path)) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise MachineError(
            "another server uses it" if isinstance(error, BlockingIOError) else str(error.strerror),
            where=str(path),
            hint="wancli serve --stop ends that server; --socket DIR/NAME names another socket.",
        ) from None
    try:
        yield
    finally:
        os.close(lock)


@contextmanager
def listen(path: Path) -> Iterator[socket.socket]:
    """Listen at a locked path, for its user alone, and remove the socket after the block.

    Raises MachineError if the path is a file of another kind.
    """
    _remove_stale_socket(path)
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


def _remove_stale_socket(path: Path) -> None:
    """Remove the socket of a server that died."""
    found = disk.link_status(path)
    if found is None:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise MachineError(
            "already exists, and is not a socket", where=str(path), hint="--socket names another path."
        )
    path.unlink()


def peer_credentials(connection: socket.socket) -> tuple[int, int]:
    """Return the process and the user at the other end, as the kernel knows them."""
    pid, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, user


def connect(path: Path) -> socket.socket | None:
    """Connect to the server at a path; return None if there is none.

    Raises MachineError if the folder is not private or another user runs the server.
    """
    try:
        if not disk.is_taken(path):
            return None
        require_private(path.parent)
    except Unreadable:
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(path))
    except OSError:  # no server, or one that died
        connection.close()
        return None
    if (user := peer_credentials(connection)[1]) != os.geteuid():
        connection.close()
        raise MachineError(f"is served by user {user}", where=str(path))
    return connection


def process_fingerprint() -> dict[str, str]:
    """Return what must be the same at both ends, so that a render is the same at either."""
    digest = hashlib.sha256()
    for file in sorted(disk.walk(Path(__file__).parent.parent, without="__pycache__")):
        if file.suffix == ".py" and (found := disk.status(file)):
            digest.update(f"{file} {found.st_size} {found.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return {
        "the version of wancli": __version__,
        "Python's folder": sys.prefix,
        "wancli's code": digest.hexdigest()[:16],
    } | {name: os.environ.get(name, "not set") for name in FIXED_VARIABLES}


def describe_difference(server: Mapping[str, str], client: Mapping[str, str]) -> str | None:
    """Describe the first difference between two fingerprints; return None if they are the same."""
    for name, ours in server.items():
        if (theirs := client.get(name)) != ours:
            return f"{name} is {ours} at the server, {theirs} at the client"
    return None


def send_message(connection: socket.socket, message: Mapping[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


class MessageReader:
    """The messages that arrive on a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._rest = b""

    def read(self) -> dict[str, Any] | None:
        """Wait for a message; return None if the other end has closed the connection, or sends none."""
        while b"\n" not in self._rest:
            try:
                self._wait_for_bytes()
                more = self._connection.recv(1 << 16)
            except (ConnectionError, TimeoutError):
                more = b""
            if not more or len(self._rest) > records.MESSAGE.max_bytes:
                return None
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            message = records.parse_json(line)
        except ValueError:
            return None
        return message if isinstance(message, dict) else None

    def _wait_for_bytes(self) -> None:
        """Wait without limit, if the connection has none, and let handlers of signals run every second.

        A signal that comes just before a system call does not end it, and Python runs its handler only then.
        """
        if self._connection.gettimeout() is None:
            while not select.select([self._connection], [], [], 1.0)[0]:
                pass
