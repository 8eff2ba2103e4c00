"""Frames to an mp4 that has been read back before anybody sees it. The only place that starts a process.

`write_mp4()` publishes a file only if ffmpeg ended well *and* the file decodes without complaint to
exactly the frames that were sent; an exit code alone proves nothing. Same frames and options give
the same bytes, whatever the number of cores. No shell, no option or protocol hidden in a name: the
path is absolute behind `file:`. Metadata is one short comment; prompts live in the manifest.

ffmpeg runs in its own process group, so that Ctrl-C reaches only us, and dies with its parent.
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
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

from wancli import files
from wancli.errors import FfmpegError, WancliError

if TYPE_CHECKING:
    from torch import Tensor

Rgb24 = bytes | memoryview  # whole frames, C-contiguous, row by row
PATIENCE = 300.0  # seconds without a byte read or written after which ffmpeg counts as stuck

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
# The default conversion is BT.601 without tags, which players take for BT.709: colours shift.
_TO_BT709 = (
    "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int,format=yuv420p,"
    "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
)
# The number of threads shapes the stream, so it is fixed.
_CODECS = {
    "h264": ("-c:v", "libx264", "-threads", "8"),
    "h265": ("-c:v", "libx265", "-tag:v", "hvc1", "-x265-params", "log-level=error:frame-threads=2"),
}


class Frame(NamedTuple):
    """One decoded picture: rgb24, row by row."""

    width: int
    height: int
    rgb: bytes


class About(NamedTuple):
    """What a video is."""

    frames: int
    fps: float
    width: int
    height: int


class _Ffmpeg:
    """A running ffmpeg that is fed, or else listened to. Leaving the block kills what is left of it."""

    def __init__(
        self, arguments: list[str], subject: Path, *, feed: bool, patience: float = PATIENCE
    ) -> None:
        self._subject, self._patience = subject, patience
        self._tail = b""
        leash = [sys.executable, "-I", "-S", "-c", _LEASH, str(os.getpid())]
        try:
            self._process = subprocess.Popen(
                [*leash, _executable(), "-hide_banner", "-nostdin", *arguments],
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
                return files.translate(OSError(number, os.strerror(number)), self._subject)
        end = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        return FfmpegError(f"ffmpeg {what} ({end}): {said or 'no message'}", where=str(self._subject))


class Encoder:
    """Frames in, an mp4 at `path` out; any file there is overwritten. A context manager.

    `fps` frames of `width` x `height` a second, quality `crf` (0 best, 51 worst), `codec` h264 or
    h265, `comment` the only metadata. Leaving the block closes the file; an exception in it kills
    ffmpeg. Raises FfmpegError with the last words of ffmpeg, NoSpace if the disk is full; they call
    the file `named`.
    """

    def __init__(
        self,
        path: Path,
        width: int,
        height: int,
        fps: float,
        crf: int,
        codec: str,
        comment: str,
        *,
        patience: float = PATIENCE,
        named: Path | None = None,
    ) -> None:
        self._frame_bytes = width * height * 3
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", f"{width}x{height}"]
        source += ["-framerate", str(fps), "-i", "pipe:0", "-map_metadata", "-1"]
        picture = ["-vf", _TO_BT709, *_CODECS[codec], "-preset", "medium", "-crf", str(crf)]
        colour = ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"]
        colour += ["-color_range", "tv"]
        container = ["-fflags", "+bitexact", "-flags:v", "+bitexact", "-movflags", "+faststart"]
        container += ["-metadata", f"comment={comment}", "-f", "mp4", f"file:{path.absolute()}"]
        arguments = ["-loglevel", "error", "-y", *source, *picture, *colour, *container]
        self._ffmpeg = _Ffmpeg(arguments, named or path, feed=True, patience=patience)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        with self._ffmpeg:
            if kind is None:
                self._ffmpeg.finish(silent=False)

    def write(self, frames: Rgb24) -> int:
        """Send whole rgb24 frames, C-contiguous; returns how many."""
        data = memoryview(frames).cast("B")
        count, rest = divmod(len(data), self._frame_bytes)
        if rest:
            raise ValueError(f"{len(data)} bytes are not whole frames of {self._frame_bytes}")
        self._ffmpeg.send(data)
        return count


def write_mp4(
    frames: Iterable[Rgb24],
    final: Path,
    *,
    width: int,
    height: int,
    fps: float,
    frame_count: int,
    crf: int,
    codec: str,
    comment: str,
) -> Path:
    """Encode chunks of rgb24 frames, read the result back, and publish it as `final`.

    Raises FfmpegError unless it decodes to exactly `frame_count` frames, OutputExists if another
    file is there, NoSpace or MachineError. Whatever happens, no unfinished file stays behind.
    """
    with files.temporary(final) as tmp:
        with Encoder(tmp, width, height, fps, crf, codec, comment, named=final) as encoder:
            sent = sum(encoder.write(chunk) for chunk in frames)
        found = count_frames(tmp, named=final)
        if not sent == found == frame_count:
            message = f"{frame_count} frames were asked for, {sent} made, {found} are in the file"
            raise FfmpegError(message, where=str(final))
        files.publish(tmp, final)
    return final


def count_frames(path: Path, *, named: Path | None = None) -> int:
    """Decode a whole mp4 and count. Raises FfmpegError if anything in it is damaged."""
    return sum(1 for line in _checksums(path, named or path) if not line.startswith(b"#"))


def about(path: Path) -> About:
    """Decode a whole mp4, count, and measure. Raises FfmpegError if anything in it is damaged."""
    lines = _checksums(path, path)
    # "#tb 0: 1/16", a sixteenth of a second, "#dimensions 0: 832x480", then a line for each frame
    said = dict(line[1:].split(b" 0: ", 1) for line in lines if line.startswith(b"#") and b" 0: " in line)
    seconds, parts = (int(number) for number in said[b"tb"].split(b"/"))
    width, height = (int(number) for number in said[b"dimensions"].split(b"x"))
    return About(sum(not line.startswith(b"#") for line in lines), parts / seconds, width, height)


def read_frames(path: Path) -> Iterator[Frame]:
    """Decode an mp4, one frame at a time. Raises FfmpegError if anything in it is damaged."""
    with _Ffmpeg([*_reading(path), "-f", "image2pipe", "-c:v", "ppm", "pipe:1"], path, feed=False) as ffmpeg:
        waiting = bytearray()
        for chunk in ffmpeg.receive():
            waiting += chunk
            while waiting.count(b"\n", 0, 32) >= 3:  # "P6\n832 480\n255\n", then the picture
                _, size, depth, _ = bytes(waiting[:32]).split(b"\n", 3)
                width, height = (int(number) for number in size.split())
                start = len(b"P6\n") + len(size) + len(b"\n") + len(depth) + len(b"\n")
                end = start + width * height * 3
                if len(waiting) < end:
                    break
                yield Frame(width, height, bytes(waiting[start:end]))
                del waiting[:end]
        ffmpeg.finish(silent=True)


def poster(path: Path, seconds: float) -> bytes:
    """A JPEG of the frame at that time, at most 192 pixels wide. Raises FfmpegError."""
    source = ["-loglevel", "error", "-ss", f"{seconds:.4f}", "-f", "mp4", "-i", f"file:{path.absolute()}"]
    picture = ["-frames:v", "1", "-vf", "scale='min(192,iw)':-2", "-q:v", "6", "-f", "mjpeg", "pipe:1"]
    data = _output([*source, *picture], path)
    if not data:
        raise FfmpegError(f"no frame at {seconds:g} s", where=str(path))
    return data


def to_rgb24(frames_CTYX: Tensor) -> memoryview:
    """Frames in [-1, 1] as bytes [T, Y, X, 3], trunc((x + 1) / 2 * 255) as in the official code."""
    unit_CTYX = frames_CTYX.float().clamp(-1, 1).add_(1).div_(2).mul_(255)
    return unit_CTYX.byte().permute(1, 2, 3, 0).contiguous().cpu().numpy().data


def ffmpeg_version() -> str:
    """The version that ffmpeg calls itself."""
    return _output(["-version"], Path(_executable())).split(b" ", 3)[2].decode()


def check_ffmpeg(codec: str = "h264") -> None:
    """The preflight: ffmpeg is there, runs, and can encode. Raises FfmpegError."""
    executable = Path(_executable())
    name = _CODECS[codec][1]
    if name.encode() not in _encoders(executable, executable.stat().st_mtime_ns):
        raise FfmpegError(f"this ffmpeg has no {name} encoder", where=str(executable), hint=_GET_FFMPEG)


@lru_cache(4)  # a process that renders for others asks again and again
def _encoders(executable: Path, _changed: int) -> frozenset[bytes]:
    return frozenset(_output(["-encoders"], executable).split())


_GET_FFMPEG = "pip install --force-reinstall imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE"


def _executable() -> str:
    import imageio_ffmpeg

    try:
        found: str = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise FfmpegError(str(error), hint=_GET_FFMPEG) from None
    path = shutil.which(found)
    if path is None:
        raise FfmpegError("no such ffmpeg, or it is not executable", where=found, hint=_GET_FFMPEG)
    return path


def _reading(path: Path) -> list[str]:
    # passthrough: every coded frame once, none doubled or dropped to keep time
    source = ["-f", "mp4", "-i", f"file:{path.absolute()}"]
    return ["-loglevel", "error", *source, "-map", "0:v:0", "-fps_mode", "passthrough"]


def _checksums(path: Path, named: Path) -> list[bytes]:
    """What ffmpeg tells of a video that it decodes from end to end: facts, and a line for each frame."""
    lines = _output([*_reading(path), "-f", "framecrc", "pipe:1"], named).splitlines()
    return [line for line in lines if line]


def _output(arguments: list[str], subject: Path) -> bytes:
    with _Ffmpeg(arguments, subject, feed=False) as ffmpeg:
        data = b"".join(ffmpeg.receive())
        ffmpeg.finish(silent="-version" not in arguments)
    return data
