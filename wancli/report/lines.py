"""Lines of results for programs, for a command whose work does not end with its readers."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import TextIO


def line(out: TextIO, text: str) -> None:
    """One line, at once. Where nobody reads any more this and all that follows goes nowhere, and stderr says
    so; what the command makes is on disk."""
    try:
        out.write(text + "\n")
        out.flush()
    except BrokenPipeError:
        with suppress(io.UnsupportedOperation):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, out.fileno())
            os.close(nowhere)
        sys.stderr.write("wancli: nobody reads stdout any more; the work goes on\n")
