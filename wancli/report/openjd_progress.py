"""`render --progress openjd`: lines on stdout by which Open Job Description follows an action.

Progress is that of the whole batch, see `wancli.batch_progress`. Open Job Description ignores the paths of
finished shots between these lines.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from wancli.batch_progress import BatchProgress
from wancli.errors import Stopped
from wancli.progress import Phase, Progress, make_printable, phase_title
from wancli.stdio import describe_gaps, write_line
from wancli.units import pluralize

if TYPE_CHECKING:
    from wancli.engine.outcome import Outcome
    from wancli.plan.render_plan import Plan

_SECONDS = 1.0  # between two lines of progress


class OpenJdProgress(Progress):
    """A display that writes `openjd_progress`, `openjd_status` and `openjd_fail`."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        describe_gaps(out, _describe_gap)
        self._batch = BatchProgress()
        self._next = 0.0

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, Stopped):
            self._write("status", str(error))
        elif error:
            self._write("fail", str(error) or type(error).__name__)

    def on_plan(self, plan: Plan) -> None:
        self._batch.on_plan(plan)

    def on_outcome(self, outcome: Outcome) -> None:
        if outcome.error:
            self._write("fail", f"shot {outcome.shot.id}: {outcome.error}")
        if self._batch.on_outcome(outcome):
            self._write_progress()

    @contextmanager
    def phase(self, name: str, shots: Sequence[str], total: int) -> Iterator[Phase]:  # noqa: ARG002
        done = f"{self._batch.finished} of {self._batch.shots} shots done"
        self._write("status", f"{phase_title(name, shots)} ({done})")
        yield _Phase(self, self._batch.begin_phase(name, shots))

    def on_step(self, ids: Sequence[str], n: int) -> None:
        self._batch.on_step(ids, n)
        if ids and time.monotonic() >= self._next:
            self._write_progress()

    def warn(self, text: str) -> None:
        self._write("status", f"warning: {text}")

    def _write_progress(self) -> None:
        self._next = time.monotonic() + _SECONDS
        percent = f"{100 * self._batch.share:.1f}"
        self._write("progress", percent, expendable=True)

    def _write(self, kind: str, text: str, *, expendable: bool = False) -> None:
        write_line(self._out, _format(kind, text), expendable=expendable)


def _format(kind: str, text: str) -> str:
    """Format a message on one line: a second line could be a message of its own, with a text from the job."""
    return f"openjd_{kind}: {' '.join(make_printable(text).split(chr(10)))}"


def _describe_gap(lines: int) -> str:
    return _format("status", f"{pluralize(lines, 'line')} of progress dropped here: stdout was not read")


class _Phase:
    def __init__(self, display: OpenJdProgress, ids: Sequence[str]) -> None:
        self._display, self._ids = display, ids

    def advance(self, n: int = 1, note: str = "") -> None:  # noqa: ARG002
        self._display.on_step(self._ids, n)
