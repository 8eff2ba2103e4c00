"""Symbolic links to files: every name that a file has, and paths that keep the name that the user gave.

The Hugging Face cache keeps each file as a blob without a suffix, and gives it its name by a link. So neither
the name of a link nor that of its target alone says what a file is.
"""

from __future__ import annotations

from pathlib import Path

from wancli.storage import disk

MAX_LINKS = 40  # as many as Linux follows


def list_names(path: Path) -> tuple[Path, ...]:
    """Return the path and what it leads to, link by link, to the file itself."""
    names = [path]
    while len(names) <= MAX_LINKS and (target := disk.link_target(names[-1])):
        names.append(disk.resolve(names[-1].parent) / target)
    return tuple(names)


def resolve_path(path: Path) -> Path:
    """Return the absolute path, with every link to a folder resolved; a link to a file keeps its own name.

    Raises Unreadable, also for links that lead in a circle.
    """
    real = disk.resolve(path)
    is_named = disk.is_link(path) and disk.is_file(real)
    return disk.resolve(path.parent) / path.name if is_named else real
