"""Ask the disk: what exists, what a folder lists, what a file holds.

Every question goes through this module, as every byte that is written goes through `wancli.storage.atomic`.
A question has three answers: yes, no (nothing has that name), or *cannot tell*: a folder that this user may
not enter, a disk that fails, a server that is away. The third is raised as Unreadable, and never taken for
the second: a file that cannot be read just now is neither missing nor damaged.

Paths may come from records, so a name that no file can have, with NUL or half a surrogate pair, is one that
does not exist.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import TypeVar

from wancli.errors import CheckpointError, JobError, NoSuchFile, Unreadable
from wancli.storage.read_errors import unreadable_error

Answer = TypeVar("Answer")


# ---- questions ----


def status(path: Path) -> os.stat_result | None:
    """Return the status of what a path leads to, links followed; None if nothing is there."""
    return _ask(os.stat, path)


def link_status(path: Path) -> os.stat_result | None:
    """Return the status of a name itself, links not followed; None if nothing has it."""
    return _ask(os.lstat, path)


def exists(path: Path) -> bool:
    return status(path) is not None


def is_taken(path: Path) -> bool:
    """Return whether anything has this name, be it a link that leads nowhere."""
    return link_status(path) is not None


def is_file(path: Path) -> bool:
    """Return whether a path leads to a plain file."""
    found = status(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def is_folder(path: Path) -> bool:
    found = status(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def is_pipe(path: Path) -> bool:
    found = status(path)
    return found is not None and stat.S_ISFIFO(found.st_mode)


def is_link(path: Path) -> bool:
    found = link_status(path)
    return found is not None and stat.S_ISLNK(found.st_mode)


def link_target(path: Path) -> Path | None:
    """Return what a symbolic link says; None if nothing has the name, or something else than a link."""
    return _ask(Path.readlink, path) if is_link(path) else None


def size(path: Path) -> int:
    """Return the bytes of a file. Raises NoSuchFile."""
    found = status(path)
    if found is None:
        raise unreadable_error(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)), path)
    return found.st_size


def list_folder(folder: Path) -> list[Path]:
    """Return what is in a folder, sorted by name; nothing if there is no such folder."""
    names = _ask(_list_names, folder)
    return [folder / name for name in names or ()]


def walk(folder: Path, *, without: str = "") -> Iterator[Path]:
    """Yield every file below a folder, sorted within each folder. Links to folders are yielded, not followed.

    Folders named `without` are left out.
    """
    inner = []
    for name, is_inner in _ask(_list_kinds, folder) or ():
        if not is_inner:
            yield folder / name
        elif name != without:
            inner.append(folder / name)
    for path in inner:
        yield from walk(path, without=without)


def free_space(path: Path) -> int:
    """Return the bytes free for this user on the disk of `path`, which need not exist."""
    return _ask_present(lambda found: shutil.disk_usage(found).free, nearest_folder(path))


def free_files(path: Path) -> int | None:
    """Return how many more files the disk of `path` can hold for this user; None if it has no such limit."""
    found = _ask_present(os.statvfs, nearest_folder(path))
    return found.f_favail if found.f_files else None


def nearest_folder(path: Path) -> Path:
    """Return `path` if it exists, or the first folder above it that does."""
    path = path.absolute()
    while not exists(path) and path != path.parent:
        path = path.parent
    return path


def resolve(path: Path) -> Path:
    """Return the absolute path without links; parts that do not exist stay as they are."""
    try:
        return path.resolve()
    except RuntimeError:  # Python 3.11 and 3.12 for links in a circle
        raise unreadable_error(OSError(errno.ELOOP, os.strerror(errno.ELOOP)), path) from None
    except (OSError, ValueError) as error:
        raise unreadable_error(error, path) from error


# ---- contents ----


@contextmanager
def opened(path: Path, *, pipes: bool = False, links: bool = True) -> Iterator[BufferedReader]:
    """Open a plain file for reading, and translate errors of reading in the block. Raises NoSuchFile.

    With `pipes` also a pipe or a device; opening a pipe may wait for its writer. Without `links` a symbolic
    link is refused.
    """
    open_it = _open_any if pipes else _open_plain if links else _open_no_link
    with reading(path), os.fdopen(_ask_present(open_it, path), "rb") as file:
        yield file


def open_descriptor(path: Path) -> int:
    """Open a plain file and return its descriptor, which the caller closes. Raises NoSuchFile."""
    return _ask_present(_open_plain, path)


def read_bytes(path: Path) -> bytes:
    """Return the content of a file. Raises NoSuchFile."""
    with opened(path) as file:
        return file.read()


def find_bytes(path: Path) -> bytes | None:
    """Return the content of a file, or None if there is none."""
    try:
        return read_bytes(path)
    except NoSuchFile:
        return None


def read_text(path: Path) -> str:
    """Return the content of a file in UTF-8. Raises NoSuchFile."""
    return read_bytes(path).decode()


def read_system_text(path: str | Path) -> str | None:
    """Return what the kernel says in a file below /proc or /sys; None if it does not say it here."""
    try:
        return os.fsdecode(read_bytes(Path(path)))
    except Unreadable:
        return None


def read_system_link(path: str) -> str | None:
    """Return where a link below /proc leads; None if that is not said here."""
    try:
        return str(Path(path).readlink())
    except OSError:
        return None


def sha256(path: Path) -> str:
    """Return the hex digest of a file's content. Raises NoSuchFile."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- errors ----


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise an OSError of the block as the Unreadable that it means."""
    try:
        yield
    except OSError as error:
        raise unreadable_error(error, path) from error


@contextmanager
def reading_for_job(where: str, name: str = "") -> Iterator[None]:
    """Raise an Unreadable of the block as JobError: nothing was started.

    `where` is the place in the job that names the file, `name` the file as it is named there.
    """
    try:
        yield
    except Unreadable as error:
        searched = f"Looked for {error.where}." if name or error.where != where else ""
        hint = "\n".join(filter(None, (searched, error.hint)))
        raise JobError(
            f"{name!r} {error.message}" if name else error.message, where=where, hint=hint
        ) from None


@contextmanager
def reading_weights(name: str = "") -> Iterator[None]:
    """Raise an Unreadable of the block as CheckpointError: all shots need the checkpoint.

    `name` is what could not be read, if it is a part of the file.
    """
    try:
        yield
    except Unreadable as error:
        raise CheckpointError(
            f"{name} {error.message}".strip(), where=error.where, hint=error.hint
        ) from error


def _ask(call: Callable[[Path], Answer], path: Path) -> Answer | None:
    """Return the answer of the disk, None if nothing is there."""
    try:
        return _ask_present(call, path)
    except NoSuchFile:
        return None


def _ask_present(call: Callable[[Path], Answer], path: Path) -> Answer:
    try:
        try:
            return call(path)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            return call(path)  # a server that has replaced a file finds it when the path is resolved again
    except (OSError, ValueError) as error:
        raise unreadable_error(error, path) from error


def _open_no_link(path: Path) -> int:
    return _open_plain(path, os.O_NOFOLLOW)


def _open_plain(path: Path, flags: int = 0) -> int:
    # O_NONBLOCK: a pipe would wait for its writer
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        raise OSError(errno.ENXIO, "not a plain file")
    return fd


def _open_any(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        os.close(fd)
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    return fd


def _list_names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries)


def _list_kinds(folder: Path) -> list[tuple[str, bool]]:
    """List names, and whether each is a folder, which most file systems tell without another question."""
    with os.scandir(folder) as entries:
        return sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
