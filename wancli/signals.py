"""Stop requests: the first SIGTERM, SIGINT or SIGUSR1 sets a flag, and the work polls it.

The work looks at the flag where stopping loses nothing: between steps, prompts and chunks of frames. A second
signal ends the process at once, with exit code 128 + its number, as a shell reports a killed process. ffmpeg
then dies with it (`wancli.video.ffmpeg`), and the files on disk are whole (`wancli.storage.atomic`).
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
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stop:
    """Whether the work is to stop: after a signal (`reason`), or because too many shots failed."""

    def __init__(self) -> None:
        self.reason: Reason | None = None
        self.failure_limit_reached = False

    @property
    def requested(self) -> bool:
        return self.failure_limit_reached or self.reason is not None

    def error(self, detail: str) -> Stopped:
        """Return the error to raise once all states are saved; `detail` says how far the work is."""
        kind = Interrupted if self.reason == "SIGINT" else Stopped
        why = self.reason or ("failed shots" if self.failure_limit_reached else "an unreported cause")
        return kind(f"stopped by {why}; {detail}")


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Yield a flag that signals set while the block runs, and restore the former handlers afterwards.

    An ignored signal stays ignored, as Ctrl-C in the background of a script. For the main thread only.
    """
    stop = Stop()

    def handle(number: int, _: FrameType | None) -> None:
        if stop.reason:
            with suppress(OSError):
                os.write(2, b"wancli: ended at once; what was saved before is on disk\n")
            os._exit(128 + number)
        stop.reason = cast("Reason", signal.Signals(number).name)

    with _handle_signals(_STOP_SIGNALS, handle):
        yield stop


@contextmanager
def raise_on_signal() -> Iterator[None]:
    """Raise Stopped on SIGTERM and SIGUSR1 while the block runs.

    The command can then report the signal and exit with 75, after which schedulers run it again. Once there
    is work to save, `stop_on_signal` replaces this.
    """

    def handle(number: int, _: FrameType | None) -> None:
        raise Stopped(f"stopped by {signal.Signals(number).name}")

    with _handle_signals((signal.SIGTERM, signal.SIGUSR1), handle):
        yield


@contextmanager
def _handle_signals(
    numbers: Sequence[signal.Signals], handle: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Install a handler for those of the signals that are not ignored, while the block runs."""
    handled = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
