"""Lines of results for programs, for a command whose work does not end with its readers."""

from __future__ import annotations

import sys
from typing import TextIO

from wancli.errors import MachineError


def line(out: TextIO, text: str) -> None:
    """One line, at once. Where it cannot be written this and all that follows goes nowhere
    (`wancli.stdio`), and stderr says so; what the command makes is on disk."""
    try:
        out.write(text + "\n")
        out.flush()
    except BrokenPipeError:
        sys.stderr.write("wancli: nobody reads stdout any more; the work goes on\n")
    except MachineError as error:
        sys.stderr.write(f"wancli: {error}; the work goes on\n")
