"""`render --socket`: a server renders, on this command's streams, in its folder and environment.

This module imports neither torch nor anything else that is slow to import.
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

from wancli import signals
from wancli.errors import Interrupted, JobError, MachineError, Stopped
from wancli.farm import local_socket
from wancli.progress import make_printable
from wancli.storage import disk
from wancli.storage.paths import require_cwd

_BUSY_AFTER = 0.5  # seconds without an answer after which a server counts as busy


def render(arguments: Sequence[str], socket_name: str, cache: Path, *, quiet: bool) -> int | None:
    """Run a command line on a server and return its exit code.

    Returns None if the socket is `auto` and no server there can run it: the caller then runs it. Raises
    MachineError if a named server is not found or refuses. Raises Stopped if the server ends in the middle,
    or after a signal that comes before the client's turn.
    """
    path = Path(socket_name)
    try:
        _refuse_pipes(arguments)
        path = local_socket.socket_path(socket_name, cache)
        connection = local_socket.connect(path)
        if connection is None:
            if socket_name == local_socket.AUTO:
                return None
            raise MachineError(
                "no server found",
                where=str(path),
                hint=f"wancli serve --socket {path} --daemonize starts a server; "
                "--socket auto does without one.",
            )
        with connection, _RenderRequest(connection, path) as request:
            return request.run(arguments, quiet=quiet)
    except (MachineError, JobError) as error:
        if socket_name != local_socket.AUTO:
            raise
        _print_message(f"{error}; rendering without it")
        return None


def _refuse_pipes(arguments: Sequence[str]) -> None:
    """Raise JobError for a pipe of this process, as of `render <(...)`, which the server cannot open."""
    for word in arguments:
        if word.startswith(("/dev/fd/", "/proc/self/fd/")) and disk.is_pipe(Path(word)):
            raise JobError("a server cannot read this pipe", where=word, hint="Pipe the job into: render -")


class _RenderRequest:
    """A render on a server. In its block signals are sent to the server; before the render starts, a signal
    ends the wait instead."""

    def __init__(self, connection: socket.socket, path: Path) -> None:
        self._connection, self._path = connection, path
        self._messages = local_socket.MessageReader(connection)
        self._begun = False
        self._sent: list[int] = []

    def __enter__(self) -> _RenderRequest:
        self._before = signals.handle_signals(signals.STOP_SIGNALS, self._on_signal)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            signals.end_work(self._before)
        else:  # perhaps this process renders
            signals.restore_signals(self._before)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self._begun:
            kind = Interrupted if number == signal.SIGINT else Stopped
            raise kind(f"stopped by {name}; nothing was started")
        if number not in signals.REPEATED_SIGNALS:
            self._sent.append(number)
        with suppress(OSError):  # the server has just ended; the next message reports it
            local_socket.send_message(self._connection, {"signal": name})

    def run(self, arguments: Sequence[str], *, quiet: bool) -> int:
        """Wait for the turn, send the command line, and return its exit code."""
        if not quiet and not select.select([self._connection], [], [], _BUSY_AFTER)[0]:
            _print_message(f"waiting until the server at {self._path} has finished another render")
        message = self._receive()
        if "turn" in message:
            self._send(arguments)
            message = self._receive()
        if "refused" in message:
            raise MachineError(
                f"refuses: {message['refused']}",
                where=str(self._path),
                hint="wancli serve --stop ends the server; start it again from here.",
            )
        self._begun = bool(message)
        if not self._begun:
            raise MachineError("the server ended before it was our turn", where=str(self._path))
        message = self._receive()
        if isinstance(code := message.get("code"), int):
            return code
        if len(self._sent) > 1:
            name = signal.Signals(self._sent[-1]).name
            _print_message(f"ended at once by a second signal, {name}; so is the server")
            return 128 + self._sent[-1]
        raise Stopped(f"the server at {self._path} has died; what was saved is on disk")

    def _send(self, arguments: Sequence[str]) -> None:
        request = {
            "arguments": list(arguments),
            "folder": str(require_cwd()),
            "environment": dict(os.environ),
            "written": [_stream_settings(stream) for stream in (sys.stdout, sys.stderr)],
            "umask": _current_umask(),
            "began": _process_start_time(),
            "identity": local_socket.process_fingerprint(),
        }
        with suppress(ConnectionError), _standard_streams() as streams:
            socket.send_fds(self._connection, [b"\n"], streams)
            local_socket.send_message(self._connection, request)

    def _receive(self) -> dict[str, Any]:
        """Wait for a message; an empty one if the server has closed the connection."""
        return self._messages.read() or {}


def _print_message(text: str) -> None:
    sys.stderr.write(make_printable(f"wancli: {text}\n"))


@contextmanager
def _standard_streams() -> Iterator[list[int]]:
    """Yield the descriptors of stdin, stdout and stderr, with /dev/null for those that are closed."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield [fd if _is_open(fd) else null for fd in range(3)]
    finally:
        os.close(null)


def _stream_settings(stream: TextIO) -> dict[str, Any]:
    """Return how the server is to write to a stream: as the terminal and the environment want it."""
    direct = bool(getattr(stream, "write_through", False))  # PYTHONUNBUFFERED
    return {"encoding": stream.encoding, "write_through": direct}


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _current_umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _process_start_time() -> float:
    """Return when this process was started, in seconds since 1970."""
    fields = (disk.read_system_text("/proc/self/stat") or "").rpartition(")")[2].split()
    if not fields:
        return time.time()
    ticks = int(fields[19])  # since the machine started, proc(5)
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age
