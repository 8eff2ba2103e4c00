"""`render --socket`: a server does the work, on this command's streams, in its folder and environment.

Light on purpose: no torch, and nothing else that is slow to import.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from wancli.errors import Interrupted, JobError, MachineError, Stopped
from wancli.farm import local_socket
from wancli.progress import make_printable
from wancli.storage.paths import require_cwd

_PATIENCE = 0.5  # seconds without an answer after which a server is busy
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def render(arguments: Sequence[str], said: str, cache: Path, *, quiet: bool) -> int | None:
    """The exit code of this command line as the server there ran it; None where it is `auto` and nobody
    there would, so that it is to be run here.

    Raises MachineError where a server was named that is not there or refuses; Stopped where it ended in the
    middle, or where somebody asked for an end before its turn.
    """
    path = Path(said)
    try:
        path = local_socket.place(said, cache)
        connection = local_socket.connect(path)
        if connection is None:
            if said == local_socket.AUTO:
                return None
            raise MachineError(
                "nobody serves there",
                where=str(path),
                hint=f"wancli serve --socket {path} --daemonize starts a server; "
                "--socket auto does without one.",
            )
        with connection, _Render(connection, path) as asked:
            return asked.answer(arguments, quiet=quiet)
    except (MachineError, JobError) as error:
        if said != local_socket.AUTO:
            raise
        _say(f"{error}; rendering without it")
        return None


class _Render:
    """One render that a server is asked for. In the block signals go to it; before it has begun they end
    the wait."""

    def __init__(self, connection: socket.socket, path: Path) -> None:
        self._connection, self._path = connection, path
        self._lines = local_socket.Lines(connection)
        self._begun = False
        self._sent: list[int] = []

    def __enter__(self) -> _Render:
        heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._heard) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self._begun:
            kind = Interrupted if number == signal.SIGINT else Stopped
            raise kind(f"stopped by {name}; nothing was begun")
        self._sent.append(number)
        with suppress(OSError):  # it has just ended, and says so
            local_socket.send(self._connection, {"signal": name})

    def answer(self, arguments: Sequence[str], *, quiet: bool) -> int:
        """The exit code."""
        if not quiet and not select.select([self._connection], [], [], _PATIENCE)[0]:
            _say(f"waiting for the render that {self._path} is busy with")
        said = self._next()
        if "turn" in said:
            self._send(arguments)
            said = self._next()
        if "refused" in said:
            raise MachineError(
                f"refuses: {said['refused']}",
                where=str(self._path),
                hint="wancli serve --stop ends the server; start it again from here.",
            )
        self._begun = bool(said)
        if not self._begun:
            raise MachineError("the server there ended before it was our turn", where=str(self._path))
        said = self._next()
        if "code" in said:
            return int(said["code"])
        if len(self._sent) > 1:
            name = signal.Signals(self._sent[-1]).name
            _say(f"ended at once by a second signal, {name}; so is the server")
            return 128 + self._sent[-1]
        raise Stopped(f"the server at {self._path} has died; what was saved is on disk")

    def _send(self, arguments: Sequence[str]) -> None:
        request = {
            "arguments": list(arguments),
            "folder": str(require_cwd()),
            "environment": dict(os.environ),
            "written": [_how_written(stream) for stream in (sys.stdout, sys.stderr)],
            "umask": _umask(),
            "began": _began(),
            "identity": local_socket.identity(),
        }
        with suppress(ConnectionError), _standard_streams() as streams:
            socket.send_fds(self._connection, [b"\n"], streams)
            local_socket.send(self._connection, request)

    def _next(self) -> dict[str, Any]:
        return self._lines.next() or {}


def _say(text: str) -> None:
    sys.stderr.write(make_printable(f"wancli: {text}\n"))


@contextmanager
def _standard_streams() -> Iterator[list[int]]:
    """stdin, stdout and stderr; in the place of one that is closed, nothing."""
    with Path(os.devnull).open("r+b") as nothing:
        yield [fd if _is_open(fd) else nothing.fileno() for fd in range(3)]


def _how_written(stream: TextIO) -> dict[str, Any]:
    """As its reader and the user's environment have it."""
    direct = bool(getattr(stream, "write_through", False))  # PYTHONUNBUFFERED
    return {"encoding": stream.encoding, "write_through": direct}


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _began() -> float:
    """When this process was started, in seconds since 1970."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[19])  # since the machine was, proc(5)
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age
