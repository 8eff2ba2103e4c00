"""`--engine ray`: workers on a Ray cluster, each an actor that holds the networks of one model.

This is the driver. It sends a worker (`wancli.farm.ray_worker`) the indices of shots that go together
(`wancli.plan.batching`), one that has their model if there is one, and gets back what became of each: small
records. What they made is on the disk that all share, and read from there.
"""

from __future__ import annotations

import io
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from wancli.engine.batch import format_shots_inline, iter_resolved, track_outcomes
from wancli.engine.manifest_body import Record
from wancli.engine.outcome import Outcome
from wancli.engine.preflight import PreflightResult, check_outputs
from wancli.errors import MachineError, WancliError
from wancli.farm.ray_worker import Task, Worker, error_from_dict
from wancli.plan import batching
from wancli.storage import manifest

if TYPE_CHECKING:
    from wancli.engine.context import RenderContext
    from wancli.plan.shot import ModelSpec, Plan, Shot

_RESTARTS, _TASK_RETRIES = 3, 2
_POLL_SECONDS = 0.2  # seconds between two looks for signals


@dataclass(frozen=True)
class Cluster:
    """Which one, None for one of this machine alone; and how many cores a worker has where there is no GPU,
    None for those of a machine."""

    address: str | None = None
    cpus_per_worker: int | None = None


def render(plan: Plan, tools: RenderContext, task: Task, cluster: Cluster) -> Iterator[Outcome]:
    """As `batch.render`, by the workers of a cluster. Raises MachineError where there is no Ray, where the
    cluster cannot be reached, and where all workers died for good."""
    todo, refused = check_outputs(plan, tools)
    found = PreflightResult(tuple(todo), refused)
    return track_outcomes(_outcomes(plan, found, tools, task, cluster), todo, tools)


def _outcomes(
    plan: Plan, found: PreflightResult, tools: RenderContext, task: Task, cluster: Cluster
) -> Iterator[Outcome]:
    yield from iter_resolved(plan, found)
    models = dict.fromkeys(shot.model for shot in found.todo)
    waves = [
        [shot for group in wave for shot in group]
        for model in models
        for wave in batching.waves([shot for shot in found.todo if shot.model == model])
    ]
    if waves:
        with redirect_stdout(_ThreadStdout()):
            ray = _connect(cluster)
            try:
                yield from _dispatch(ray, waves, tools, task, cluster)
            finally:
                ray.shutdown()  # and with it all workers


