"""A worker on a Ray cluster: an actor that plans the job itself and renders the shots that it is sent.

Claims (`wancli.storage.claims`) keep two workers from rendering one shot. So Ray may restart a dead worker
and repeat its call, which resumes from the states on disk. Errors go to the driver as plain data.
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
    from wancli.plan.render_plan import Plan


@dataclass(frozen=True)
class Task:
    """The job that every worker plans and renders: the job file and the options of the command line."""

    job: str
    folder: str  # the working folder of the command, for relative paths
    flags: CliOverrides
    cache: str
    measure: bool
    force: Force | None  # the outputs as the driver found them
    retries: int
    waits: bool


class Worker:
    """The actor, in a process of its own, which Ray restarts if it dies."""

    def __init__(self, task: Task) -> None:
        from wancli.engine.networks import ModelCache

        self._task = task
        self._stop = Stop()
        self._model_cache = ModelCache()
        self._plan: Plan | None = None

    def stop(self, reason: Any) -> None:
        """Stop after the next step, with all states on disk."""
        self._stop.reason = reason

    def render(self, keys: Mapping[int, str]) -> Record:
        """Render the shots with these indices and keys; return their outcomes, and the error that ended it.

        When Ray repeats the call after a worker died, finished shots are not rendered again.
        """
        outcomes: list[Record] = []
        raised: WancliError | None = None
        try:
            for outcome in self._render_shots(keys):
                error = error_to_dict(outcome.error) if outcome.error else None
                facts = {"index": outcome.shot.index, "status": outcome.status}
                outcomes.append(facts | {"error": error, "stack": outcome.stack})
        except Stopped:
            pass  # the driver requested it, or other workers claimed the remaining shots
        except WancliError as error:
            raised = error
        return {"outcomes": outcomes, "raised": error_to_dict(raised) if raised else None}

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
                f"{socket.gethostname()} would render other pixels than the driver",
                where=task.job,
                hint="Set memory.device and memory.dtype in the job; use one wancli, one checkpoint.",
            )
        store, policy = Store(Path(task.cache) / "embeddings"), FailurePolicy(retries=task.retries)
        with Claims(waits_for_others=task.waits) as claims:
            context = RenderContext(
                store, Progress(), task.force, self._stop, policy, claims, self._model_cache
            )
            yield from batch.render(replace(self._plan, shots=shots, unselected=()), context)


def _build_plan(task: Task) -> Plan:
    from wancli.job.loader import load
    from wancli.plan import planner

    try:
        os.chdir(task.folder)
    except OSError as error:
        raise MachineError(
            f"{socket.gethostname()} cannot open it: {error.strerror}",
            where=task.folder,
            hint="All machines of the cluster need the folders of the job, the model and the output.",
        ) from error
    hashes = Path(task.cache) / "hashes.json"
    return planner.build_plan(load(Path(task.job), task.flags), hashes, measure=task.measure)


def error_to_dict(error: WancliError) -> Record:
    """Convert an error to plain data."""
    return {"code": error.code, "message": error.message, "where": error.where, "hint": error.hint}


def error_from_dict(facts: Record) -> WancliError:
    """Convert the data of `error_to_dict` back to an error."""
    kind = next((kind for kind in error_types() if kind.code == facts["code"]), Bug)
    return kind(facts["message"], where=facts["where"], hint=facts["hint"])
