"""The standard streams: closed ones go nowhere, and one that nobody takes from any more ends no work.

What people read, stderr, is then written to nowhere. A result on stdout that cannot be written is an error,
once.
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

_PATHS = "wancli.paths"


def prepare() -> None:
    """Opens what of the three is closed, and makes stdout and stderr writers of this module."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - for the life of the process
    sys.stdout, sys.stderr = _as(1, sys.stdout), _as(2, sys.stderr)


def _as(fd: int, old: TextIO | None) -> TextIO:
    direct = getattr(old, "write_through", False)  # PYTHONUNBUFFERED
    return writer(fd, encoding=old.encoding if old else None, write_through=direct)


def writer(fd: int, *, encoding: str | None, write_through: bool) -> TextIO:
    """Text for stdout or stderr, buffered as Python has it.

    In UTF-8 a path on stdout has the bytes of its name, whatever they are; what else cannot be said in an
    encoding is escaped. Writing to stderr never raises. Writing to stdout raises BrokenPipeError where
    nobody reads, MachineError where it fails; all that follows goes nowhere.
    """
    raw = _Descriptor(fd)
    lines = fd == 2 or os.isatty(fd)
    data = raw if write_through else io.BufferedWriter(raw)
    text = io.TextIOWrapper(data, encoding, "backslashreplace", None, lines, write_through)
    if fd == 1 and codecs.lookup(text.encoding).name == "utf-8":
        text.reconfigure(errors=_PATHS)
    return text


def failure(stream: TextIO) -> MachineError | None:
    """Why what was written to stdout is not all there, if the device is at fault and not its reader."""
    data = getattr(stream, "buffer", None)
    raw = getattr(data, "raw", data)
    return raw.failure if isinstance(raw, _Descriptor) else None


class _Descriptor(io.FileIO):
    """A standard stream that becomes that of nothing when a write fails."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "w", closefd=False)
        self.failure: MachineError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if self.fileno() == 2:
                return memoryview(data).nbytes
            if isinstance(error, BrokenPipeError):
                raise
            self.failure = MachineError(f"cannot be written: {error.strerror}", where="stdout")
            raise self.failure from error


def _escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    """The bytes that a name had, else an escape."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)


codecs.register_error(_PATHS, _escaped)


def line(out: TextIO, text: str) -> None:
    """One line, at once. Where it cannot be written this and all that follows goes nowhere
    (`wancli.stdio`), and stderr says so; what the command makes is on disk."""
    try:
        out.write(text + "\n")
        out.flush()
    except BrokenPipeError:
        sys.stderr.write("wancli: nobody reads stdout any more; the work goes on\n")
    except MachineError as error:
        sys.stderr.write(f"wancli: {error}; the work goes on\n")
