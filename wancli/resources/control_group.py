"""Read the limits of the control groups of this process: containers, Slurm, systemd; versions 1 and 2.

A limit of a group holds for the groups below it too, so each is read from the group of the process up to the
root of the mounted hierarchy. Interfaces: the kernel's admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst,
proc(5), cgroups(7).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from wancli.storage import disk

_Version = int  # 1 or 2


@dataclass(frozen=True)
class _MemoryFiles:
    """The files of a memory controller, and the entries of its `memory.stat` that count pages of files."""

    limits: tuple[str, ...]
    used: str
    files: tuple[str, ...]


_MEMORY = {
    1: _MemoryFiles(
        ("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
    ),
    2: _MemoryFiles(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")),
}


def read_free_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that the groups of this process may still take, None if no group limits it.

    Pages of files that the kernel can drop count as free: else a checkpoint that was read would fill a group.
    `root` is the folder that holds `proc` and `sys`.
    """
    free: list[int] = []
    for version, groups in _find_groups("memory", root):
        names = _MEMORY[version]
        for group in groups:
            used, stat = _read_number(group / names.used), _read_table(group / "memory.stat")
            limits = [_read_number(group / name) for name in names.limits]
            # The smallest limit of all groups above, also of those that a container does not see.
            limits.append(stat.get("hierarchical_memory_limit"))
            files = sum(stat.get(name, 0) for name in names.files)
            if used is not None:
                free += [limit - max(0, used - files) for limit in limits if limit is not None]
            if version == 1 and _read_number(group.parent / "memory.use_hierarchy") == 0:
                break  # the groups above count only their own pages
    return max(0, min(free)) if free else None


def read_cpu_quota(root: Path = Path("/")) -> float | None:
    """Return how many cores' worth of time the groups of this process may take, None without a limit."""
    quotas: list[float] = []
    for version, groups in _find_groups("cpu", root):
        for group in groups:
            if version == 2:
                quota, _, period = _read_text(group / "cpu.max").partition(" ")
            else:
                quota, period = (
                    _read_text(group / name) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                )
            if quota.isdecimal() and period.isdecimal() and int(period):
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _find_groups(controller: str, root: Path) -> Iterator[tuple[_Version, list[Path]]]:
    """Yield the groups of each hierarchy that may have this controller, from that of the process up."""
    own = dict(_own_groups(controller, root))
    for version, mounted, point in _mounts(controller, root):
        if version not in own:
            continue
        path, top = PurePosixPath(own[version]), PurePosixPath(mounted)
        # In a container the paths of the host may be outside of what is mounted; then the mount is the group.
        below = (
            path.relative_to(top) if path.is_relative_to(top) and ".." not in path.parts else PurePosixPath()
        )
        base = root / point.lstrip("/")
        group = base / below
        yield version, [group, *(folder for folder in group.parents if folder.is_relative_to(base))]


def _own_groups(controller: str, root: Path) -> Iterator[tuple[_Version, str]]:
    """Yield the version of each hierarchy that may have the controller, and the group of this process."""
    for line in _read_text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            yield 2, path
        elif controller in controllers.split(","):
            yield 1, path


def _mounts(controller: str, root: Path) -> Iterator[tuple[_Version, str, str]]:
    """Yield version, mounted group and mount point of the hierarchies that may have the controller."""
    for line in _read_text(root / "proc/self/mountinfo").splitlines():
        mount, _, file_system = line.partition(" - ")
        words, (kind, _, options) = mount.split(), file_system.split(" ", 2)
        mounted, point = (re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), word) for word in words[3:5])
        if kind == "cgroup2":
            yield 2, mounted, point
        elif kind == "cgroup" and controller in options.split(","):
            yield 1, mounted, point


def _read_text(path: Path) -> str:
    """Read a file; a file that is missing or not readable has no text."""
    return (disk.read_system_text(path) or "").strip()


def _read_number(path: Path) -> int | None:
    text = _read_text(path)  # `max` is no limit
    return int(text) if text.isdecimal() else None


def _read_table(path: Path) -> Mapping[str, int]:
    pairs = (line.split() for line in _read_text(path).splitlines())
    return {name: int(value) for name, value in pairs}
