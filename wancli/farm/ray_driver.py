"""`--engine ray`: workers on a Ray cluster, each an actor that holds the networks of one model.

This is the driver. It sends the indices of the shots of one round (`wancli.plan.batching`) to a worker
(`wancli.farm.ray_worker`), preferably one that already holds their model. The worker returns a small record
for each shot. Videos and manifests are on a disk that all machines share.
"""

from __future__ import annotations

import io
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from wancli.engine.batch import iter_resolved, track_outcomes
from wancli.engine.manifest_body import Record
from wancli.engine.outcome import Outcome, failed_outcome
from wancli.engine.preflight import PreflightResult, check_outputs
from wancli.errors import ErrorCapture, JobError, MachineError, WancliError
from wancli.farm.ray_worker import Task, Worker, error_from_dict
from wancli.plan import batching
from wancli.plan.render_plan import format_shots_inline
from wancli.storage import disk, manifest

if TYPE_CHECKING:
    from wancli.engine.context import RenderContext
    from wancli.plan.model_spec import ModelSpec
    from wancli.plan.render_plan import Plan
    from wancli.plan.shot import Shot

_RESTARTS, _TASK_RETRIES = 3, 2
_POLL_SECONDS = 0.2  # seconds between two looks for signals


@dataclass(frozen=True)
class Cluster:
    """The address of a cluster, None to start one on this machine; the cores of a worker without a GPU, None
    for all cores of its machine."""

    address: str | None = None
    cpus_per_worker: int | None = None


def render(plan: Plan, context: RenderContext, task: Task, cluster: Cluster) -> Iterator[Outcome]:
    """Render as `batch.render`, by the workers of a cluster.

    Raises MachineError if Ray is not installed, the cluster is unreachable, or all workers died for good.
    """
    if chained := next((shot for shot in plan.shots if shot.continues), None):
        raise JobError(
            f"shot {chained.id} continues another one, and the workers of Ray do not wait for each other",
            hint="Start `wancli render` without --engine ray on every machine: they wait.",
        )
    todo, refused = check_outputs(plan, context)
    preflight = PreflightResult(batching.reschedule(plan.schedule, todo), refused)
    return track_outcomes(_render_rounds(plan, preflight, context, task, cluster), todo, context)


def _render_rounds(
    plan: Plan, preflight: PreflightResult, context: RenderContext, task: Task, cluster: Cluster
) -> Iterator[Outcome]:
    """Yield the outcomes that are known already, then those of the rounds, model by model."""
    yield from iter_resolved(plan, preflight)
    schedule = preflight.schedule
    models = list(dict.fromkeys(shot.model for shot in schedule.shots))
    rounds = [[shot for batch in round_ for shot in batch] for round_ in schedule.rounds]
    rounds.sort(key=lambda shots: models.index(shots[0].model))
    if rounds:
        with redirect_stdout(_ThreadStdout()):
            ray = _connect(cluster)
            try:
                for outcome in _dispatch(ray, rounds, context, task, cluster):
                    shared_steps = schedule.placement(outcome.shot).shared_steps
                    yield replace(outcome, shared_steps=shared_steps)
            finally:
                ray.shutdown()  # ends all workers


class _ThreadStdout(io.TextIOBase):
    """A stdout for the results of this thread. Threads of Ray print messages, which go to stderr."""

    def __init__(self) -> None:
        self._out, self._mine = sys.stdout, threading.current_thread()

    def write(self, text: str) -> int:
        return (self._out if threading.current_thread() is self._mine else sys.stderr).write(text)

    def flush(self) -> None:
        self._out.flush()


