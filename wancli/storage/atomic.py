"""Write files atomically and durably; every byte that reaches the disk goes through this module.

After `publish()` or `replace()` returns, the file is complete under its final name and survives
power loss. If either fails, or the process dies anywhere, the old file remains: a final name
never holds a torn file, and `publish()` never replaces an existing file, not even when two
processes race. A dead process may leave a file named `.wancli-*.tmp`, which
`remove_stale_temp_files()` removes a day later.

Caveats: the file system must support hard links or renameat2(RENAME_NOREPLACE);
`require_writable()` checks that before any work is done. Nothing relies on locks.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import platform
import re
import resource
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from wancli.errors import DiskError, JobError, MachineError, NoSpace, OutputExists, Unreadable, WancliError
from wancli.storage import disk
from wancli.storage.paths import shorten_name

_PREFIX, _SUFFIX = ".wancli-", ".tmp"
_STALE_AGE = 24 * 3600.0
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM}
_REASONS = {
    errno.EROFS: "that file system is read-only; choose another folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a part of the path is a file, not a folder",
    errno.EINVAL: "that file system can neither link nor rename without overwriting; choose another folder",
    errno.ENAMETOOLONG: "shorten the output template, for example with {slug}",
}


# ---- writing ----


@contextmanager
def temp_file(final: Path) -> Iterator[Path]:
    """Create an empty file in the folder of `final`, and remove it when the block ends.

    The folder is created if it is missing. The block fills the file, or lets another program do so, and
    passes it to `publish()`. Raises MachineError or NoSpace if the file cannot be created.
    """
    path = final.parent / f"{_PREFIX}{_host_name()}-{os.getpid()}-{secrets.token_hex(6)}{_SUFFIX}"
    with writing(final):
        make_folder(final.parent)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
    try:
        yield path
    finally:
        with suppress(OSError):  # not found if published; if it stays, remove_stale_temp_files() removes it
            path.unlink()


def publish(tmp: Path, final: Path) -> None:
    """Give `tmp` its final name in the same folder, durably, unless that name is taken.

    If the existing file has the same bytes, this succeeds; otherwise it raises OutputExists.
    """
    with writing(final):
        data = disk.read_bytes(tmp)  # while the kernel still has what it could not write
        try:
            sync(tmp)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            publish_bytes(final, data)
        else:
            _move_into_place(tmp, final)


def publish_bytes(final: Path, data: bytes) -> None:
    """Publish bytes in memory, as `publish()` does a file. Raises OutputExists, NoSpace or MachineError."""
    with _synced_temp_file(final, data) as tmp, writing(final):
        _move_into_place(tmp, final)


def replace(path: Path, data: bytes) -> None:
    """Set the content of `path`, durably and atomically: readers see the old bytes or the new.

    A symbolic link at `path` is replaced, not followed. Raises NoSpace or MachineError.
    """
    with _synced_temp_file(path, data) as tmp, writing(path):
        tmp.replace(path)
        sync(path.parent)


def move_aside(path: Path, label: str = "old") -> Path | None:
    """Move an existing file to NAME.old-1.EXT, or the next free number; return None if there is no file."""
    if not disk.is_taken(path):
        return None
    if disk.is_folder(path):
        raise OutputExists("a folder has the name of an output", where=str(path))
    for number in itertools.count(1):
        end = f".{label}-{number}{path.suffix}"
        aside = path.with_name(shorten_name(path.stem, 255 - len(end)) + end)
        with writing(aside), suppress(FileExistsError):
            _rename_without_overwriting(path, aside)
            sync(path.parent)
            return aside
    raise AssertionError("there is always a free number")


def remove(path: Path) -> None:
    """Remove a file if it exists. Raises MachineError."""
    with writing(path):
        path.unlink(missing_ok=True)


def write_all(fd: int, data: bytes) -> None:
    """Call `os.write` until all data is written: a nearly full disk takes a part. Raises OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def remove_stale_temp_files(folder: Path, now: float | None = None) -> list[Path]:
    """Remove temporary files of dead processes from `folder` that are untouched for a day; return them.

    A file of this host is removed only if its process is dead, whatever the clocks say. `now` is the time by
    the clock that dates the files of the folder, if it is known.
    """
    now = time.time() if now is None else now
    removed: list[Path] = []
    found: list[Path] = []
    with suppress(Unreadable):
        found = [p for p in disk.list_folder(folder) if p.name.startswith(_PREFIX) and p.suffix == _SUFFIX]
    for path in found:
        host, _, pid = path.name.removeprefix(_PREFIX).rpartition("-")[0].rpartition("-")
        is_alive = host in ("", _host_name()) and disk.exists(Path("/proc", pid))
        with suppress(OSError, Unreadable):
            status = disk.link_status(path)
            if not is_alive and status and now - status.st_mtime > _STALE_AGE:
                path.unlink()
                removed.append(path)
    return removed


def _modified(path: Path) -> float | None:
    found = disk.status(path)
    return found.st_mtime if found else None


