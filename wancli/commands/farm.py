"""`wancli serve` and `wancli export`."""

from __future__ import annotations

import os
import re
import shlex
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wancli.commands._common import cache_of, flags_of, job_of, plan_of
from wancli.commands._options import CacheDir, Items, JobArgument, Sets
from wancli.errors import ExitStatus, JobError, WancliError
from wancli.progress import printable

if TYPE_CHECKING:
    from wancli.farm.daemon import Background
    from wancli.job.cli_overrides import Flags
    from wancli.job.loader import Item


def serve(
    job: Annotated[
        str | None,
        typer.Argument(metavar="JOB", help="A job whose model is loaded before the server is ready."),
    ] = None,
    socket: Annotated[
        str,
        typer.Option(
            metavar="auto|PATH",
            envvar="WANCLI_SOCKET",
            help="Where it is to be found. auto: the user's own place on this host.",
        ),
    ] = "auto",
    idle: Annotated[
        str,
        typer.Option(metavar="TIME", help="End when nobody has asked for anything for so long, or never."),
    ] = "10min",
    daemonize: Annotated[
        bool, typer.Option("--daemonize", help="Go on in the background, with a log beside the socket.")
    ] = False,
    wait_ready: Annotated[
        bool, typer.Option("--wait-ready", help="With --daemonize: return once it serves.")
    ] = False,
    stop: Annotated[
        bool, typer.Option("--stop", help="End the server there, once what it renders is saved.")
    ] = False,
    sets: Sets = None,
    cache_dir: CacheDir = None,
) -> int:
    """Render for other commands, with the model kept in memory.

    wancli render --socket auto JOB takes it; nothing but this user's processes on this host can.
    """
    from wancli.farm import daemon, local_socket
    from wancli.units import parse_duration

    path = local_socket.place(socket, cache_of(None))
    seconds = None if idle == "never" else parse_duration(idle, "--idle")
    if stop:
        from wancli.farm.server import stop as end

        end(path)
        return ExitStatus.OK
    _refuse_what_misses(job, sets, daemonize=daemonize, wait_ready=wait_ready)
    local_socket.make_private(path.parent)
    background: daemon.Background | None = None
    if daemonize:
        found = daemon.detached(path.with_name(path.name + ".log"), wait=wait_ready)
        if not isinstance(found, daemon.Background):
            if found is ExitStatus.OK:
                _say_where(path, socket, ready=wait_ready)
            return found
        background = found
    try:
        _serve(path, job, sets, seconds, cache_dir, background)
    except WancliError as error:
        if background:
            background.failed(error.status)
        raise
    return ExitStatus.OK


def _refuse_what_misses(
    job: str | None, sets: list[str] | None, *, daemonize: bool, wait_ready: bool
) -> None:
    """Options that mean nothing without another."""
    if wait_ready and not daemonize:
        raise JobError("is for --daemonize", where="--wait-ready")
    if sets and job is None:
        raise JobError(
            "is for the job that is loaded", where="--set", hint="wancli serve JOB --set KEY=VALUE"
        )


def _say_where(path: Path, said: str, *, ready: bool) -> None:
    """Of a server in the background, for who started it: where it is, how it is asked and how it ends."""
    place = f"--socket {shlex.quote(said)}"
    state = "serves" if ready else "is starting"
    ends = "wancli serve --stop" if said == "auto" else f"wancli serve --stop {place}"
    how = f"`wancli render {place} JOB` asks it, `{ends}` ends it"
    print(printable(f"wancli serve: {state} at {path}, its log in {path.name}.log; {how}"), file=sys.stderr)


def _serve(
    path: Path,
    job: str | None,
    sets: list[str] | None,
    idle: float | None,
    cache_dir: Path | None,
    background: Background | None,
) -> None:
    from wancli.cli import run
    from wancli.engine.networks import Kept
    from wancli.farm.local_socket import listening, reserved
    from wancli.farm.server import Server, prepare

    kept = Kept()
    with ExitStack() as stack:
        stack.enter_context(reserved(path))
        plan = plan_of(job_of(job, flags_of(sets)), cache_dir) if job else None
        prepare(plan, kept)
        server = Server(run, kept, idle=idle)
        stack.enter_context(server.heeding())
        listener = stack.enter_context(listening(path))
        if background:
            background.ready()
        print(printable(f"wancli serve: at {path}, process {os.getpid()}"), file=sys.stderr, flush=True)
        os.chdir("/")  # so that no file system is held
        server.serve(listener)