class _ThreadStdout(io.TextIOBase):
    """What this thread prints is a result. Threads of Ray print what they think of the cluster: to stderr."""

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
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a farm reports to nobody
    heard = signal.getsignal(signal.SIGTERM)  # ray.init puts a handler of its own there
    quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    try:
        if cluster.address is None:
            ray.init("local", include_dashboard=False, **quiet)
        else:
            ray.init(cluster.address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        hint = (
            "`ray status` shows the cluster of this machine; all of it needs one version of Ray and Python."
        )
        where = f"--address {cluster.address}" if cluster.address else "--engine ray"
        raise MachineError(f"no Ray cluster: {error}", where=where, hint=hint) from error
    signal.signal(signal.SIGTERM, heard)
    return ray


@dataclass(eq=False)
class _ActorSlot:
    """A worker, and the model that it holds."""

    number: int
    actor: Any
    model: ModelSpec | None = None


def _dispatch(
    ray: Any, waves: list[list[Shot]], tools: RenderContext, task: Task, cluster: Cluster
) -> Iterator[Outcome]:
    """Sends waves to workers until all are done, or an end is asked for; workers save their states then."""
    idle = _create_workers(ray, waves, task, cluster)
    count = len(idle)
    busy: dict[Any, tuple[_ActorSlot, list[Shot]]] = {}
    ending: WancliError | None = None
    while busy or (waves and not (ending or tools.stop.requested)):
        while idle and waves and not (ending or tools.stop.requested):
            seat, wave = _match(idle, waves)
            tools.progress.note(f"{format_shots_inline(wave)}: to worker {seat.number} of {count}")
            busy[seat.actor.render.remote({shot.index: shot.key for shot in wave})] = seat, wave
        for done in ray.wait(list(busy), timeout=_POLL_SECONDS)[0]:
            seat, wave = busy.pop(done)
            try:
                result = ray.get(done)
            except ray.exceptions.RayActorError:
                tools.progress.warn(
                    f"worker {seat.number} died for good; {format_shots_inline(wave)} goes to another"
                )
                waves.insert(0, wave)
                continue
            idle.append(seat)
            yield from _read_outcomes(wave, result["outcomes"])
            ending = ending or (error_from_dict(result["raised"]) if result["raised"] else None)
        if not (idle or busy):
            raise MachineError(
                f"all {count} workers died",
                where="--engine ray",
                hint="The logs of Ray say why; too little memory is most likely. The same command goes on.",
            )
        if ending or tools.stop.requested:
            for seat, _ in busy.values():  # more than once: one may just have been started again
                seat.actor.stop.remote(tools.stop.reason or "SIGTERM")
    if ending:
        raise ending


def _create_workers(
    ray: Any, waves: Sequence[Sequence[Shot]], task: Task, cluster: Cluster
) -> list[_ActorSlot]:
    """A worker per GPU, or per so many cores, and no more than there are waves."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(shot.model.device == "cuda" for wave in waves for shot in wave):
        each = {"num_gpus": 1, "num_cpus": 1}
        fit = sum(int(machine.get("GPU", 0)) for machine in machines)
        lacking = "no GPU"
    else:
        cores = [int(machine.get("CPU", 0)) for machine in machines]
        each = {"num_cpus": cluster.cpus_per_worker or min(filter(None, cores), default=1)}
        fit = sum(have // each["num_cpus"] for have in cores)
        lacking = f"no machine with {each['num_cpus']} cores"
    if not fit:
        raise MachineError(f"the cluster has {lacking}", where="--engine ray")
    actor = ray.remote(max_restarts=_RESTARTS, max_task_retries=_TASK_RETRIES, max_concurrency=2, **each)(
        Worker
    )  # two calls at a time: `render`, and `stop` meanwhile
    return [_ActorSlot(number, actor.remote(task)) for number in range(1, min(fit, len(waves)) + 1)]


def _match(idle: list[_ActorSlot], waves: list[list[Shot]]) -> tuple[_ActorSlot, list[Shot]]:
    """The first wave whose model an idle worker has, else the first wave and one that has none yet."""
    matches = ((seat, wave) for wave in waves for seat in idle if seat.model == wave[0].model)
    unused = next((seat for seat in idle if seat.model is None), idle[0])
    seat, wave = next(matches, (unused, waves[0]))
    waves.remove(wave)
    idle.remove(seat)
    seat.model = wave[0].model
    return seat, wave


def _read_outcomes(wave: Sequence[Shot], outcomes: Sequence[Record]) -> Iterator[Outcome]:
    by_index = {shot.index: shot for shot in wave}
    for one in outcomes:
        shot, error = by_index[one["index"]], error_from_dict(one["error"]) if one["error"] else None
        made = one["status"] in ("rendered", "already done")
        yield (
            _verify_output(shot, one["status"])
            if made
            else Outcome(shot, one["status"], None, error, one["stack"])
        )


def _verify_output(shot: Shot, status: Literal["rendered", "already done"]) -> Outcome:
    """What a worker says is done, once this host finds it so."""
    with suppress(OSError):
        list(shot.output.parent.iterdir())  # makes NFS ask its server
    if wrong := manifest.find_problems(shot.output, shot.key):
        error = MachineError(
            f"a worker says it is {status}; not so on {socket.gethostname()}: {wrong[0]}",
            where=str(shot.output),
            hint=f"All machines of the cluster must share one folder {shot.output.parent}.",
        )
        return Outcome(shot, "failed", error=error)
    return Outcome(shot, status, manifest.read(shot.manifest))
