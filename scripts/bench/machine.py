"""Measure two implementations of one thing, in alternation, in one process."""

from __future__ import annotations

import ctypes
import gc
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch


@dataclass(frozen=True)
class Row:
    """One line of the table: seconds are medians, `flop` is the arithmetic of one run."""

    what: str
    ours_s: float
    theirs_s: float
    flop: float
    ours_mib: float
    theirs_mib: float

    @property
    def speedup(self) -> float:
        return self.theirs_s / self.ours_s


def time_alternately(
    ours: Callable[[], object], theirs: Callable[[], object], repeats: int
) -> tuple[float, float]:
    """Return median seconds of each, run A B A B ... after one warm-up of both."""
    ours(), theirs()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for run, log in zip((ours, theirs), seconds, strict=True):
            start = time.perf_counter()
            run()
            log.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def peak_growth(run: Callable[[], object]) -> float:
    """Return the MiB by which the resident set grew at its highest during `run`, sampled every 2 ms.

    The C library returns free memory to the system first.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    process, done = psutil.Process(), threading.Event()
    start = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        run()
    finally:
        done.set()
        thread.join()
    return (peak - start) / 2**20


def matmul_peak(size: int = 2048, repeats: int = 7) -> float:
    """Measure GFLOP/s of a large square fp32 matmul, the limit of this machine."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    torch.mm(a, b)
    best = min(_time_run(lambda: torch.mm(a, b)) for _ in range(repeats))
    return 2 * size**3 / best / 1e9


def _time_run(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
