"""How long to go on, and what no input may do: end in more than a WancliError, hang, or fill the memory."""

from __future__ import annotations

import functools
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from hypothesis import given, settings
from hypothesis import strategies as st

from wancli.errors import WancliError

FACTOR = float(os.environ.get("WANCLI_FUZZ", "1"))  # 10 goes on for ten times as long
EXAMPLES = 50  # of one round; rounds go on until the time is over
PATIENCE = 2.0  # seconds of processor time, so that a busy machine makes no hang
GROWTH = 150e6  # bytes


class Hang(BaseException):
    """Not an Exception, so that nothing that is tested catches it."""


@functools.cache
def _collect_constants() -> None:
    """Let Hypothesis read the constants of all our modules, which it does at its first example.

    In a clean clone that takes seconds and 200 MB, which are not those of an input.
    """

    @settings(max_examples=1, database=None, deadline=None)
    @given(st.integers(), st.text())
    def draw(number: int, text: str) -> None:
        pass

    draw()


class Budget:
    """Seconds for one test, after which its examples are over at once; `count` are those that were tried."""

    def __init__(self, seconds: float) -> None:
        _collect_constants()
        self._end = time.monotonic() + seconds * FACTOR
        self.count = self.refused = self.silent = 0
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
        self._before = _peak()

    @property
    def over(self) -> bool:
        return time.monotonic() > self._end and self.count > 0

    @contextmanager
    def attempt(self, data: bytes) -> Iterator[None]:
        """One input. A refusal is fine; all else that ends the block is not."""

        def hung(_: int, __: FrameType | None) -> None:
            raise Hang

        before = signal.signal(signal.SIGPROF, hung)
        signal.setitimer(signal.ITIMER_PROF, PATIENCE)
        self.count += 1
        try:
            yield
        except WancliError as error:
            self.refused += 1
            self.silent += not str(error).strip()
        except BaseException as error:
            error.add_note(f"input: {data!r}")
            raise
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)

    def check(self) -> None:
        """That something was tried, something refused, and nothing grew."""
        assert self.count
        assert self.refused
        assert not self.silent
        grown = _peak() - self._before
        assert grown < GROWTH, f"{grown / 1e6:.0f} MB more after {self.count} inputs"


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) * 1024
