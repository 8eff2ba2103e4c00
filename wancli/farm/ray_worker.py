"""A worker on a Ray cluster: an actor that plans a job for itself, and renders the shots it is asked for.

Claims (`wancli.storage.claims`) keep two workers from doing one thing, so that Ray may start a dead one again
and repeat what it was at: it goes on from the states on disk. Errors go to the driver as plain data.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wancli.engine import batch
from wancli.engine.context import Force
from wancli.engine.manifest_body import Record
from wancli.engine.outcome import Outcome
from wancli.errors import Bug, MachineError, Stopped, WancliError, error_types
from wancli.job.cli_overrides import CliOverrides
from wancli.signals import Stop

if TYPE_CHECKING:
    from wancli.plan.shot import Plan


@dataclass(frozen=True)
class Task:
    """What every worker plans and renders for itself: a job file and the flags, as they were given."""

    job: str
    folder: str  # where the command was given: relative paths begin there
    flags: CliOverrides
    cache: str
    measure: bool
    force: Force | None  # as the driver found the outputs
    retries: int
    waits: bool


class Worker:
    """What Ray runs in a process of its own, and again if that dies."""

    def __init__(self, task: Task) -> None:
        from wancli.engine.networks import ModelCache

        self._task = task
        self._stop = Stop()
        self._kept = ModelCache()
        self._plan: Plan | None = None

    def stop(self, reason: Any) -> None:
        """Ends what is under way after the next step, with all states on disk."""
        self._stop.reason = reason

    def render(self, keys: Mapping[int, str]) -> Record:
        """What became of the shots of these indices, whose keys must be the same here, and the error that
        ended it, if one did. Asked again, after a worker died, it makes none again that is made."""
        found: list[Record] = []
        raised: WancliError | None = None
        try:
            for outcome in self._render_shots(keys):
                error = error_to_dict(outcome.error) if outcome.error else None
                about = {"index": outcome.shot.index, "status": outcome.status}
                found.append(about | {"error": error, "stack": outcome.stack})
        except Stopped:
            pass  # the driver knows why; or others are at the rest, as the outcomes say
        except WancliError as error:
            raised = error
        return {"outcomes": found, "raised": error_to_dict(raised) if raised else None}

    def _render_shots(self, keys: Mapping[int, str]) -> Iterator[Outcome]:
        from wancli.engine.context import RenderContext
        from wancli.engine.outcome import FailurePolicy
        from wancli.progress import Progress
        from wancli.storage.cache import Store
        from wancli.storage.claims import Claims

        task = self._task
        self._plan = self._plan or _build_plan(task)
        shots = tuple(shot for shot in self._plan.shots if shot.index in keys)
        if {shot.index: shot.key for shot in shots} != keys:
            raise MachineError(
                f"{socket.gethostname()} would render other pixels than the machine that asks it",
                where=task.job,
                hint="Say memory.device and memory.dtype in the job; use one wancli, one checkpoint.",
            )
        store, policy = Store(Path(task.cache) / "embeddings"), FailurePolicy(retries=task.retries)
        with Claims(waits_for_others=task.waits) as claims:
            tools = RenderContext(store, Progress(), task.force, self._stop, policy, claims, self._kept)
            yield from batch.render(replace(self._plan, shots=shots, unselected=()), tools)


def _build_plan(task: Task) -> Plan:
    from wancli.job.loader import load
    from wancli.plan import planner

    try:
        os.chdir(task.folder)
    except OSError as error:
        raise MachineError(
            f"{socket.gethostname()} does not see it: {error.strerror}",
            where=task.folder,
            hint="All machines of the cluster need the folders of the job, the model and the output.",
        ) from error
    memo = Path(task.cache) / "hashes.json"
    return planner.build_plan(load(Path(task.job), task.flags), memo, measure=task.measure)


def error_to_dict(error: WancliError) -> Record:
    """An error as plain data."""
    return {"code": error.code, "message": error.message, "where": error.where, "hint": error.hint}


def error_from_dict(said: Record) -> WancliError:
    """The error that was `error_to_dict`."""
    kind = next((kind for kind in error_types() if kind.code == said["code"]), Bug)
    return kind(said["message"], where=said["where"], hint=said["hint"])
