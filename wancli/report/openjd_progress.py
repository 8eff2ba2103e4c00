"""`render --progress openjd`: the lines by which Open Job Description follows an action, on stdout.

Progress is that of the whole batch: every step of a shot counts one, and so does the rest of it, decoding and
writing. Paths of finished shots between these lines are none of its messages, and mean nothing to it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from wancli.errors import Stopped
from wancli.progress import Phase, Progress, make_printable
from wancli.stdio import line

if TYPE_CHECKING:
    from wancli.engine.outcome import Outcome
    from wancli.plan.shot import Plan

_SECONDS = 1.0  # between two lines of progress


class OpenJD(Progress):
    """Writes `openjd_progress`, `openjd_status` and `openjd_fail`."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._todo: dict[str, int] = {}  # the units that a shot counts, by its id
        self._done: dict[str, int] = {}
        self._next = 0.0
        self._over = 0

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, Stopped):
            self._say("status", str(error))
        elif error:
            self._say("fail", str(error) or type(error).__name__)

    def planned(self, plan: Plan) -> None:
        self._todo = {s.id: s.steps - plan.schedule.placement(s).shared_steps + 1 for s in plan.shots}
        self._done = dict.fromkeys(self._todo, 0)

    def came_to(self, outcome: Outcome) -> None:
        id = outcome.shot.id
        if outcome.error:
            self._say("fail", f"shot {id}: {outcome.error}")
        if outcome.status not in ("stopped", "elsewhere"):
            self._done[id] = self._todo[id]
            self._over += 1
            self._show()

    @contextmanager
    def phase(self, shot: str, name: str, total: int, ids: Sequence[str] = ()) -> Iterator[Phase]:  # noqa: ARG002
        self._say("status", f"{name} {shot} ({self._over} of {len(self._todo)} shots done)")
        stepped = [id for id in ids or [shot] if id in self._todo] if name == "sample" else []
        yield _Phase(self, stepped)

    def step(self, ids: Sequence[str], n: int) -> None:
        for id in ids:  # the last unit is for when it is finished
            self._done[id] = min(self._done[id] + n, self._todo[id] - 1)
        if ids and time.monotonic() >= self._next:
            self._show()

    def warn(self, text: str) -> None:
        self._say("status", f"warning: {text}")

    def _show(self) -> None:
        self._next = time.monotonic() + _SECONDS
        self._say("progress", f"{100 * sum(self._done.values()) / sum(self._todo.values()):.1f}")

    def _say(self, kind: str, text: str) -> None:
        # On one line: what came on a second one could be another message, a text of the job's choice.
        line(self._out, f"openjd_{kind}: {' '.join(make_printable(text).split(chr(10)))}")


class _Phase:
    def __init__(self, display: OpenJD, ids: Sequence[str]) -> None:
        self._display, self._ids = display, ids

    def advance(self, n: int = 1, note: str = "") -> None:  # noqa: ARG002
        self._display.step(self._ids, n)