def require_writable(folder: Path) -> None:
    """Prove that `folder` (created if missing) takes new files, by publishing and removing one.

    Also removes stale temporary files. Preflight calls it before any model is loaded. Raises MachineError
    with the cause, which names the folder.
    """
    try:
        with temp_file(folder / "x") as tmp:
            remove_stale_temp_files(folder, _modified(tmp))
            proof = tmp.with_name(tmp.name.replace(_SUFFIX, "-proof" + _SUFFIX))
            try:
                publish(tmp, proof)
            finally:
                remove(proof)
    except MachineError as error:
        if Path(error.where).parent != folder:
            raise
        raise type(error)(error.message, where=str(folder), hint=error.hint) from error  # not a file of ours


@contextmanager
def _synced_temp_file(final: Path, data: bytes) -> Iterator[Path]:
    """Create a temporary file that durably holds `data`."""
    with ExitStack() as stack, writing(final):
        tmp = stack.enter_context(temp_file(final))
        try:
            _write_and_sync(tmp, data)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.ENOENT):
                raise
            # EIO: the kernel dropped the pages that it could not write, and another fsync would lie.
            # ENOENT: a host whose clock is days off removed the file as stale.
            tmp = stack.enter_context(temp_file(final))
            _write_and_sync(tmp, data)
        yield tmp


def _write_and_sync(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


def _move_into_place(tmp: Path, final: Path) -> None:
    try:
        _rename_without_overwriting(tmp, final)
    except FileExistsError:
        if not _have_same_bytes(tmp, final):
            hint = "use --force to move it aside, or choose another output"
            raise OutputExists("a different file already exists", where=str(final), hint=hint) from None
        tmp.unlink()
    sync(final.parent)


def _rename_without_overwriting(source: Path, target: Path) -> None:
    """Rename within a folder; raise FileExistsError rather than replace a file."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _rename_noreplace(source, target)
    else:
        source.unlink()


def _rename_noreplace(source: Path, target: Path) -> None:
    at_cwd, noreplace = -100, 1
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(at_cwd, os.fsencode(source), at_cwd, os.fsencode(target), noreplace):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def _have_same_bytes(a: Path, b: Path) -> bool:
    if not disk.is_file(b) or disk.is_link(b) or disk.size(a) != disk.size(b):
        return False
    return disk.sha256(a) == disk.sha256(b)


def sync(path: Path) -> None:
    """Wait until a file or folder survives power loss. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        # some network file systems cannot sync a folder; theirs are not volatile either
        if error.errno != errno.EINVAL or not disk.is_folder(path):
            raise
    finally:
        os.close(fd)


def _host_name() -> str:
    """Return this machine's name as a part of a file name, without dashes."""
    return "".join(char for char in platform.node() if char.isalnum() or char == ".")[:40]


def make_folder(folder: Path) -> None:
    """Create a folder and those above it, durably. Raises OSError, and JobError for a URL."""
    if not disk.is_folder(folder):
        # Path makes one slash of the two. Folders of a job are absolute: its texts were looked at before.
        if _SCHEME.fullmatch(str(folder)):
            hint = "Mount the store as a folder, or write to a folder and copy the file."
            raise JobError("is a URL, and wancli writes files", where=f"{folder.name}//", hint=hint)
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


# ---- reasons ----


def translate(error: OSError, path: Path) -> WancliError:
    """Return the error for the user that an OSError while writing `path` means."""
    if error.errno in _FULL:
        message, hint = _describe_full(error.errno, path)
        return NoSpace(message, where=str(path), hint=f"{hint} and run again; finished shots are kept")
    reason = error.strerror or str(error)
    if error.errno == errno.EIO:
        return DiskError(
            f"cannot write: {reason}", where=str(path), hint="dmesg may say more about the disk."
        )
    hint = _describe_access(path) if error.errno in _FORBIDDEN else _REASONS.get(error.errno or 0, "")
    return MachineError(f"cannot write: {reason}", where=str(path), hint=hint)


def _describe_full(number: int, path: Path) -> tuple[str, str]:
    """Return which limit a write met, and the way out."""
    reason = os.strerror(number)
    if number == errno.EDQUOT:
        return f"{reason}: the quota of this user or group", "free some of it, or have it raised,"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if number == errno.EFBIG and limit != resource.RLIM_INFINITY:
        return f"{reason}: this process may write at most {limit:,} bytes a file", "raise `ulimit -f`"
    if number == errno.EFBIG:
        return f"{reason} for that file system", "choose another folder"
    try:
        free, files = disk.free_space(path), disk.free_files(path)
    except Unreadable:
        return reason, "free some space"
    if files == 0:
        return f"{reason}: it can hold no more files (inodes); {free / 1e6:,.1f} MB are free there", (
            "delete some files there"
        )
    return f"{reason}; {free / 1e6:,.1f} MB are free there", "free some space"


def _describe_access(path: Path) -> str:
    """Say whose the folder is, and how a group may share it."""
    try:
        folder = disk.nearest_folder(path.parent)
        found = disk.status(folder)
    except Unreadable:
        found = None
    if found is None:
        return "check who may write there"
    mode = f"{stat.S_IMODE(found.st_mode):04o}"
    whose = f"{folder} belongs to user {found.st_uid} and group {found.st_gid}, mode {mode}"
    if found.st_uid == os.geteuid() or found.st_mode & stat.S_IWGRP:
        return f"check who may write there: {whose}"
    return f"{whose}; for a shared folder its owner runs `chmod g+ws`, and everybody `umask 002` first"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise an OSError of the block as the WancliError that `translate()` returns."""
    try:
        yield
    except OSError as error:
        raise translate(error, path) from error
