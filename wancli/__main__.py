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

_ASKING = (signal.SIGTERM, signal.SIGUSR1)


def main() -> None:
    # Threads that spin while they wait stall each other when a machine runs more of them than it has
    # cores, as farms do: seconds instead of milliseconds a step. Waiting quietly costs next to nothing.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Tensors of many MB in large pages: touching fresh memory costs a third of the time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    stdio.prepare()
    ending: list[int] = []
    atexit.register(_as_a_shell_expects, ending)  # registered first, so that it runs last
    arguments = sys.argv[1:]
    rendering = arguments[:1] == ["render"]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not what a script ignores
        signal.signal(signal.SIGINT, _leave)
    asking = [n for n in _ASKING if rendering and signal.getsignal(n) is signal.SIG_DFL]
    for number in asking:
        signal.signal(number, _leave)
    code = _served(arguments)
    code = _alone(arguments) if code is None else code
    for number in asking:  # all is done: it ends with what came of it
        signal.signal(number, signal.SIG_IGN)
    ending.append(code)
    sys.exit(code)


def _alone(arguments: list[str]) -> int:
    from wancli.cli import run

    _imported()
    return run(arguments)


def _served(arguments: list[str]) -> int | None:
    """The exit code of a render, where a server at `--socket` did it; else None. What is wrong with the
    command line the server says, in the words that it has here."""
    socket = _socket(arguments)
    if socket is None:
        return None
    from wancli.commands._common import cache_of
    from wancli.farm import client

    _imported()
    quiet = not {"-q", "--quiet"}.isdisjoint(arguments)
    try:
        return client.render(arguments, socket, cache_of(None), quiet=quiet)
    except WancliError as error:
        from wancli.cli import ended

        return ended(error, arguments)


def _socket(arguments: Sequence[str]) -> str | None:
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


def _leave(number: int, _: FrameType | None) -> NoReturn:
    """A signal while the command line is imported: nothing is begun. Of a render also what asks for its end
    until it heeds that itself, so that a scheduler runs it again."""
    interrupted = number == signal.SIGINT
    said = "interrupted" if interrupted else f"stopped by {signal.Signals(number).name}"
    with suppress(OSError):
        os.write(2, f"wancli: {said}; nothing was begun\n".encode())
    if interrupted:
        _as_a_shell_expects([ExitStatus.INTERRUPTED])
    os._exit(ExitStatus.STOPPED)


def _as_a_shell_expects(codes: Sequence[int]) -> None:
    """What Ctrl-C ended dies of it, which a shell shows as 130 and takes as the end of its loop, too."""
    if ExitStatus.INTERRUPTED in codes:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def _imported() -> None:
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    main()
