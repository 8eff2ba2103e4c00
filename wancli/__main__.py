"""What `wancli` and `python -m wancli` start: the command line, quiet when Ctrl-C comes before it."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn


def main() -> None:
    """Imports and runs the command line. Until that is imported nothing is begun, and Ctrl-C just ends."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not what a script ignores
        signal.signal(signal.SIGINT, _leave)
    from wancli import cli

    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


def _leave(_: int, __: FrameType | None) -> NoReturn:
    os.write(2, b"wancli: interrupted; nothing was begun\n")
    os._exit(130)


if __name__ == "__main__":
    main()
