"""Measure the peak memory of a phase, and turn out-of-memory errors of any allocator into OutOfMemory."""

from __future__ import annotations

import gc
import re
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Self

from wancli.errors import OutOfMemory
from wancli.storage import disk
from wancli.units import format_bytes


@contextmanager
def oom_as_error(phase: str, where: str) -> Iterator[None]:
    """Convert any allocator's out-of-memory error of the block into OutOfMemory, with the peak so far."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch says "CUDA out of memory" and "DefaultCPUAllocator: can't allocate memory".
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        raise OutOfMemory(
            f"out of memory: {phase}, at a peak of {format_bytes(_peak_bytes(error))}",
            where=where,
            hint="Use fewer frames, a smaller size, or a lower memory.budget. Files on disk are kept.",
        ) from error


def release_memory() -> None:
    """Release the memory of a phase that ran out of memory; call it outside the `except` that caught it."""
    gc.collect()
    if torch := _torch_on_cuda():
        torch.cuda.empty_cache()


def _peak_bytes(error: Exception) -> int:
    """Return the peak since the last `PeakMemory` began: of the device, if the error is of CUDA."""
    torch = _torch_on_cuda()
    if torch and "CUDA" in str(error):
        return int(torch.cuda.max_memory_allocated())
    return max(_read_status_bytes("VmHWM"), _resident_bytes())


class PeakMemory:
    """The peak memory of a `with` block. Blocks must not be nested: the kernel has one mark.

    `rss_start` and `rss_peak` are bytes of this process in RAM, mapped weights included. `cuda_peak` is in
    bytes that torch allocated on the current device, None without CUDA. `seconds` is measured by a clock
    that never jumps. `id` tells one measurement from another.
    """

    id: str
    rss_start: int
    rss_peak: int
    cuda_peak: int | None = None
    seconds: float

    def __enter__(self) -> Self:
        self.id = secrets.token_hex(8)
        self._sampler = None if _reset_high_water() else _Sampler()
        if torch := _torch_on_cuda():
            torch.cuda.reset_peak_memory_stats()
        self.rss_start = _resident_bytes()
        self._started = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.update()
        if self._sampler:
            self._sampler.stop()

    def update(self) -> None:
        """Measure up to now, while the block still runs."""
        self.seconds = time.monotonic() - self._started
        peak = self._sampler.peak if self._sampler else _read_status_bytes("VmHWM")
        self.rss_peak = max(peak, self.rss_start, _resident_bytes())
        if torch := _torch_on_cuda():
            self.cuda_peak = torch.cuda.max_memory_allocated()


class _Sampler(threading.Thread):
    """A thread that samples the resident size, for kernels without a resettable peak."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._stop_now = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._stop_now.wait(0.01):
            self.peak = max(self.peak, _resident_bytes())

    def stop(self) -> None:
        self._stop_now.set()
        self.join()


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_bytes(b"5")  # proc(5): resets VmHWM
    except OSError:
        return False
    return True


def _read_status_bytes(name: str) -> int:
    text = disk.read_system_text("/proc/self/status") or ""
    return 1024 * int(text.split(f"{name}:")[1].split()[0]) if f"{name}:" in text else _resident_bytes()


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _torch_on_cuda() -> ModuleType | None:
    torch = sys.modules.get("torch")  # importing it is the decision of other modules
    return torch if torch and torch.cuda.is_initialized() else None
