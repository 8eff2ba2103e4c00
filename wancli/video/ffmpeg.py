"""A running ffmpeg. The only place that starts a process.

It runs in its own process group, so that Ctrl-C reaches only us, and dies with its parent. No shell, no
option or protocol hidden in a name: a path is absolute behind `file:`.
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
from wancli.storage import atomic

PATIENCE = 300.0  # seconds without a byte read or written after which ffmpeg counts as stuck
INSTALL = "pip install --force-reinstall imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE"

_TAIL = 4096
_CHUNK = 1 << 20
# A fork of a process with threads and gigabytes of weights is neither safe nor quick, so instead of
# preexec_fn a small interpreter asks for SIGKILL (9) when its parent dies (PR_SET_PDEATHSIG, 1).
_LEASH = (
    "import ctypes, os, sys\n"
    "ctypes.CDLL(None).prctl(1, 9)\n"
    "os.getppid() == int(sys.argv[1]) or os._exit(1)\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)


class Ffmpeg:
    """A running ffmpeg that is fed, or else listened to. Leaving the block kills what is left of it."""

    def __init__(
        self, arguments: list[str], subject: Path, *, feed: bool, patience: float = PATIENCE
    ) -> None:
        self._subject, self._patience = subject, patience
        self._tail = b""
        leash = [sys.executable, "-I", "-S", "-c", _LEASH, str(os.getpid())]
        try:
            self._process = subprocess.Popen(
                [*leash, str(executable()), "-hide_banner", "-nostdin", *arguments],
                stdin=subprocess.PIPE if feed else subprocess.DEVNULL,
                stdout=subprocess.DEVNULL if feed else subprocess.PIPE,
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
        os.set_blocking(data.fileno(), not feed)
        self._drain = threading.Thread(target=self._keep_tail, daemon=True)
        self._drain.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._drain.join(self._patience)
        self._data.close()
        self._errors.close()

    def _keep_tail(self) -> None:
        while chunk := self._errors.read(_TAIL):
            self._tail = (self._tail + chunk)[-_TAIL:]

    def send(self, data: memoryview) -> None:
        """Write all of it to ffmpeg."""
        try:
            while data:
                self._await(select.POLLOUT)
                data = data[os.write(self._data.fileno(), data[:_CHUNK]) :]
        except BrokenPipeError:
            self._wait()
            raise self._failure("stopped reading") from None

    def receive(self) -> Iterator[bytes]:
        """What ffmpeg writes, as it comes."""
        while True:
            self._await(select.POLLIN)
            chunk = self._data.read(_CHUNK)
            if not chunk:
                return
            yield chunk

    def finish(self, *, silent: bool) -> None:
        """Wait for a good end; with `silent`, a word on stderr is a bad one."""
        self._wait()
        if self._process.returncode or (silent and self._tail.strip()):
            raise self._failure("failed")

    def _await(self, event: int) -> None:
        poll = select.poll()
        poll.register(self._data.fileno(), event)
        if not poll.poll(self._patience * 1000):
            raise self._stuck()

    def _wait(self) -> None:
        self._data.close()
        self._drain.join(self._patience)  # stderr stays open as long as ffmpeg lives
        try:
            self._process.wait(0 if self._drain.is_alive() else self._patience)
        except subprocess.TimeoutExpired:
            raise self._stuck() from None

    def _stuck(self) -> FfmpegError:
        message = f"ffmpeg has not moved for {self._patience:g} s and was stopped"
        return FfmpegError(message, where=str(self._subject))

    def _failure(self, what: str) -> WancliError:
        code = self._process.returncode
        said = " / ".join(self._tail.decode(errors="replace").split("\n")[-6:]).strip(" /")
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if os.strerror(number) in said or (number == errno.EFBIG and code == -signal.SIGXFSZ):
                return atomic.translate(OSError(number, os.strerror(number)), self._subject)
        end = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        return FfmpegError(f"ffmpeg {what} ({end}): {said or 'no message'}", where=str(self._subject))


def output(arguments: list[str], subject: Path) -> bytes:
    """All that ffmpeg writes to stdout. Raises FfmpegError, which is about `subject`."""
    with Ffmpeg(arguments, subject, feed=False) as ffmpeg:
        data = b"".join(ffmpeg.receive())
        ffmpeg.finish(silent="-version" not in arguments)
    return data


def version() -> str:
    """The version that ffmpeg calls itself."""
    return output(["-version"], executable()).split(b" ", 3)[2].decode()


def encoders() -> frozenset[bytes]:
    """What it can encode with. Raises FfmpegError where it is not there or does not run."""
    found = executable()
    return _encoders(found, found.stat().st_mtime_ns)


@lru_cache(4)  # a process that renders for others asks again and again
def _encoders(executable: Path, _changed: int) -> frozenset[bytes]:
    return frozenset(output(["-encoders"], executable).split())


def executable() -> Path:
    """Where ffmpeg is. Raises FfmpegError."""
    import imageio_ffmpeg

    try:
        found: str = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise FfmpegError(str(error), hint=INSTALL) from None
    path = shutil.which(found)
    if path is None:
        raise FfmpegError("no such ffmpeg, or it is not executable", where=found, hint=INSTALL)
    return Path(path)
