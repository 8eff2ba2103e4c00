"""Running in the background: a process in a session of its own that reports when it is ready."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from wancli import stdio
from wancli.errors import ExitStatus, MachineError
from wancli.storage import atomic


class Background:
    """The background process, as `detach` returns it.

    Until it is ready, its errors go to the streams of the process that started it, if that process waits.
    Afterwards they go to the log.
    """

    def __init__(self, log: Path, answer: int | None) -> None:
        self._log, self._answer = log, answer
        _redirect(os.devnull, 0)
        stdio.reopen_streams(forked=True)
        if answer is None:
            self._redirect_to_log()

    def report_ready(self) -> None:
        """Tell the waiting process that this one is ready. Raises MachineError if that process has ended."""
        if self._answer is not None:
            self._redirect_to_log()
            self._send_status(ExitStatus.OK)

    def report_failure(self, status: ExitStatus) -> None:
        if self._answer is not None:
            self._send_status(status)

    def _send_status(self, status: ExitStatus) -> None:
        assert self._answer is not None
        try:
            os.write(self._answer, bytes([status]))
        except BrokenPipeError:
            raise MachineError(
                "the process that started this server has ended", where=str(self._log)
            ) from None
        os.close(self._answer)
        self._answer = None

    def _redirect_to_log(self) -> None:
        _redirect(self._log, 1)
        _redirect(self._log, 2)
        stdio.reopen_streams()


def detach(log: Path, *, wait: bool) -> Background | ExitStatus:
    """Fork into the background. Returns twice: Background in the new process, an exit status in this one.

    With `wait`, this process returns once the other one is ready or has failed. Call it before there are
    threads.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    answer, child_end = os.pipe()
    if child := os.fork():
        os.close(child_end)
        os.waitpid(child, 0)
        status = os.read(answer, 1) if wait else bytes([ExitStatus.OK])
        os.close(answer)
        return ExitStatus(status[0]) if status else ExitStatus.BUG
    os.close(answer)
    os.setsid()
    if os.fork():  # the leader of a session may get a terminal; its child never does
        os._exit(0)
    if not wait:
        os.close(child_end)
    return Background(log, child_end if wait else None)


def _redirect(path: Path | str, fd: int) -> None:
    """Make a file what a descriptor writes to and reads from."""
    with atomic.writing(Path(path)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.dup2(opened, fd)
    os.close(opened)
