"""Being asked to stop: a flag that the first SIGTERM, SIGINT or SIGUSR1 sets, and the work polls.

Whoever works looks at it where stopping loses nothing: between steps, prompts and chunks of frames. A
second signal ends the process at once, with 128 + its number, as the shell says of a killed one; ffmpeg is
on a leash (`wancli.video.ffmpeg`) and dies with it, and what is on disk is whole (`wancli.storage.atomic`).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Literal, cast

from wancli.errors import Interrupted, Stopped

Reason = Literal["SIGTERM", "SIGINT", "SIGUSR1"]
_HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stop:
    """Whether an end is asked for: by which signal, or because `enough` shots failed."""

    def __init__(self) -> None:
        self.reason: Reason | None = None
        self.failure_limit_reached = False

    @property
    def requested(self) -> bool:
        return self.failure_limit_reached or self.reason is not None

    def error(self, left: str) -> Stopped:
        """What is raised once all that can be saved is saved; `left` says where things stand."""
        kind = Interrupted if self.reason == "SIGINT" else Stopped
        why = self.reason or ("failed shots" if self.failure_limit_reached else "what no worker told")
        return kind(f"stopped by {why}; {left}")


@contextmanager
def listening() -> Iterator[Stop]:
    """A flag that the signals set while the block runs; afterwards they mean what they meant before.

    One that is ignored, as Ctrl-C in the background of a script, stays so. For the main thread alone."""
    stop = Stop()

    def heard(number: int, _: FrameType | None) -> None:
        if stop.reason:
            with suppress(OSError):
                os.write(2, b"wancli: ended at once; what was saved before is on disk\n")
            os._exit(128 + number)
        stop.reason = cast("Reason", signal.Signals(number).name)

    with _heeded(_HEARD, heard):
        yield stop


@contextmanager
def unwinding() -> Iterator[None]:
    """SIGTERM and SIGUSR1 raise Stopped while the block runs, so that whoever is in it can say so, and ends
    with 75: schedulers run it again. Where there is work to be saved `listening` replaces this."""

    def heard(number: int, _: FrameType | None) -> None:
        raise Stopped(f"stopped by {signal.Signals(number).name}")

    with _heeded((signal.SIGTERM, signal.SIGUSR1), heard):
        yield


@contextmanager
def _heeded(
    numbers: Sequence[signal.Signals], heard: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, heard) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
