"""The `wancli` command. A render on a server is sent there before anything slow is imported."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from typing import TYPE_CHECKING

from wancli import signals

if TYPE_CHECKING:
    from collections.abc import Sequence


def main() -> None:
    arguments = sys.argv[1:]
    handled = _handle_start_signals(arguments)
    from wancli import stdio
    from wancli.errors import ExitStatus

    # Threads that spin while they wait stall each other when a machine runs more of them than it has
    # cores, as farms do: seconds instead of milliseconds a step. Waiting quietly costs next to nothing.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Tensors of many MB in large pages: touching fresh memory costs a third of the time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        stdio.open_streams()
    except OSError as error:  # `ulimit -n` leaves no number for them
        sys.stderr.write(f"wancli: stdout and stderr cannot be opened: {error.strerror}\n")
        sys.exit(ExitStatus.MACHINE)
    exit_codes: list[int] = []
    atexit.register(_die_of_interrupt, exit_codes)  # registered first, so that it runs last
    atexit.register(stdio.deliver_streams)
    code = _run_on_server(arguments)
    code = _run_here(arguments) if code is None else code
    for number in handled:  # the work is done: the process ends with its own exit code
        signal.signal(number, signal.SIG_IGN)
    exit_codes.append(code)
    sys.exit(code)


def _handle_start_signals(arguments: Sequence[str]) -> list[signal.Signals]:
    """Let signals exit from here on, before anything is imported; return those that are handled.

    A signal that is ignored, or whose default action ends a command that does not resume, stays so.
    """
    numbers = signals.STOP_SIGNALS if _is_resumable(arguments) else (signal.SIGINT,)
    former = {number: signal.getsignal(number) for number in numbers}
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    handled = [number for number, handler in former.items() if handler in defaults]
    for number in handled:
        # After a render nothing is left to be stopped; a probe then waits for the reader of its map.
        afterwards = signal.SIG_IGN if arguments[:1] == ["render"] else former[number]
        signal.signal(number, signals.StartHandler(signals.exit_on_signal, afterwards))
    return handled


def _is_resumable(arguments: Sequence[str]) -> bool:
    """Return whether a scheduler starts the command again if a signal stops it, even at its start."""
    return arguments[:1] in (["render"], ["probe"])


def _run_here(arguments: list[str]) -> int:
    from wancli.cli import run

    if not _is_resumable(arguments):
        _restore_interrupt()
    return run(arguments)


def _run_on_server(arguments: list[str]) -> int | None:
    """Run a render on the server at `--socket` and return its exit code; return None without a server.

    The server reports errors of the command line, in the same words as this process would.
    """
    socket = _parse_socket(arguments)
    if socket is None:
        return None
    from wancli.commands._common import resolve_cache_dir
    from wancli.errors import WancliError
    from wancli.farm import client

    quiet = not {"-q", "--quiet"}.isdisjoint(arguments)
    try:
        return client.render(arguments, socket, resolve_cache_dir(None), quiet=quiet)
    except WancliError as error:
        from wancli.cli import report_error

        return report_error(error, arguments)


def _parse_socket(arguments: Sequence[str]) -> str | None:
    """Return the `--socket` of a render; None for other commands, and with --help and --engine.

    By hand, because the parser of the options (`wancli.commands._render_options`) is slow to import.
    """
    without_server = any(word in ("-h", "--help") or word.startswith("--engine") for word in arguments)
    if arguments[:1] != ["render"] or without_server:
        return None
    socket = os.environ.get("WANCLI_SOCKET") or None
    for word, following in zip(arguments, [*arguments[1:], None]):
        if word == "--socket":
            socket = following
        elif word.startswith("--socket="):
            socket = word.removeprefix("--socket=")
    return socket


def _die_of_interrupt(exit_codes: Sequence[int]) -> None:
    """After Ctrl-C, die of SIGINT: a shell then reports 130 and ends its own loop, too."""
    from wancli.errors import ExitStatus

    if ExitStatus.INTERRUPTED in exit_codes:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def _restore_interrupt() -> None:
    if isinstance(signal.getsignal(signal.SIGINT), signals.StartHandler):
        signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    main()
