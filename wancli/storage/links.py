"""Symbolic links to files: every name that a file has, and paths that keep the name that the user gave.

The Hugging Face cache keeps each file as a blob without a suffix, and gives it its name by a link. So neither
the name of a link nor that of its target alone says what a file is.
"""

from __future__ import annotations

from pathlib import Path

MAX_LINKS = 40  # as many as Linux follows


def list_names(path: Path) -> tuple[Path, ...]:
    """Return the path and what it leads to, link by link, to the file itself."""
    names = [path]
    while len(names) <= MAX_LINKS and _is_link(names[-1]):
        link = names[-1]
        names.append(link.parent.resolve() / link.readlink())
    return tuple(names)


def _is_link(path: Path) -> bool:
    try:
        return path.is_symlink()
    except (OSError, ValueError):  # a name that no file can have
        return False


def resolve_path(path: Path) -> Path:
    """Return the absolute path, with every link to a folder resolved; a link to a file keeps its own name.

    Raises RuntimeError for links that lead in a circle.
    """
    real = path.resolve()
    return path.parent.resolve() / path.name if _is_link(path) and real.is_file() else real
