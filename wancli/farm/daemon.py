"""Going on in the background: a process of a session of its own, that says when it is ready."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from wancli.errors import ExitStatus, MachineError


class Background:
    """This process, once `detached`. Until it is ready its errors go where those of its starter went, if
    that waits; then into the log."""

    def __init__(self, log: Path, answer: int | None) -> None:
        self._log, self._answer = log, answer
        _connect(os.devnull, 0)
        if answer is None:
            self._to_log()

    def ready(self) -> None:
        """Raises MachineError where the one who waited for it has gone."""
        if self._answer is not None:
            self._to_log()
            self._say(ExitStatus.OK)

    def failed(self, status: ExitStatus) -> None:
        if self._answer is not None:
            self._say(status)

    def _say(self, status: ExitStatus) -> None:
        assert self._answer is not None
        try:
            os.write(self._answer, bytes([status]))
        except BrokenPipeError:
            raise MachineError("who started this server has gone", where=str(self._log)) from None
        os.close(self._answer)
        self._answer = None

    def _to_log(self) -> None:
        _connect(self._log, 1)
        _connect(self._log, 2)


def detached(log: Path, *, wait: bool) -> Background | ExitStatus:
    """Returns twice: in a process in the background, and in this one what it is to exit with.

    With `wait` that is once the other is ready or has failed. Before there are threads."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    answer, its = os.pipe()
    if child := os.fork():
        os.close(its)
        os.waitpid(child, 0)
        said = os.read(answer, 1) if wait else bytes([ExitStatus.OK])
        os.close(answer)
        return ExitStatus(said[0]) if said else ExitStatus.BUG
    os.close(answer)
    os.setsid()
    if os.fork():  # who leads a session may get a terminal; its child never does
        os._exit(0)
    if not wait:
        os.close(its)
    return Background(log, its if wait else None)


def _connect(path: Path | str, fd: int) -> None:
    opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.dup2(opened, fd)
    os.close(opened)
