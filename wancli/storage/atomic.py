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
import hashlib
import itertools
import os
import platform
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from wancli.errors import DiskError, MachineError, NoSpace, OutputExists, WancliError

_PREFIX, _SUFFIX = ".wancli-", ".tmp"
_STALE_AGE = 24 * 3600.0
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REASONS = {
    errno.EACCES: "check who may write there",
    errno.EPERM: "check who may write there",
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
        _make_folder(final.parent)
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
        data = tmp.read_bytes()  # while the kernel still has what it could not write
        try:
            _sync(tmp)
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
        _sync(path.parent)


def move_aside(path: Path, label: str = "old") -> Path | None:
    """Move an existing file to NAME.old-1.EXT, or the next free number; return None if there is no file."""
    if not os.path.lexists(path):
        return None
    if path.is_dir():
        raise OutputExists("a folder has the name of an output", where=str(path))
    for number in itertools.count(1):
        aside = path.with_name(f"{path.stem}.{label}-{number}{path.suffix}")
        with writing(aside), suppress(FileExistsError):
            _rename_without_overwriting(path, aside)
            _sync(path.parent)
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
    removed = []
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        host, _, pid = path.name.removeprefix(_PREFIX).rpartition("-")[0].rpartition("-")
        is_alive = host in ("", _host_name()) and Path("/proc", pid).exists()
        with suppress(OSError):
            if not is_alive and now - path.lstat().st_mtime > _STALE_AGE:
                path.unlink()
                removed.append(path)
    return removed


def require_writable(folder: Path) -> None:
    """Prove that `folder` (created if missing) takes new files, by publishing and removing one.

    Also removes stale temporary files. Preflight calls it before any model is loaded. Raises MachineError
    with the cause.
    """
    with temp_file(folder / "x") as tmp:
        remove_stale_temp_files(folder, tmp.stat().st_mtime)
        proof = tmp.with_name(tmp.name.replace(_SUFFIX, "-proof" + _SUFFIX))
        try:
            publish(tmp, proof)
        finally:
            remove(proof)


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
    _sync(final.parent)


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
    if not stat.S_ISREG(b.lstat().st_mode) or a.stat().st_size != b.stat().st_size:
        return False
    return sha256(a) == sha256(b)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        # some network file systems cannot sync a folder; theirs are not volatile either
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(fd)


def _host_name() -> str:
    """Return this machine's name as a part of a file name, without dashes."""
    return "".join(char for char in platform.node() if char.isalnum() or char == ".")[:40]


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


# ---- reading and reasons ----


def sha256(path: Path) -> str:
    """Return the hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_space(path: Path) -> int:
    """Return the bytes free for this user on the disk of `path`, which need not exist."""
    while not path.exists():
        path = path.absolute().parent
    return shutil.disk_usage(path).free


def translate(error: OSError, path: Path) -> WancliError:
    """Return the error for the user that an OSError while writing `path` means."""
    if error.errno in _FULL:
        free = free_space(path) / 1e6
        message = f"{os.strerror(error.errno)}; {free:,.1f} MB are free there"
        return NoSpace(
            message, where=str(path), hint="free some space and run again; finished shots are kept"
        )
    reason = error.strerror or str(error)
    if error.errno == errno.EIO:
        return DiskError(
            f"cannot write: {reason}", where=str(path), hint="dmesg may say more about the disk."
        )
    return MachineError(f"cannot write: {reason}", where=str(path), hint=_REASONS.get(error.errno or 0, ""))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise an OSError of the block as the WancliError that `translate()` returns."""
    try:
        yield
    except OSError as error:
        raise translate(error, path) from error
