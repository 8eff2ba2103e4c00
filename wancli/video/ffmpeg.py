"""Run ffmpeg. No other module starts a program.

ffmpeg runs in its own process group, so that Ctrl-C does not reach it, and dies with its parent. There is no
shell, and no option or protocol hides in a name: a path is absolute behind `file:`.
"""

from __future__ import annotations

import errno
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Self

from wancli.errors import FfmpegError, WancliError
from wancli.storage import atomic, disk

STALL_TIMEOUT = 300.0  # seconds without a byte read or written after which ffmpeg counts as stuck
INSTALL_HINT = "pip install --force-reinstall imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE"

_TAIL = 4096
_CHUNK = 1 << 20
# A fork of a process with threads and gigabytes of weights is neither safe nor quick, so instead of
# preexec_fn a small interpreter asks for SIGKILL (9) when its parent dies (PR_SET_PDEATHSIG, 1).
_PDEATHSIG_WRAPPER = (
    "import ctypes, os, sys\n"
    "ctypes.CDLL(None).prctl(1, 9)\n"
    "os.getppid() == int(sys.argv[1]) or os._exit(1)\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)


class Ffmpeg:
    """A running ffmpeg that reads from us if `has_input`, else writes to us. Leaving the block kills it."""

    def __init__(
        self, arguments: list[str], subject: Path, *, has_input: bool, stall_timeout: float = STALL_TIMEOUT
    ) -> None:
        self._subject, self._stall_timeout = subject, stall_timeout
        self._stderr_tail = b""
        wrapper = [sys.executable, "-I", "-S", "-c", _PDEATHSIG_WRAPPER, str(os.getpid())]
        try:
            self._process = subprocess.Popen(
                [*wrapper, str(find_executable()), "-hide_banner", "-nostdin", *arguments],
                stdin=subprocess.PIPE if has_input else subprocess.DEVNULL,
                stdout=subprocess.DEVNULL if has_input else subprocess.PIPE,
                stderr=subprocess.PIPE,
                process_group=0,
                bufsize=0,
            )
        except OSError as error:
            raise FfmpegError(f"cannot start ffmpeg: {error.strerror}", where=str(subject)) from error
        data, errors = self._process.stdin or self._process.stdout, self._process.stderr
        assert data is not None
        assert errors is not None
        self._data, self._errors = data, errors
        os.set_blocking(data.fileno(), not has_input)
        self._drain = threading.Thread(target=self._collect_stderr, daemon=True)
        self._drain.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._drain.join(self._stall_timeout)
        self._data.close()
        self._errors.close()

    def _collect_stderr(self) -> None:
        while chunk := self._errors.read(_TAIL):
            self._stderr_tail = (self._stderr_tail + chunk)[-_TAIL:]

    def send(self, data: memoryview) -> None:
        """Write all data to ffmpeg."""
        try:
            while data:
                self._wait_until_ready(select.POLLOUT)
                data = data[os.write(self._data.fileno(), data[:_CHUNK]) :]
        except BrokenPipeError:
            self._wait_for_exit()
            raise self._exit_error("stopped reading") from None

    def receive(self) -> Iterator[bytes]:
        """Yield the bytes that ffmpeg writes, as they come."""
        while True:
            self._wait_until_ready(select.POLLIN)
            chunk = self._data.read(_CHUNK)
            if not chunk:
                return
            yield chunk

    def finish(self) -> None:
        """Wait until ffmpeg ends; raise FfmpegError if it failed.

        Its exit code decides, not its stderr: loaders, libraries and wrappers write there, too.
        """
        self._wait_for_exit()
        if self._process.returncode:
            raise self._exit_error("failed")

    def _wait_until_ready(self, event: int) -> None:
        poll = select.poll()
        poll.register(self._data.fileno(), event)
        if not poll.poll(self._stall_timeout * 1000):
            raise self._stall_error()

    def _wait_for_exit(self) -> None:
        self._data.close()
        self._drain.join(self._stall_timeout)  # stderr stays open as long as ffmpeg lives
        try:
            self._process.wait(0 if self._drain.is_alive() else self._stall_timeout)
        except subprocess.TimeoutExpired:
            raise self._stall_error() from None

    def _stall_error(self) -> FfmpegError:
        message = f"ffmpeg has not moved for {self._stall_timeout:g} s and was stopped"
        return FfmpegError(message, where=str(self._subject))

    def _exit_error(self, what: str) -> WancliError:
        code = self._process.returncode
        message = " / ".join(self._stderr_tail.decode(errors="replace").split("\n")[-6:]).strip(" /")
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if os.strerror(number) in message or (number == errno.EFBIG and code == -signal.SIGXFSZ):
                return atomic.translate(OSError(number, os.strerror(number)), self._subject)
        end = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        return FfmpegError(f"ffmpeg {what} ({end}): {message or 'no message'}", where=str(self._subject))


def read_output(arguments: list[str], subject: Path) -> bytes:
    """Return all that ffmpeg writes to stdout. Raises FfmpegError, whose message names `subject`."""
    with Ffmpeg(arguments, subject, has_input=False) as ffmpeg:
        data = b"".join(ffmpeg.receive())
        ffmpeg.finish()
    return data


def read_version() -> str:
    """Return the version of ffmpeg."""
    return read_output(["-version"], find_executable()).split(b" ", 3)[2].decode()


def list_encoders() -> frozenset[bytes]:
    """Return the names of its encoders. Raises FfmpegError if ffmpeg is not found or does not run."""
    path = find_executable()
    return _list_encoders(path, _mtime_ns(path))


def _mtime_ns(path: Path) -> int:
    found = disk.status(path)
    return found.st_mtime_ns if found else 0


@lru_cache(4)  # a server asks for every job
def _list_encoders(path: Path, _mtime_ns: int) -> frozenset[bytes]:
    return frozenset(read_output(["-encoders"], path).split())


def keep_frames_arguments() -> list[str]:
    """Return the arguments that output every coded frame once: none doubled or dropped to keep time."""
    path = find_executable()
    return [_sync_option(path, _mtime_ns(path)), "passthrough"]


@lru_cache(4)
def _sync_option(path: Path, _mtime_ns: int) -> str:
    """Return `-fps_mode`, or `-vsync` if this ffmpeg is older than 5.1 and refuses the other name."""
    try:
        read_output(["-fps_mode", "passthrough", "-version"], path)
    except FfmpegError:
        return "-vsync"
    return "-fps_mode"


def find_executable() -> Path:
    """Return the path of ffmpeg. Raises FfmpegError."""
    import imageio_ffmpeg

    try:
        name: str = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise FfmpegError(str(error), hint=INSTALL_HINT) from None
    path = shutil.which(name)
    if path is None:
        raise FfmpegError("no such ffmpeg, or it is not executable", where=name, hint=INSTALL_HINT)
    return Path(path)
