"""How far the shots of a batch are: the place of a shot, the share that is done, and the time left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wancli.engine.outcome import Outcome
    from wancli.plan.render_plan import Plan


class BatchProgress:
    """Counts units of work: every step of a shot is one, decoding and writing together are one more.

    Shots of an earlier run or of other workers count as done, and not for the time left, which is at the
    speed of this run.
    """

    def __init__(self) -> None:
        self._todo: dict[str, int] = {}  # units of each shot, by its id
        self._done: dict[str, int] = {}
        self._own = 0  # units that this run did
        self._began: float | None = None  # of the first step
        self.finished = 0

    @property
    def shots(self) -> int:
        return len(self._todo)

    @property
    def share(self) -> float:
        """The share of the units that is done, from 0 to 1."""
        return sum(self._done.values()) / sum(self._todo.values())

    def on_plan(self, plan: Plan) -> None:
        self._todo = {s.id: s.steps - plan.schedule.placement(s).shared_steps + 1 for s in plan.shots}
        self._done = dict.fromkeys(self._todo, 0)

    def on_outcome(self, outcome: Outcome) -> bool:
        """Count a shot that is over; return False if another run or worker goes on with it."""
        if outcome.status in ("stopped", "elsewhere"):
            return False
        id = outcome.shot.id
        self._done[id] = self._todo[id]
        self._own += outcome.status == "rendered"
        self.finished += 1
        return True

    def begin_phase(self, name: str, shots: Sequence[str]) -> list[str]:
        """Return the ids of the shots whose steps a phase takes; none if it takes none."""
        ids = [id for id in shots if id in self._todo] if name == "sample" else []
        if ids and self._began is None:
            self._began = time.monotonic()
        return ids

    def on_step(self, ids: Sequence[str], n: int) -> None:
        for id in ids:  # the last unit is counted by on_outcome
            done = min(self._done[id] + n, self._todo[id] - 1)
            self._own += done - self._done[id]
            self._done[id] = done

    def format_place(self, shots: Sequence[str]) -> str:
        """Return the place of shots in a batch of several: `[7/24] `, for shots that share steps `[7-9/24] `.

        Shots are counted as they are finished, those of earlier runs first. Returns an empty text for others.
        """
        total = len(self._todo)
        if total < 2 or not shots or not self._todo.keys() >= {*shots}:
            return ""
        first = min(self.finished + 1, total)
        last = min(self.finished + len(shots), total)
        return f"[{first}/{total}] " if last == first else f"[{first}-{last}/{total}] "

    def seconds_left(self) -> float | None:
        """Return the seconds until the last of several shots is done; None before a step is."""
        if self._began is None or not self._own or len(self._todo) < 2:
            return None
        left = sum(self._todo.values()) - sum(self._done.values())
        return (time.monotonic() - self._began) / self._own * left
