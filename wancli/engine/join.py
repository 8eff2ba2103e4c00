"""Joined videos of chains: one MP4 of all shots, in which a frame that two shots share appears once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from wancli.engine.context import RenderContext
from wancli.engine.preflight import is_finished
from wancli.plan.pictures import Join
from wancli.plan.render_plan import Plan, format_shots
from wancli.plan.shot import Shot
from wancli.storage import atomic, sidecars
from wancli.video import mp4

_SEARCH_BYTES = 1 << 22  # the comment of an MP4 is in its header, which comes first


def write_joins(plan: Plan, context: RenderContext) -> None:
    """Write every joined video whose shots are finished, unless it exists already.

    Raises FfmpegError, NoSpace, MachineError, and Stopped before a video.
    """
    by_index = {shot.index: shot for shot in plan.all_shots}
    for join in plan.joins:
        shots = [by_index[index] for index in join.shots]
        missing = [shot for shot in shots if not is_finished(shot)]
        if missing:
            context.progress.warn(f"{join.path} is not written: {format_shots(missing)} not finished")
            continue
        if context.stop.reason:
            raise context.stop.error(f"shots are done, {join.path.name} is not")
        _write(join, shots)
        context.progress.note(f"joined: {join.path}")


def _write(join: Join, shots: Sequence[Shot]) -> None:
    digest = hashlib.sha256("".join(shot.key for shot in shots).encode()).hexdigest()
    comment = f"wancli joined {digest[:16]}"
    if sidecars.has_marker(join.path, comment.encode(), _SEARCH_BYTES):
        return
    if sidecars.has_marker(join.path, b"wancli joined ", _SEARCH_BYTES):
        atomic.remove(join.path)
    atomic.move_aside(join.path)
    first = shots[0]
    mp4.write_mp4(
        _read_frames(shots),
        join.path,
        width=first.width,
        height=first.height,
        fps=first.fps,
        frame_count=sum(shot.frames for shot in shots) - (len(shots) - 1),
        crf=first.crf,
        codec=first.codec,
        comment=comment,
    )


def _read_frames(shots: Sequence[Shot]) -> Iterator[bytes]:
    """Yield the frames of all videos; of each but the first without the one that it begins with."""
    for number, shot in enumerate(shots):
        for index, frame in enumerate(mp4.read_frames(shot.output)):
            if index or not number:
                yield frame.rgb
