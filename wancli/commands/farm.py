"""`wancli serve`."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wancli.commands.common import cache_of, flags_of, job_of, plan_of
from wancli.commands.options import CacheDir
from wancli.errors import ExitStatus, JobError, WancliError
from wancli.events import printable

if TYPE_CHECKING:
    from wancli.farm.daemon import Background


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
    cache_dir: CacheDir = None,
) -> int:
    """Render for other commands, with the model kept in memory.

    wancli render --socket auto JOB takes it; nothing but this user's processes on this host can.
    """
    from wancli.farm import daemon, meeting
    from wancli.units import parse_duration

    path = meeting.place(socket, cache_of(None))
    seconds = None if idle == "never" else parse_duration(idle, "--idle")
    if stop:
        from wancli.farm.serve import stop as end

        end(path)
        return ExitStatus.OK
    if wait_ready and not daemonize:
        raise JobError("is for --daemonize", where="--wait-ready")
    meeting.make_private(path.parent)
    background: daemon.Background | None = None
    if daemonize:
        found = daemon.detached(path.with_name(path.name + ".log"), wait=wait_ready)
        if not isinstance(found, daemon.Background):
            return found
        background = found
    try:
        _serve(path, job, seconds, cache_dir, background)
    except WancliError as error:
        if background:
            background.failed(error.status)
        raise
    return ExitStatus.OK


def _serve(
    path: Path, job: str | None, idle: float | None, cache_dir: Path | None, background: Background | None
) -> None:
    from wancli.cli import run
    from wancli.farm.serve import Server, listening, prepare, reserved
    from wancli.loaded import Kept

    kept = Kept()
    with ExitStack() as stack:
        stack.enter_context(reserved(path))
        plan = plan_of(job_of(job, flags_of(None, None, None, None)), cache_dir) if job else None
        prepare(plan, kept)
        server = Server(run, kept, idle=idle)
        stack.enter_context(server.heeding())
        listener = stack.enter_context(listening(path))
        if background:
            background.ready()
        print(printable(f"wancli serve: at {path}, process {os.getpid()}"), file=sys.stderr, flush=True)
        os.chdir("/")  # so that no file system is held
        server.serve(listener)
