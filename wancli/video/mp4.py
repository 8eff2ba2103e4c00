"""Encode frames to an mp4 that is read back before it is published; decode, count and measure an mp4.

`write_mp4()` publishes a file only if ffmpeg succeeded *and* the file decodes without error to exactly
the frames that were sent; the exit code of the encoder alone proves nothing. Same frames and options give
the same bytes, whatever the number of cores. Metadata is one short comment; prompts are in the
manifest. `wancli.video.ffmpeg` starts and watches ffmpeg.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

from wancli.errors import FfmpegError
from wancli.storage import atomic, disk
from wancli.video import ffmpeg

if TYPE_CHECKING:
    from torch import Tensor

FrameRate = int | str | Fraction  # exactly: a fraction may be text, `24000/1001`
_COMMENT_WITHIN = 2**22  # bytes: the header comes first
Rgb24 = bytes | memoryview  # whole frames, C-contiguous, row by row
# The default conversion is BT.601 without tags, which players take for BT.709: colours shift.
_TO_BT709 = (
    "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int,format=yuv420p,"
    "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
)
# The exit code reports damage, which by default only stderr does.
_STRICT = ("-xerror", "-max_error_rate", "0", "-err_detect", "explode")
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


class VideoInfo(NamedTuple):
    """Frame count, frame rate and size of a video."""

    frame_count: int
    fps: Fraction
    width: int
    height: int


class Mp4Encoder:
    """An encoder from frames to an mp4 at `path`, which it overwrites. A context manager.

    `fps` is in frames of `width` x `height` a second, `crf` the quality (0 best, 51 worst), `codec` h264 or
    h265, `comment` the only metadata. Leaving the block closes the file; an exception in the block kills
    ffmpeg. Raises FfmpegError with the last lines of ffmpeg, NoSpace if the disk is full; messages name
    `reported_path`.
    """

    def __init__(
        self,
        path: Path,
        width: int,
        height: int,
        fps: FrameRate,
        crf: int,
        codec: str,
        comment: str,
        *,
        stall_timeout: float = ffmpeg.STALL_TIMEOUT,
        reported_path: Path | None = None,
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
        self._ffmpeg = ffmpeg.Ffmpeg(
            arguments, reported_path or path, has_input=True, stall_timeout=stall_timeout
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        with self._ffmpeg:
            if kind is None:
                self._ffmpeg.finish()

    def write(self, frames: Rgb24) -> int:
        """Send whole rgb24 frames, C-contiguous; return how many."""
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
    fps: FrameRate,
    frame_count: int,
    crf: int,
    codec: str,
    comment: str,
) -> Path:
    """Encode chunks of rgb24 frames, read the result back, and publish it as `final`.

    Raises FfmpegError unless the file decodes to exactly `frame_count` frames, OutputExists if another
    file exists, NoSpace or MachineError. Whatever happens, no unfinished file stays behind.
    """
    with atomic.temp_file(final) as tmp:
        with Mp4Encoder(tmp, width, height, fps, crf, codec, comment, reported_path=final) as encoder:
            sent = sum(encoder.write(chunk) for chunk in frames)
        decoded = count_frames(tmp, reported_path=final)
        if not sent == decoded == frame_count:
            message = f"{frame_count} frames were requested, {sent} made, {decoded} are in the file"
            raise FfmpegError(message, where=str(final))
        atomic.publish(tmp, final)
    return final


def count_frames(path: Path, *, reported_path: Path | None = None) -> int:
    """Decode a whole mp4 and count its frames. Raises FfmpegError if anything in it is damaged."""
    return _read_checksums(path, reported_path or path)[1]


def read_info(path: Path) -> VideoInfo:
    """Decode a whole mp4 and return its frame count, rate and size. Raises FfmpegError if it is damaged."""
    header, frame_count = _read_checksums(path, path)
    # "#tb 0: 1/16", a sixteenth of a second, "#dimensions 0: 832x480", then a line for each frame
    seconds, ticks = (int(number) for number in header[b"tb"].split(b"/"))
    width, height = (int(number) for number in header[b"dimensions"].split(b"x"))
    return VideoInfo(frame_count, Fraction(ticks, seconds), width, height)


def read_frames(path: Path) -> Iterator[Frame]:
    """Decode an mp4, one frame at a time. Raises FfmpegError if anything in it is damaged."""
    # of other depths, ppm would have two bytes per colour, and gray would be pgm
    arguments = [*_input_arguments(path), "-pix_fmt", "rgb24", "-f", "image2pipe", "-c:v", "ppm", "pipe:1"]
    with ffmpeg.Ffmpeg(arguments, path, has_input=False) as reader:
        buffered = bytearray()
        for chunk in reader.receive():
            buffered += chunk
            while buffered.count(b"\n", 0, 32) >= 3:  # "P6\n832 480\n255\n", then the picture
                _, size, depth, _ = bytes(buffered[:32]).split(b"\n", 3)
                width, height = (int(number) for number in size.split())
                start = len(b"P6\n") + len(size) + len(b"\n") + len(depth) + len(b"\n")
                end = start + width * height * 3
                if len(buffered) < end:
                    break
                yield Frame(width, height, bytes(buffered[start:end]))
                del buffered[:end]
        reader.finish()


def extract_thumbnail(path: Path, seconds: float) -> bytes:
    """Return a JPEG of the frame at that time, at most 192 pixels wide. Raises FfmpegError."""
    source = ["-ss", f"{seconds:.4f}", "-f", "mp4", "-i", f"file:{path.absolute()}"]
    picture = ["-frames:v", "1", "-vf", "scale='min(192,iw)':-2", "-q:v", "6", "-f", "mjpeg", "pipe:1"]
    data = ffmpeg.read_output(["-loglevel", "error", *_STRICT, *source, *picture], path)
    if not data:
        raise FfmpegError(f"no frame at {seconds:g} s", where=str(path))
    return data


def shot_comment(shot_id: str, key: str) -> str:
    """Return the comment in the video of a shot: its id, and the first half of its key."""
    return f"wancli {shot_id} {key[:16]}"


def names_shot(path: Path, key: str) -> bool:
    """Return whether the comment in a video has the key of this shot. The id may have been another then."""
    with disk.opened(path) as file:
        start = file.read(_COMMENT_WITHIN)
    return re.search(rb"wancli [^\0]{1,1000} " + re.escape(key[:16].encode()), start) is not None


def to_rgb24(frames_CTYX: Tensor) -> memoryview:
    """Convert frames in [-1, 1] to bytes [T, Y, X, 3], trunc((x + 1) / 2 * 255) as in the official code."""
    unit_CTYX = frames_CTYX.float().clamp(-1, 1).add_(1).div_(2).mul_(255)
    return unit_CTYX.byte().permute(1, 2, 3, 0).contiguous().cpu().numpy().data


def check_ffmpeg(codec: str = "h264") -> None:
    """Check that ffmpeg is found, runs, and has the encoder of a codec. Raises FfmpegError."""
    name = _CODECS[codec][1]
    if name.encode() not in ffmpeg.list_encoders():
        where = str(ffmpeg.find_executable())
        raise FfmpegError(f"this ffmpeg has no {name} encoder", where=where, hint=ffmpeg.INSTALL_HINT)


def _input_arguments(path: Path) -> list[str]:
    source = ["-f", "mp4", "-i", f"file:{path.absolute()}"]
    return ["-loglevel", "error", *_STRICT, *source, "-map", "0:v:0", *ffmpeg.keep_frames_arguments()]


def _read_checksums(path: Path, reported_path: Path) -> tuple[dict[bytes, bytes], int]:
    """Decode a video from end to end; return the header that ffmpeg reports, and the number of frames.

    The lines are not kept: a damaged file may have ffmpeg report frames without end.
    """
    header: dict[bytes, bytes] = {}
    count, rest = 0, b""
    with ffmpeg.Ffmpeg(
        [*_input_arguments(path), "-f", "framecrc", "pipe:1"], reported_path, has_input=False
    ) as reader:
        for chunk in reader.receive():
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if not line.startswith(b"#"):
                    count += bool(line)
                elif b" 0: " in line:
                    name, value = line[1:].split(b" 0: ", 1)
                    header[name] = value
        reader.finish()
    return header, count
