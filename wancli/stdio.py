"""The standard streams. All that wancli writes to stdout and stderr goes through the writers of this module.

A closed stream discards its output. A stream without a reader, or with one who does not read, holds up no
work (`wancli.stream_writer`). After a failed write, stderr, which people read, is silently discarded. A
result that cannot be written to stdout is an error, once.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

from wancli.errors import MachineError
from wancli.stream_writer import StreamWriter
from wancli.units import pluralize

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_PATHS_HANDLER = "wancli.paths"
_DELIVERY_SECONDS = 5.0  # without a byte taken, after which a reader is not waited for at the end


def open_streams() -> None:
    """Open those of the three streams that are closed, and make stdout and stderr writers of this module."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115 - for the life of the process
    sys.stdout, sys.stderr = _open_stream(1, sys.stdout), _open_stream(2, sys.stderr)


def _open_stream(fd: int, old: TextIO | None) -> TextIO:
    direct = getattr(old, "write_through", False)  # PYTHONUNBUFFERED
    return open_writer(fd, encoding=old.encoding if old else None, write_through=direct, patient=fd == 1)


def reopen_streams(*, forked: bool = False) -> None:
    """Write to what the descriptors 1 and 2 are now; in a fork, without the threads of its parent."""
    for stream in (sys.stdout, sys.stderr):
        raw = _raw(stream)
        if raw and forked:
            raw.writer.abandon()
        elif raw:
            close_writer(stream)
    open_streams()


def open_writer(fd: int, *, encoding: str | None, write_through: bool, patient: bool) -> TextIO:
    """Open stdout or stderr as text, buffered as Python buffers it.

    In UTF-8, a path on stdout has the bytes of its file name, whatever they are. Other characters that the
    encoding lacks are escaped. Writing to stderr never raises. Writing to stdout raises BrokenPipeError if it
    has no reader, and MachineError if the device fails; after that, output is discarded. With `patient`,
    writing waits for the reader.
    """
    raw = _StandardStream(fd, patient=patient)
    lines = fd == 2 or os.isatty(fd)
    data = raw if write_through else io.BufferedWriter(raw)
    text = io.TextIOWrapper(data, encoding, "backslashreplace", None, lines, write_through)
    if fd == 1 and codecs.lookup(text.encoding).name == "utf-8":
        text.reconfigure(errors=_PATHS_HANDLER)
    return text


def write_failure(stream: TextIO) -> MachineError | None:
    """Return why output to stdout is incomplete, if the device is at fault and not the reader."""
    raw = _raw(stream)
    return raw.failure if raw else None


@contextmanager
def work_without_waiting() -> Iterator[None]:
    """Let no reader of stdout hold up the block. At its end, wait for a reader who still reads.

    What a reader leaves is lost then, and stderr says how much.
    """
    raw = _raw(sys.stdout)
    if raw is None:
        yield
        return
    raw.writer.patient = False
    try:
        yield
    finally:
        out = sys.stdout
        _report_failure(out.flush, "")
        if left := raw.writer.deliver(_DELIVERY_SECONDS):
            lines = pluralize(left, "line")
            sys.stderr.write(f"wancli: stdout is not read: its last {lines} could not be delivered\n")
        _report_failure(raw.raise_failure, "")
        raw.writer.close()


def deliver_streams() -> None:
    """Deliver the last output, as the process ends, to readers who read."""
    for stream in (sys.stdout, sys.stderr):
        _deliver(stream)


def close_writer(stream: TextIO) -> None:
    """Deliver what is buffered to a reader who reads, and discard the rest."""
    _deliver(stream)
    if raw := _raw(stream):
        raw.writer.close()


def _deliver(stream: TextIO) -> None:
    if raw := _raw(stream):
        raw.writer.patient = False  # else the flush waits without a limit for a reader who does not read
        for _ in range(2):  # after a failure, the second one discards
            with suppress(BrokenPipeError, MachineError):
                stream.flush()
        raw.writer.deliver(_DELIVERY_SECONDS)


def _raw(stream: TextIO) -> _StandardStream | None:
    data = getattr(stream, "buffer", None)
    raw = getattr(data, "raw", data)
    return raw if isinstance(raw, _StandardStream) else None


def _describe_gap(lines: int) -> str:
    return f"wancli: {pluralize(lines, 'line')} dropped here: stderr was not read\n"


class _StandardStream(io.FileIO):
    """A standard stream that a thread writes, and that discards its output when a write has failed."""

    def __init__(self, fd: int, *, patient: bool) -> None:
        super().__init__(fd, "w", closefd=False)
        self.writer = StreamWriter(fd, _describe_gap, patient=patient)
        self.expendable = fd == 2
        self.failure: MachineError | None = None
        self._raised = False

    def write(self, data: ReadableBuffer, /) -> int:
        copied = bytes(data)
        self.writer.put(copied, expendable=self.expendable)
        self.raise_failure()
        return len(copied)

    def raise_failure(self) -> None:
        """Raise, once, what kept stdout from being written."""
        error = self.writer.error
        if error is None or self._raised or self.fileno() == 2:
            return
        self._raised = True
        if isinstance(error, BrokenPipeError):
            raise BrokenPipeError from error
        self.failure = MachineError(f"cannot be written: {error.strerror}", where="stdout")
        raise self.failure from error


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """Return the bytes of a file name that is not UTF-8, else an escape."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)


codecs.register_error(_PATHS_HANDLER, _escape)


def describe_gaps(out: TextIO, describe: Callable[[int], str]) -> None:
    """Set the line that stands in a stream for a number of dropped lines."""
    if raw := _raw(out):
        raw.writer.describe_gap = lambda lines: f"{describe(lines)}\n"


def write_line(out: TextIO, text: str, *, expendable: bool = False) -> None:
    """Write and flush one line. If that fails, say so on stderr and continue: the outputs are on disk.

    An `expendable` line, such as one of progress, may be dropped if the reader does not read.
    """

    def write() -> None:
        out.write(text + "\n")
        out.flush()

    raw = _raw(out)
    if raw:
        raw.expendable = expendable
    try:
        _report_failure(write, "; the work continues")
    finally:
        if raw:
            raw.expendable = False


def _report_failure(write: Callable[[], None], consequence: str) -> None:
    try:
        write()
    except BrokenPipeError:
        sys.stderr.write(f"wancli: stdout has no reader any more{consequence}\n")
    except MachineError as error:
        sys.stderr.write(f"wancli: {error}{consequence}\n")
