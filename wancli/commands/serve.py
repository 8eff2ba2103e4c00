"""`wancli serve`: a server that renders for other commands."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wancli.commands._common import Invocation, collect_flags, load_job, plan_job, resolve_cache_dir
from wancli.commands._options import CacheDir, Sets
from wancli.errors import ExitStatus, JobError, WancliError
from wancli.progress import make_printable

if TYPE_CHECKING:
    from wancli.farm.daemon import Background
    from wancli.farm.server import RunCommand


def serve_command(
    context: typer.Context,
    job: Annotated[
        str | None,
        typer.Argument(metavar="JOB", help="A job whose model is loaded before the server is ready."),
    ] = None,
    socket: Annotated[
        str,
        typer.Option(
            metavar="auto|PATH",
            envvar="WANCLI_SOCKET",
            help="The socket of the server. auto: the user's own on this host.",
        ),
    ] = "auto",
    idle: Annotated[
        str,
        typer.Option(metavar="TIME", help="End after this time without a request, or never."),
    ] = "10min",
    daemonize: Annotated[
        bool, typer.Option("--daemonize", help="Run in the background, with a log beside the socket.")
    ] = False,
    wait_ready: Annotated[
        bool, typer.Option("--wait-ready", help="With --daemonize: return once the server is ready.")
    ] = False,
    stop: Annotated[
        bool, typer.Option("--stop", help="End the server at this socket, once its render is saved.")
    ] = False,
    sets: Sets = None,
    cache_dir: CacheDir = None,
) -> int:
    """Render for other commands, with the model kept in memory.

    wancli render --socket auto JOB uses it. Only this user's processes on this host can.
    """
    from wancli.farm import daemon, local_socket
    from wancli.units import parse_duration

    path = local_socket.socket_path(socket, resolve_cache_dir(None))
    seconds = None if idle == "never" else parse_duration(idle, "--idle")
    if stop:
        from wancli.farm.server import stop_server

        stop_server(path)
        return ExitStatus.OK
    _check_option_pairs(job, sets, daemonize=daemonize, wait_ready=wait_ready)
    local_socket.make_private_folder(path.parent)
    background: daemon.Background | None = None
    if daemonize:
        found = daemon.detach(path.with_name(path.name + ".log"), wait=wait_ready)
        if not isinstance(found, daemon.Background):
            if found is ExitStatus.OK:
                _print_location(path, socket, ready=wait_ready)
            return found
        background = found
    try:
        invocation: Invocation = context.obj
        _serve(invocation.run, path, job, sets, seconds, cache_dir, background)
    except WancliError as error:
        if background:
            background.report_failure(error.status)
        raise
    return ExitStatus.OK


def _check_option_pairs(
    job: str | None, sets: list[str] | None, *, daemonize: bool, wait_ready: bool
) -> None:
    """Raise JobError for an option that means nothing without another."""
    if wait_ready and not daemonize:
        raise JobError("needs --daemonize", where="--wait-ready")
    if sets and job is None:
        raise JobError("needs a JOB to load", where="--set", hint="wancli serve JOB --set KEY=VALUE")


def _print_location(path: Path, said: str, *, ready: bool) -> None:
    """Print where a server in the background listens, and the commands that use it and end it."""
    place = f"--socket {shlex.quote(said)}"
    state = "listens" if ready else "is starting"
    ends = "wancli serve --stop" if said == "auto" else f"wancli serve --stop {place}"
    how = f"`wancli render {place} JOB` uses it, `{ends}` ends it"
    print(
        make_printable(f"wancli serve: {state} at {path}, its log in {path.name}.log; {how}"), file=sys.stderr
    )


def _serve(
    run: RunCommand,
    path: Path,
    job: str | None,
    sets: list[str] | None,
    idle: float | None,
    cache_dir: Path | None,
    background: Background | None,
) -> None:
    from wancli.engine.networks import ModelCache
    from wancli.farm.local_socket import listen, lock_socket
    from wancli.farm.server import Server, preload
    from wancli.report import (  # imported now, so that no render waits for them
        batch_report,  # noqa: F401
        render_summary,  # noqa: F401
    )

    model_cache = ModelCache()
    with ExitStack() as stack:
        stack.enter_context(lock_socket(path))
        plan = plan_job(load_job(job, collect_flags(sets)), cache_dir) if job else None
        preload(plan, model_cache)
        server = Server(run, model_cache, idle=idle)
        stack.enter_context(server.handle_signals())
        listener = stack.enter_context(listen(path))
        if background:
            background.report_ready()
        print(make_printable(f"wancli serve: at {path}, process {os.getpid()}"), file=sys.stderr, flush=True)
        os.chdir("/")  # keeps no file system busy
        server.serve(listener)
