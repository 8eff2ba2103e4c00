"""Find out the memory and devices of this machine without torch."""

from __future__ import annotations

import math
import os
import re
import sys
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

from wancli.resources import control_group
from wancli.storage import disk

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # with one of them the user chooses torch's threads


def available_memory() -> int:
    """Return the bytes that this process may still take: free memory, or less by its control groups."""
    import psutil

    free, of_groups = int(psutil.virtual_memory().available), control_group.read_free_memory()
    return free if of_groups is None else min(free, of_groups)


def usable_cores() -> int:
    """Return how many cores this process may use: those of its affinity, or fewer by a CPU quota."""
    cores, quota = len(os.sched_getaffinity(0)), control_group.read_cpu_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def process_memory() -> int:
    """Return the bytes of this process, except pages of files, which `available_memory` counts as free."""
    import psutil

    memory = psutil.Process().memory_info()
    return int(memory.rss) - int(memory.shared)


def cuda_free_memory() -> int | None:
    """Return the free bytes of the CUDA device, without torch; None without nvidia-ml-py."""
    if find_spec("pynvml") is None:
        return None
    pynvml = import_module("pynvml")
    try:
        pynvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        handle = (
            pynvml.nvmlDeviceGetHandleByIndex(int(visible))
            if visible.isdecimal()
            else pynvml.nvmlDeviceGetHandleByUUID(visible)
        )
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
    except pynvml.NVMLError:
        return None


def cuda_reserved_memory() -> int:
    """Return the bytes of the CUDA device that this process has reserved for tensors and may reuse."""
    torch = sys.modules.get("torch")  # without it nothing is reserved
    return int(torch.cuda.memory_reserved()) if torch and torch.cuda.is_initialized() else 0


def device_name(device: str) -> str:
    """Name the processor that measured rates belong to: `AMD EPYC, 2 cores`, `NVIDIA H200`."""
    if device == "cuda":
        gpus = disk.list_folder(Path("/proc/driver/nvidia/gpus"))
        information = [disk.read_system_text(gpu / "information") or "" for gpu in gpus]
        names = re.findall(r"Model:\s*(.+)", "\n".join(information))
        return names[0].strip() if names else "CUDA"
    cores = usable_cores()
    threads = os.environ.get("OMP_NUM_THREADS", "")
    used = min(cores, int(threads)) if threads.isdecimal() and int(threads) else cores
    return f"{_cpu_name()}, {used} core{'s' * (used > 1)}"


def has_cuda() -> bool:
    """Return, without torch, whether `device: auto` means CUDA: a visible device and a CUDA build."""
    # A container shows the driver of its host in /proc, but only the devices that it may use.
    names = [path.name for path in disk.list_folder(Path("/dev"))]
    devices = (
        any(re.match("nvidia[0-9]", name) for name in names)
        and os.environ.get("CUDA_VISIBLE_DEVICES", "0") != ""
    )
    return devices and not metadata.version("torch").endswith("+cpu")


@cache
def _cpu_name() -> str:
    names = re.findall(r"model name\s*:\s*(.+)", disk.read_system_text("/proc/cpuinfo") or "")
    return names[0].strip() if names else "CPU"
