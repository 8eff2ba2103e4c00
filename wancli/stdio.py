"""The standard streams. A closed stream discards its output; a stream without a reader does not end the work.

After a failed write, stderr, which people read, is silently discarded. A result that cannot be written to
stdout is an error, once.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

from wancli.errors import MachineError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_PATHS_HANDLER = "wancli.paths"


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
    return open_writer(fd, encoding=old.encoding if old else None, write_through=direct)


def open_writer(fd: int, *, encoding: str | None, write_through: bool) -> TextIO:
    """Open stdout or stderr as text, buffered as Python buffers it.

    In UTF-8, a path on stdout has the bytes of its file name, whatever they are. Other characters that the
    encoding lacks are escaped. Writing to stderr never raises. Writing to stdout raises BrokenPipeError if it
    has no reader, and MachineError if the device fails; after that, output is discarded.
    """
    raw = _StandardStream(fd)
    lines = fd == 2 or os.isatty(fd)
    data = raw if write_through else io.BufferedWriter(raw)
    text = io.TextIOWrapper(data, encoding, "backslashreplace", None, lines, write_through)
    if fd == 1 and codecs.lookup(text.encoding).name == "utf-8":
        text.reconfigure(errors=_PATHS_HANDLER)
    return text


def write_failure(stream: TextIO) -> MachineError | None:
    """Return why output to stdout is incomplete, if the device is at fault and not the reader."""
    data = getattr(stream, "buffer", None)
    raw = getattr(data, "raw", data)
    return raw.failure if isinstance(raw, _StandardStream) else None


class _StandardStream(io.FileIO):
    """A standard stream that becomes /dev/null when a write fails."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "w", closefd=False)
        self.failure: MachineError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            if self.fileno() == 2:
                return memoryview(data).nbytes
            if isinstance(error, BrokenPipeError):
                raise
            self.failure = MachineError(f"cannot be written: {error.strerror}", where="stdout")
            raise self.failure from error


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """Return the bytes of a file name that is not UTF-8, else an escape."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)


codecs.register_error(_PATHS_HANDLER, _escape)


def write_line(out: TextIO, text: str) -> None:
    """Write and flush one line. If that fails, say so on stderr and continue: the outputs are on disk."""
    try:
        out.write(text + "\n")
        out.flush()
    except BrokenPipeError:
        sys.stderr.write("wancli: stdout has no reader any more; the work continues\n")
    except MachineError as error:
        sys.stderr.write(f"wancli: {error}; the work continues\n")
