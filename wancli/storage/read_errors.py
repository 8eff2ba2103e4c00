"""What an error of reading means to the user: whether the file is absent, and the way out."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from wancli.errors import NoSuchFile, Unreadable, UnreadableNow

_ABSENT = {errno.ENOENT, errno.ENOTDIR}
_PASSING = {
    errno.EIO: "the disk or its server fails; run again when it answers. dmesg may say more",
    errno.ESTALE: "the server has another file there by now, or was restarted; run again",
    errno.EAGAIN: "run again",
    errno.EBUSY: "run again when no other program holds it",
    errno.EINTR: "run again",
    errno.ETIMEDOUT: "the server does not answer; run again when it does",
    errno.ENOTCONN: "the server of that folder is away; mount it again",
    errno.EHOSTDOWN: "the server of that folder is away; run again when it answers",
    errno.EREMOTEIO: "the server of that folder fails; run again when it answers",
    errno.EMFILE: "this process may open no more files: raise the limit with `ulimit -n 4096`",
    errno.ENFILE: "this machine may open no more files; end other programs, or raise fs.file-max",
    errno.ENOMEM: "the system is out of memory; end other programs and run again",
    errno.EROFS: "the file system became read-only, mostly after an error; dmesg may say more",
    errno.EDQUOT: "the quota there is used up; free some space and run again",
    errno.ENOSPC: "the disk is full; free some space and run again",
}
_LASTING = {
    errno.EACCES: "this user may not read it, or not enter a folder above it; see `namei -l PATH`",
    errno.EPERM: "this user may not read it; see `namei -l PATH`",
    errno.ENAMETOOLONG: "a name may have 255 bytes, a path 4,095; shorten it, for example with {slug}",
    errno.ELOOP: "symbolic links lead in a circle there",
    errno.EISDIR: "a folder has this name; a file is needed",
    errno.ENXIO: "a pipe, a socket or a device has this name; a file is needed",
}


def unreadable_error(error: OSError | ValueError, path: Path) -> Unreadable:
    """Return the error for the user that an error of asking for `path` means."""
    if isinstance(error, UnicodeEncodeError) and error.encoding != "utf-8":
        message = f"cannot be read: {error.encoding}, the encoding of the locale, has no such name"
        return Unreadable(message, where=str(path), hint="set LC_ALL=C.UTF-8 or PYTHONUTF8=1")
    if not isinstance(error, OSError):
        return NoSuchFile("cannot be read: no file can have this name", where=str(path))
    number, reason = error.errno or 0, error.strerror or str(error)
    kind = NoSuchFile if number in _ABSENT else UnreadableNow if number in _PASSING else Unreadable
    return kind(f"cannot be read: {reason}", where=str(path), hint=(_PASSING | _LASTING).get(number, ""))


def find_open_files_error(error: BaseException | None) -> UnreadableNow | None:
    """Return the error for the user if an error, or its cause, comes of the limit of open files.

    Libraries put the reason into the texts of errors of their own.
    """
    while error:
        for number in (errno.EMFILE, errno.ENFILE):
            if os.strerror(number) in str(error):
                where = str(getattr(error, "filename", None) or "")
                return UnreadableNow(os.strerror(number), where=where, hint=_PASSING[number])
        error = error.__cause__ or error.__context__
    return None
