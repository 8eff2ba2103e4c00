"""Measure whole processes. Imports no torch, because the memory of this process counts for its children."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
WANCLI = ("-c", "from wancli.__main__ import main; main()")


@dataclass(frozen=True)
class ProcessResult:
    """The output of a process that ended, its seconds, and its peak of resident bytes."""

    stdout: str
    seconds: float
    peak: int


def run_python(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> ProcessResult:
    """Run this Python in the repository. Raises CalledProcessError after printing stderr."""
    command = [sys.executable, *arguments]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as out,
        tempfile.TemporaryFile("w+", encoding="utf-8") as err,
    ):
        start = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **(environment or {})}, stdout=out, stderr=err
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), err.seek(0)
        if process.returncode:
            sys.stderr.write(err.read())
            raise subprocess.CalledProcessError(process.returncode, command)
        return ProcessResult(out.read(), seconds, usage.ru_maxrss * 1024)
