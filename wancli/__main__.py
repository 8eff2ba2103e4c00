"""The `wancli` command. A render that a server is to do goes there before anything slow is imported."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

from wancli.errors import WancliError


def main() -> None:
    # Threads that spin while they wait stall each other when a machine runs more of them than it has
    # cores, as farms do: seconds instead of milliseconds a step. Waiting quietly costs next to nothing.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Tensors of many MB in large pages: touching fresh memory costs a third of the time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name in Chinese on a terminal in latin-1
    code = _served(sys.argv[1:])
    if code is None:
        from wancli.cli import run

        code = run(sys.argv[1:])
    sys.exit(code)


def _served(arguments: list[str]) -> int | None:
    """The exit code of a render, where a server at `--socket` did it; else None. What is wrong with the
    command line the server says, in the words that it has here."""
    socket = _socket(arguments)
    if socket is None:
        return None
    from wancli.commands.common import cache_of
    from wancli.farm import client

    quiet = not {"-q", "--quiet"}.isdisjoint(arguments)
    try:
        return client.render(arguments, socket, cache_of(None), quiet=quiet)
    except WancliError as error:
        from wancli.cli import ended

        return ended(error, arguments)


def _socket(arguments: Sequence[str]) -> str | None:
    if arguments[:1] != ["render"] or not {"-h", "--help"}.isdisjoint(arguments):
        return None
    said = os.environ.get("WANCLI_SOCKET") or None
    for word, following in zip(arguments, [*arguments[1:], None]):
        if word == "--socket":
            said = following
        elif word.startswith("--socket="):
            said = word.removeprefix("--socket=")
    return said


if __name__ == "__main__":
    main()
