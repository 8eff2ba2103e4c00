"""`make bench`: wancli beside diffusers, in one process, as a table on the screen and in Markdown.

GFLOP/s count the arithmetic of the plain network for both, also where one of them does without it.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

# Tensors of many MB in large pages, for both ways alike; read when torch is first imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from rich.console import Console
from rich.table import Table

from scripts.bench import dit, vae
from scripts.bench.machine import Row, matmul_peak
from wancli.models.layers import linear

COLUMNS = (
    "what",
    "wancli s",
    "diffusers s",
    "speed-up",
    "wancli GFLOP/s",
    "diffusers GFLOP/s",
    "wancli MiB",
    "diffusers MiB",
)


def main() -> None:
    console = Console()
    lines = facts()
    table = [cells(row) for row in (*dit.rows(), *vae.rows())]
    lines.append(f"`wancli --help` from start to end: {help_seconds():.2f} s")
    screen = Table(*COLUMNS)
    for row in table:
        screen.add_row(*row)
    console.print(screen)
    for line in lines:
        console.print(line)
    print()
    print(markdown(table, lines))


def facts() -> list[str]:
    """Where and when this was measured, and what the machine can do."""
    large = torch.randn(2048, 2048), torch.randn(2048, 2048), torch.zeros(2048)
    with torch.inference_mode():
        linear(*large)
        seconds = []
        for _ in range(7):
            start = time.perf_counter()
            linear(*large)
            seconds.append(time.perf_counter() - start)
    onednn = 2 * 2048**3 / min(seconds) / 1e9
    return [
        f"{datetime.date.today()}, {cpu_name()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}",
        f"matmul of 2048 x 2048: torch.mm {matmul_peak():.0f} GFLOP/s, oneDNN {onednn:.0f} GFLOP/s",
    ]


def cells(row: Row) -> list[str]:
    return [
        row.what,
        f"{row.ours_s:.3f}",
        f"{row.theirs_s:.3f}",
        f"{row.speedup:.2f}x",
        f"{row.flop / row.ours_s / 1e9:.0f}",
        f"{row.flop / row.theirs_s / 1e9:.0f}",
        f"{row.ours_mib:.0f}",
        f"{row.theirs_mib:.0f}",
    ]


def markdown(table: list[list[str]], lines: list[str]) -> str:
    body = [COLUMNS, ["---"] + ["---:"] * (len(COLUMNS) - 1), *table]
    return "\n".join([*(f"| {' | '.join(row)} |" for row in body), "", *(f"- {line}" for line in lines)])


def help_seconds(repeats: int = 5) -> float:
    """Median time of the whole process `wancli --help`."""
    command = [str(Path(sys.executable).with_name("wancli")), "--help"]
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


main()
