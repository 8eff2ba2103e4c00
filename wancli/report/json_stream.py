"""`render --json-stream`: events as lines of JSON on stdout, for programs.

One event per line, flushed, and at the end exactly one `envelope`, however the command ends: with all shots,
with failures, by an error, a bug or the first signal. Events carry ids and keys, never prompts. Their schema
is `wancli.report.event_schema`; readers must ignore types and keys that they do not know.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

from wancli import __version__
from wancli.errors import Bug, ExitStatus, Interrupted, WancliError
from wancli.progress import Phase, Progress
from wancli.report.event_schema import SCHEMA
from wancli.stdio import describe_gaps, write_line

if TYPE_CHECKING:
    from wancli.engine.outcome import Outcome
    from wancli.plan.render_plan import Plan
    from wancli.plan.shot import Shot

_STEP_SECONDS = 0.1  # at most ten steps a second


class JsonStream(Progress):
    """A display that writes events. When its block ends, however it ends, it writes the envelope."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        describe_gaps(out, lambda lines: _format("gap", {"lines": lines}))
        self._began = time.monotonic()
        self._job: str | None = None
        self._shots: dict[str, Shot] = {}
        self._started: dict[str, float] = {}
        self._outcomes: list[Outcome] = []
        self._status = ExitStatus.OK
        self._report: Path | None = None
        self._next_step = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._write_envelope(_as_wancli_error(error) if error else self._batch_error())

    def on_plan(self, plan: Plan) -> None:
        self._job = plan.name
        self._shots = {shot.id: shot for shot in plan.shots}
        self._event(
            "plan",
            job=plan.name,
            steps=sum(shot.steps for shot in plan.shots),
            shared_steps=sum(plan.schedule.shared_steps().values()),
            shots=[_shot_facts(s) | {"labels": s.labels, "steps": s.steps} for s in plan.shots],
        )

    def on_outcome(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        shot = outcome.shot
        began = self._started.get(shot.id)
        took = None if began is None else round(time.monotonic() - began, 3)
        facts = _shot_facts(shot) | {"labels": shot.labels, "seconds": took, "status": outcome.status}
        if outcome.error:
            self._event("shot-failed", **facts, error=outcome.error.as_dict())
        elif outcome.record:
            video = outcome.record.file(shot.output.name)
            assert video
            self._event("shot-finished", **facts, sha256=video.sha256, bytes=video.bytes)
        else:
            self._event("shot-left", **facts)

    def on_end(self, status: ExitStatus, report: Path | None) -> None:
        self._status, self._report = status, report

    @contextmanager
    def phase(self, name: str, shots: Sequence[str], total: int) -> Iterator[Phase]:
        ids = [id for id in shots if id in self._shots]
        finished = {outcome.shot.id for outcome in self._outcomes}  # a comparison does not start them again
        for id in ids:
            if id not in self._started and id not in finished:
                self._started[id] = time.monotonic()
                self._event("shot-started", **_shot_facts(self._shots[id]))
        began, phase = time.monotonic(), _Phase(self, name, ids, total)
        facts = {"name": name, "shots": ids, "total": total}
        self._event("phase", **facts, state="begin", done=0, seconds=0.0)
        try:
            yield phase
        finally:
            seconds = round(time.monotonic() - began, 3)
            self._event("phase", **facts, state="end", done=phase.done, seconds=seconds)

    def on_step(self, name: str, ids: list[str], done: int, total: int) -> None:
        now = time.monotonic()
        if now >= self._next_step:
            self._next_step = now + _STEP_SECONDS
            facts = {"name": name, "shots": ids, "done": done, "total": total}
            write_line(self._out, _format("step", facts), expendable=True)

    def note(self, text: str) -> None:
        self._event("note", message=text)

    def warn(self, text: str) -> None:
        self._event("warning", message=text)

    def _event(self, kind: str, **facts: Any) -> None:
        _write(self._out, kind, facts)

    def _batch_error(self) -> WancliError | None:
        """Return the error that gave a batch with failed shots its exit code."""
        failed = [outcome.error for outcome in self._outcomes if outcome.error]
        if self._status == ExitStatus.OK or not failed:
            return None
        return next((error for error in failed if error.status == self._status), failed[0])

    def _write_envelope(self, error: WancliError | None) -> None:
        statuses = Counter(outcome.status for outcome in self._outcomes)
        reached = {outcome.shot.id for outcome in self._outcomes}
        counts = {
            "shots": len(self._shots),
            "rendered": statuses["rendered"],
            "already_done": statuses["already done"],
            "failed": statuses["failed"],
            "stopped": statuses["stopped"],
            "elsewhere": statuses["elsewhere"],
            "not_started": len(self._shots.keys() - reached),
        }
        report = str(self._report) if self._report else None
        status = self._status
        if error and not any(outcome.error is error for outcome in self._outcomes):
            status = error.status
        data = {
            "job": self._job,
            "counts": counts,
            "report": report,
            "seconds": round(time.monotonic() - self._began, 3),
        }
        _envelope(self._out, "render", status, data, error)


class _Phase:
    def __init__(self, stream: JsonStream, name: str, ids: list[str], total: int) -> None:
        self._stream, self._name, self._ids, self._total = stream, name, ids, total
        self.done = 0

    def advance(self, n: int = 1, note: str = "") -> None:  # noqa: ARG002
        self.done += n
        self._stream.on_step(self._name, self._ids, self.done, self._total)


def write_refusal(out: TextIO, command: str, error: WancliError) -> None:
    """Write the envelope of a command line that is rejected; it is the only event of its stream."""
    _envelope(out, command, error.status, None, error)


def _envelope(
    out: TextIO, command: str, status: ExitStatus, data: dict[str, Any] | None, error: WancliError | None
) -> None:
    facts = {"ok": status == ExitStatus.OK, "command": command, "version": __version__}
    result = {"exit_code": int(status), "data": data, "error": error.as_dict() if error else None}
    _write(out, "envelope", facts | result)


def _write(out: TextIO, kind: str, facts: dict[str, Any]) -> None:
    write_line(out, _format(kind, facts))


def _format(kind: str, facts: dict[str, Any]) -> str:
    head = {"schema": SCHEMA, "type": kind, "time": datetime.now(UTC).isoformat(timespec="milliseconds")}
    return json.dumps(head | facts)


def _shot_facts(shot: Shot) -> dict[str, Any]:
    return {"index": shot.index, "id": shot.id, "key": shot.key, "path": str(shot.output)}


def _as_wancli_error(error: BaseException) -> WancliError:
    if isinstance(error, WancliError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("stopped by SIGINT")
    return Bug(f"{type(error).__name__}: {error}", hint="stderr names the log with the traceback.")