export = typer.Typer(help="Write a job for a scheduler, to stdout.", rich_markup_mode=None)
# What these do not know themselves are options of `wancli render`.
_PASSING = {"allow_extra_args": True, "ignore_unknown_options": True}
Gpus = Annotated[
    int | None,
    typer.Option(min=0, help="GPUs of each task. Default: 1, or 0 where memory.device of all shots is cpu."),
]


@export.command("slurm", context_settings=_PASSING)
def slurm_command(
    context: typer.Context,
    job: JobArgument,
    shards: Annotated[int, typer.Option(min=1, help="Tasks of the array; each renders a part.")] = 1,
    gpus: Gpus = None,
    time: Annotated[str, typer.Option(help="How long a task may take before it queues again.")] = "8:00:00",
    cpus: Annotated[int | None, typer.Option(min=1, help="Cores of each task.")] = None,
    mem: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory of each task: 64G.")] = None,
    margin: Annotated[
        int, typer.Option(min=10, help="Seconds before the end at which it saves; longer than a step.")
    ] = 180,
) -> None:
    """A batch script for sbatch: an array of parts that save and queue again when their time is over.

    Further options are those of wancli render.
    """
    from wancli.farm.slurm_export import Wanted, script

    path, flags, _ = _checked(job, context.args, "--shard")
    shots = _shots(path, flags)
    if shards > (count := len(shots)):
        raise JobError(f"{shards} is more than there are shots ({count})", where="--shards")
    for flag, said in (("--time", time), ("--mem", mem or "0")):
        if not re.fullmatch(r"[0-9:.-]+[KMGT]?", said):
            raise JobError(f"{said!r} is nothing that Slurm reads", where=flag, hint="8:00:00, or 64G.")
    command = [_wancli(), "render", str(path), "--progress", "plain", *context.args]
    wanted = Wanted(shards, _gpus_of(shots) if gpus is None else gpus, time, cpus, mem, margin)
    print(script(command, Path.cwd(), path.stem, wanted), end="")


@export.command("openjd", context_settings=_PASSING)
def openjd_command(
    context: typer.Context,
    job: JobArgument,
    gpus: Gpus = None,
    at_once: Annotated[int, typer.Option(min=1, help="Shots of a task, which share the most work.")] = 1,
    items: Items = None,
) -> None:
    """A job template for Open Job Description: a model per session, some shots per task.

    Further options are those of wancli render.
    """
    from wancli.farm.openjd_export import template

    path, flags, cache = _checked(job, context.args, "--shard", "--items")
    shots = _shots(path, replace(flags, items=items))
    chosen = items or f"0-{len(shots) - 1}"
    gpus = _gpus_of(shots) if gpus is None else gpus
    served = [word for said in flags.sets for word in ("--set", said)]
    served += ["--cache-dir", str(cache)] if cache else []
    text = template(_wancli(), path, chosen, served, context.args, name=path.stem, gpus=gpus, at_once=at_once)
    print(text, end="")


def _checked(job: str, options: list[str], *ours: str) -> tuple[Path, Flags, Path | None]:
    """Where the job is, and the flags and the cache among the options of a render. Raises what that would."""
    from wancli.commands.render import render

    if job == "-":
        raise JobError("must be a file, which the tasks read", where="JOB")
    probe = typer.Typer(add_completion=False, rich_markup_mode=None)
    probe.command()(render)
    with typer.main.get_command(probe).make_context("wancli render", [job, *options]) as said:
        given = said.params
    for name in (*ours, "--socket", "--prompt", "--output"):
        if any(word == name or word.startswith(f"{name}=") for word in options):
            raise JobError("is for the exported job to say", where=name)
    if given["force"]:
        raise JobError(
            "would begin anew in every task that queues again",
            where="--force",
            hint="Move the old videos away, or give the job another output.",
        )
    flags = flags_of(given["sets"], given["sweeps"], given["items"], given["shard"])
    return Path(job).resolve(), flags, given["cache_dir"]


def _shots(job: Path, flags: Flags) -> list[Item]:
    """Those that are asked for. Raises JobError for what is wrong with the job, and for items that are not
    there."""
    from wancli.job.loader import load

    jobs = load(job, flags)
    return [jobs.items[index] for index in jobs.chosen]


def _gpus_of(shots: list[Item]) -> int:
    return int(any(item.job.memory.device != "cpu" for item in shots))


def _wancli() -> str:
    """The command that runs now, where the tasks find it, too, if they share its folder."""
    beside = Path(sys.executable).with_name("wancli")
    return str(beside) if beside.exists() else "wancli"
