"""The `wancli` command. A render that a server is to do goes there before anything slow is imported."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from wancli import stdio
from wancli.errors import ExitStatus, WancliError

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def main() -> None:
    # Threads that spin while they wait stall each other when a machine runs more of them than it has
    # cores, as farms do: seconds instead of milliseconds a step. Waiting quietly costs next to nothing.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Tensors of many MB in large pages: touching fresh memory costs a third of the time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    stdio.open_streams()
    ending: list[int] = []
    atexit.register(_die_of_interrupt, ending)  # registered first, so that it runs last
    arguments = sys.argv[1:]
    rendering = arguments[:1] == ["render"]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not what a script ignores
        signal.signal(signal.SIGINT, _exit_on_signal)
    asking = [n for n in _STOP_SIGNALS if rendering and signal.getsignal(n) is signal.SIG_DFL]
    for number in asking:
        signal.signal(number, _exit_on_signal)
    code = _run_on_server(arguments)
    code = _run_here(arguments) if code is None else code
    for number in asking:  # all is done: it ends with what came of it
        signal.signal(number, signal.SIG_IGN)
    ending.append(code)
    sys.exit(code)


def _run_here(arguments: list[str]) -> int:
    from wancli.cli import run

    _restore_interrupt()
    return run(arguments)


def _run_on_server(arguments: list[str]) -> int | None:
    """The exit code of a render, where a server at `--socket` did it; else None. What is wrong with the
    command line the server says, in the words that it has here."""
    socket = _parse_socket(arguments)
    if socket is None:
        return None
    from wancli.commands._common import resolve_cache_dir
    from wancli.farm import client

    _restore_interrupt()
    quiet = not {"-q", "--quiet"}.isdisjoint(arguments)
    try:
        return client.render(arguments, socket, resolve_cache_dir(None), quiet=quiet)
    except WancliError as error:
        from wancli.cli import report_error

        return report_error(error, arguments)


def _parse_socket(arguments: Sequence[str]) -> str | None:
    """Where a server is to render. Other commands, --help and --engine have none."""
    own = any(word in ("-h", "--help") or word.startswith("--engine") for word in arguments)
    if arguments[:1] != ["render"] or own:
        return None
    said = os.environ.get("WANCLI_SOCKET") or None
    for word, following in zip(arguments, [*arguments[1:], None]):
        if word == "--socket":
            said = following
        elif word.startswith("--socket="):
            said = word.removeprefix("--socket=")
    return said


def _exit_on_signal(number: int, _: FrameType | None) -> NoReturn:
    """A signal while the command line is imported: nothing is begun. Of a render also what asks for its end
    until it heeds that itself, so that a scheduler runs it again."""
    interrupted = number == signal.SIGINT
    said = "interrupted" if interrupted else f"stopped by {signal.Signals(number).name}"
    with suppress(OSError):
        os.write(2, f"wancli: {said}; nothing was begun\n".encode())
    if interrupted:
        _die_of_interrupt([ExitStatus.INTERRUPTED])
    os._exit(ExitStatus.STOPPED)


def _die_of_interrupt(codes: Sequence[int]) -> None:
    """What Ctrl-C ended dies of it, which a shell shows as 130 and takes as the end of its loop, too."""
    if ExitStatus.INTERRUPTED in codes:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def _restore_interrupt() -> None:
    if signal.getsignal(signal.SIGINT) is _exit_on_signal:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    main()