def _connect(cluster: Cluster) -> Any:
    try:
        import ray
    except ImportError as error:
        raise MachineError(
            "--engine ray needs Ray, which is not installed", hint="pip install 'wancli[ray]'"
        ) from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a farm sends no statistics
    handler = signal.getsignal(signal.SIGTERM)  # ray.init replaces it
    quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    try:
        if cluster.address is None:
            ray.init("local", include_dashboard=False, **quiet)
        else:
            ray.init(cluster.address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        hint = "`ray status` shows the cluster; all its machines need the same version of Ray and of Python."
        where = f"--address {cluster.address}" if cluster.address else "--engine ray"
        raise MachineError(f"no Ray cluster: {error}", where=where, hint=hint) from error
    signal.signal(signal.SIGTERM, handler)
    return ray


@dataclass(eq=False)
class _ActorSlot:
    """A worker, and the model that it holds in memory."""

    number: int
    actor: Any
    model: ModelSpec | None = None


def _dispatch(
    ray: Any, rounds: list[list[Shot]], context: RenderContext, task: Task, cluster: Cluster
) -> Iterator[Outcome]:
    """Send rounds to workers until all are done. After a stop request, workers save their states."""
    idle = _create_workers(ray, rounds, task, cluster)
    count = len(idle)
    busy: dict[Any, tuple[_ActorSlot, list[Shot]]] = {}
    ending: WancliError | None = None
    while busy or (rounds and not (ending or context.stop.requested)):
        while idle and rounds and not (ending or context.stop.requested):
            slot, shots = _match(idle, rounds)
            context.progress.note(f"{format_shots_inline(shots)}: to worker {slot.number} of {count}")
            busy[slot.actor.render.remote({shot.index: shot.key for shot in shots})] = slot, shots
        for done in ray.wait(list(busy), timeout=_POLL_SECONDS)[0]:
            slot, shots = busy.pop(done)
            try:
                result = ray.get(done)
            except ray.exceptions.RayActorError:
                context.progress.warn(
                    f"worker {slot.number} died for good; {format_shots_inline(shots)} goes to another"
                )
                rounds.insert(0, shots)
                continue
            idle.append(slot)
            yield from _read_outcomes(shots, result["outcomes"])
            ending = ending or (error_from_dict(result["raised"]) if result["raised"] else None)
        if not (idle or busy):
            raise MachineError(
                f"all {count} workers died",
                where="--engine ray",
                hint="The logs of Ray say why; too little memory is most likely. The same command resumes.",
            )
        if ending or context.stop.requested:
            for slot, _ in busy.values():  # repeatedly: Ray may just have restarted one
                slot.actor.stop.remote(context.stop.reason or "SIGTERM")
    if ending:
        raise ending


def _create_workers(
    ray: Any, rounds: Sequence[Sequence[Shot]], task: Task, cluster: Cluster
) -> list[_ActorSlot]:
    """Create a worker for each GPU, or for a number of cores, but no more workers than rounds."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(shot.model.device == "cuda" for shots in rounds for shot in shots):
        each = {"num_gpus": 1, "num_cpus": 1}
        fit = sum(int(machine.get("GPU", 0)) for machine in machines)
        missing = "no GPU"
    else:
        cores = [int(machine.get("CPU", 0)) for machine in machines]
        each = {"num_cpus": cluster.cpus_per_worker or min(filter(None, cores), default=1)}
        fit = sum(have // each["num_cpus"] for have in cores)
        missing = f"no machine with {each['num_cpus']} cores"
    if not fit:
        raise MachineError(f"the cluster has {missing}", where="--engine ray")
    actor = ray.remote(max_restarts=_RESTARTS, max_task_retries=_TASK_RETRIES, max_concurrency=2, **each)(
        Worker
    )  # two calls at a time: `render`, and `stop` meanwhile
    return [_ActorSlot(number, actor.remote(task)) for number in range(1, min(fit, len(rounds)) + 1)]


def _match(idle: list[_ActorSlot], rounds: list[list[Shot]]) -> tuple[_ActorSlot, list[Shot]]:
    """Take the first round whose model an idle worker holds, else the first round and a fresh worker."""
    matches = ((slot, shots) for shots in rounds for slot in idle if slot.model == shots[0].model)
    unused = next((slot for slot in idle if slot.model is None), idle[0])
    slot, shots = next(matches, (unused, rounds[0]))
    rounds.remove(shots)
    idle.remove(slot)
    slot.model = shots[0].model
    return slot, shots


def _read_outcomes(shots: Sequence[Shot], outcomes: Sequence[Record]) -> Iterator[Outcome]:
    """Yield the outcomes that a worker reports for the shots of a round."""
    by_index = {shot.index: shot for shot in shots}
    for record in outcomes:
        shot, status = by_index[record["index"]], record["status"]
        if status in ("rendered", "already done"):
            yield _verify_output(shot, status)
        else:
            error = error_from_dict(record["error"]) if record["error"] else None
            yield Outcome(shot, status, None, error, record["stack"])


def _verify_output(shot: Shot, status: Literal["rendered", "already done"]) -> Outcome:
    """Check on this host that the output of a shot verifies which a worker reports as done."""
    with ErrorCapture() as look:
        disk.list_folder(shot.output.parent)  # makes NFS ask its server
        wrong = manifest.find_problems(shot.output, shot.key)
    if look.error:
        return failed_outcome(shot, look)
    if wrong:
        error = MachineError(
            f"a worker reports it as {status}, but {socket.gethostname()} finds: {wrong[0]}",
            where=str(shot.output),
            hint=f"All machines of the cluster must share one folder {shot.output.parent}.",
        )
        return Outcome(shot, "failed", error=error)
    return Outcome(shot, status, manifest.read_if_usable(shot.manifest))
