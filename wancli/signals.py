"""Stop requests: the first signal of a person or a scheduler sets a flag, and the work polls it.

The work looks at the flag where stopping loses nothing: between steps, prompts and chunks of frames. A second
signal ends the process at once, with exit code 128 + its number, as a shell reports a killed process. ffmpeg
then dies with it (`wancli.video.ffmpeg`), and the files on disk are whole (`wancli.storage.atomic`).

This module is imported before anything slow, so that a signal that comes early finds a handler.
"""

from __future__ import annotations

import _thread
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

if TYPE_CHECKING:
    from types import FrameType

    from wancli.errors import Stopped

Reason = Literal["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"]
# A terminal that closes sends SIGHUP. LSF and SGE warn with SIGUSR2, and a limit on CPU time with SIGXCPU.
STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
# The system sends these again and again (SIGXCPU every second), and SIGHUP with SIGTERM when a session ends:
# they are no second signal.
REPEATED_SIGNALS = (signal.SIGHUP, signal.SIGXCPU)
_LAST_WORDS_SECONDS = 0.2
_Handler = Callable[[int, "FrameType | None"], None]


class StartHandler:
    """A handler of signals before the work, and what handles them after it: by default they are ignored."""

    def __init__(self, handle: _Handler, afterwards: Any = signal.SIG_IGN) -> None:
        self._handle, self.afterwards = handle, afterwards

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._handle(number, frame)


class Stop:
    """Whether the work is to stop: after a signal (`reason`), or because too many shots failed.

    While `at_once`, a signal also raises Stopped, or KeyboardInterrupt: there is nothing to save yet. The
    flag holds even if a library that calls back into Python swallows the error.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.at_once = at_once
        self.reason: Reason | None = None
        self.failure_limit_reached = False
        self._requests = 0  # those of them that count as a first or second signal

    @property
    def requested(self) -> bool:
        return self.failure_limit_reached or self.reason is not None

    def error(self, detail: str) -> Stopped:
        """Return the error to raise once all states are saved; `detail` says how far the work is."""
        from wancli.errors import Interrupted, Stopped

        kind = Interrupted if self.reason == "SIGINT" else Stopped
        why = self.reason or ("failed shots" if self.failure_limit_reached else "an unreported cause")
        return kind(f"stopped by {why}; {detail}")

    def on_signal(self, number: int, _: FrameType | None) -> None:
        name = cast("Reason", signal.Signals(number).name)
        if self.at_once:
            from wancli.errors import Stopped

            self.reason = self.reason or name
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise Stopped(f"stopped by {name}")
        if number not in REPEATED_SIGNALS:
            self._requests += 1
        if self._requests > 1:
            _exit_now("ended at once; what was saved before is on disk", 128 + number)
        self.reason = self.reason or name


@contextmanager
def stop_on_signal(*, at_once: bool = False) -> Iterator[Stop]:
    """Yield a flag that signals set while the block runs, or with `at_once` as long as that holds.

    An ignored signal stays ignored, as Ctrl-C in the background of a script. For the main thread only.
    """
    stop = Stop(at_once=at_once)
    before = handle_signals(STOP_SIGNALS, stop.on_signal)
    try:
        yield stop
    finally:
        stop.at_once = False
        end_work(before)


def handle_signals(numbers: Sequence[signal.Signals], handle: _Handler) -> dict[signal.Signals, Any]:
    """Install a handler for those of the signals that are not ignored; return their former handlers."""
    handled = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handle) for number in handled}


def restore_signals(before: Mapping[signal.Signals, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)


def end_work(before: Mapping[signal.Signals, Any]) -> None:
    """Restore handlers after the work. In a process that now ends, nothing is left to be stopped: it ignores
    the signals, and ends with the exit code of the work."""
    restore_signals(
        {n: old.afterwards if isinstance(old, StartHandler) else old for n, old in before.items()}
    )


def exit_on_signal(number: int, _: FrameType | None) -> NoReturn:
    """Exit on a signal that comes while the command line is imported, when nothing is started yet.

    Exits with 75, so that a scheduler runs the command again; after Ctrl-C, dies of SIGINT.
    """
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _exit_now("interrupted; nothing was started", None)
    _exit_now(f"stopped by {signal.Signals(number).name}; nothing was started", os.EX_TEMPFAIL)


def _exit_now(text: str, code: int | None) -> NoReturn:
    """Print on stderr, if its reader takes it, and exit; without a code, die of SIGINT."""
    data = f"wancli: {text}\n".encode()
    written = _thread.allocate_lock()
    written.acquire()

    def write() -> None:
        with suppress(OSError):
            os.write(2, data)
        written.release()

    with suppress(RuntimeError):  # no thread can be started
        _thread.start_new_thread(write, ())
        written.acquire(timeout=_LAST_WORDS_SECONDS)
    if code is None:
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code or 0)
