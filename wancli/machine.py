"""What this machine has, told without torch."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path


def available() -> int:
    """Bytes this process may still take: what the machine has free, or a control group less."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text()
        used = Path("/sys/fs/cgroup/memory.current").read_text()
    except OSError:
        return free
    return free if limit.strip() == "max" else min(free, int(limit) - int(used))


def has_cuda() -> bool:
    """Whether `device: auto` means CUDA, told without torch: a visible device, a CUDA build."""
    # A container shows the driver of its host in /proc, but only the devices that it may use.
    devices = any(Path("/dev").glob("nvidia[0-9]*")) and os.environ.get("CUDA_VISIBLE_DEVICES", "0") != ""
    return devices and not metadata.version("torch").endswith("+cpu")
