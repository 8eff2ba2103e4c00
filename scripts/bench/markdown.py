"""Tables in Markdown, with date and machine. Imports no torch, so that process benchmarks can use it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table: the first column aligned to the left, numbers to the right."""
    body = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join([*(f"| {' | '.join(row)} |" for row in body), ""])


def describe_machine() -> str:
    """Return date, machine and version of torch as a line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores, torch = os.cpu_count(), importlib.metadata.version("torch")
    return f"{datetime.date.today()}, {cores} cores of {cpu_name()}, {memory:.0f} GiB, torch {torch}"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    names = [
        line.split(":", 1)[1].strip()
        for line in info.read_text(encoding="utf-8").splitlines()
        if "model name" in line
    ]
    return names[0] if names else platform.machine()
