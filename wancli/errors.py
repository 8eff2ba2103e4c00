"""Everything that can go wrong, drawn, and the exit code of each kind.

    WancliError
    ├─ UsageError          2   a command line that no command understands
    ├─ JobError            2   a job file, flag or prompt is wrong; nothing was started
    │  ├─ PromptTooLong        more tokens than text.max_tokens, and truncate is off
    │  └─ OutputExists         an output already exists that this plan did not make
    ├─ MachineError        3   space, permission, ffmpeg, device
    │  ├─ NoSpace              the disk or the quota is full; ends the batch
    │  ├─ DiskError            the disk fails (EIO); retryable
    │  ├─ Unreadable           a file or folder that cannot be looked at: permission, name, links in a circle
    │  │  ├─ UnreadableNow        for now: EIO, a stale handle, too many open files; retryable
    │  │  └─ NoSuchFile           a file that is needed does not exist
    │  ├─ HubError             the Hugging Face hub cannot be reached or fails; retryable
    │  ├─ HubRefused           the hub refuses access: token, terms, offline mode
    │  └─ FfmpegError          ffmpeg is missing, died, or wrote another number of frames; retryable
    ├─ IntegrityError      4   a file does not verify
    │  ├─ CheckpointError      a checkpoint is truncated or unreadable, or has missing or mis-shaped tensors
    │  └─ EntryError           a cache entry, embedding, latent or manifest is damaged
    ├─ DoesNotFit          5   more memory is needed than there is
    │  └─ OutOfMemory          memory ran out during a phase; retryable
    ├─ Stopped            75   a signal to stop: all states are saved, the same command resumes
    │  ├─ ClaimedElsewhere     the remaining shots are claimed by other workers
    │  └─ Interrupted    130   as Stopped, by Ctrl-C
    ├─ ShotError           1   the numbers of one shot are wrong
    │  ├─ NotFinite            NaN or Inf in an embedding, latent or frame; names step, branch and block
    │  └─ InjectionMissed      a rule reached fewer cells of its table than planned
    └─ Bug                70   anything else, except Ctrl-C (130)

All other modules raise; `wancli.cli` alone turns an error into an exit code. An error of one shot fails that
shot, and the batch ends with the worst of them (`wancli.engine.outcome`). NoSpace and Stopped end the batch
at once. Each class has a `code` for programs, and the first line of its docstring says what it means:
`wancli errors` lists them.
"""

from __future__ import annotations

import traceback
from enum import IntEnum
from types import TracebackType
from typing import Any, ClassVar, Self


class ExitStatus(IntEnum):
    """The exit code of the process. A batch ends with the worst that happened to it."""

    OK = 0  # every requested shot exists and verifies
    SOME_FAILED = 1  # some shots failed, the rest are done
    USAGE = 2  # usage or job error, nothing was started
    MACHINE = 3  # space, permission, ffmpeg, device
    INTEGRITY = 4  # checkpoint, cache or output does not verify
    MEMORY = 5  # does not fit
    BUG = 70  # a bug in wancli; the traceback is in the log file
    STOPPED = 75  # stopped early by SIGTERM or another signal; the same command resumes
    INTERRUPTED = 130  # Ctrl-C


class WancliError(Exception):
    """One message for the user: the place, the problem, and a way out.

    `where` is a place that the user can open (`jobs/a.yaml:12: sampler.steps`, or a file). `hint` is the next
    thing to try. `str()` gives the place and the problem; the command line prints `hint` below them.
    """

    status: ClassVar[ExitStatus] = ExitStatus.BUG
    code: ClassVar[str] = "bug"  # stable name for machines, one per class
    retryable: ClassVar[bool] = False  # whether the same command, unchanged, may succeed next time

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(f"{where}: {message}" if where else message)
        self.message = message
        self.where = where
        self.hint = hint

    def as_dict(self) -> dict[str, Any]:
        """Return the error object of reports, events and envelopes."""
        facts = {"code": self.code, "message": self.message, "where": self.where}
        return facts | {"hint": self.hint, "retryable": self.retryable}


class UsageError(WancliError):
    """The command line is wrong: an unknown command or option, or an invalid value."""

    status, code = ExitStatus.USAGE, "usage"


class JobError(WancliError):
    """A job file, flag or prompt is wrong; nothing was started."""

    status, code = ExitStatus.USAGE, "job"


class PromptTooLong(JobError):
    """A prompt has more tokens than `text.max_tokens`, and `truncate` is off."""

    code = "job.prompt_too_long"


class OutputExists(JobError):
    """An output already exists that this job did not make."""

    code = "job.output_exists"


class MachineError(WancliError):
    """The machine does not provide what is needed: permission, file system, device."""

    status, code = ExitStatus.MACHINE, "machine"


class NoSpace(MachineError):
    """The disk or the quota is full."""

    code = "machine.no_space"


class DiskError(MachineError):
    """The disk fails to keep what was written."""

    code, retryable = "machine.disk", True


class Unreadable(MachineError):
    """A file or folder cannot be looked at: it may exist and be sound."""

    code = "machine.unreadable"


class UnreadableNow(Unreadable):
    """A file cannot be looked at now: a failing disk, too many open files."""

    code, retryable = "machine.unreadable.now", True


class NoSuchFile(Unreadable):
    """A file that is needed does not exist."""

    code = "machine.unreadable.missing"


class HubError(MachineError):
    """The Hugging Face hub cannot be reached or fails."""

    code, retryable = "machine.hub", True


class HubRefused(MachineError):
    """The Hugging Face hub is not to be asked, or wants a token or accepted terms."""

    code = "machine.hub.refused"


class FfmpegError(MachineError):
    """ffmpeg is missing, died, or wrote another number of frames."""

    code, retryable = "machine.ffmpeg", True


class IntegrityError(WancliError):
    """A file does not verify."""

    status, code = ExitStatus.INTEGRITY, "integrity"


class CheckpointError(IntegrityError):
    """A checkpoint is truncated or unreadable, or has missing or mis-shaped tensors."""

    code = "integrity.checkpoint"


class EntryError(IntegrityError):
    """A cache entry, embedding, latent, state or manifest is damaged."""

    code = "integrity.entry"


class DoesNotFit(WancliError):
    """More memory is needed than there is."""

    status, code = ExitStatus.MEMORY, "memory"


class OutOfMemory(DoesNotFit):
    """Memory ran out during a phase."""

    code, retryable = "memory.exhausted", True


class Stopped(WancliError):
    """Stopped by a signal; all states are saved, the same command resumes."""

    status, code, retryable = ExitStatus.STOPPED, "stopped", True
    resume_command = ""  # if the same command would not resume


class Interrupted(Stopped):
    """Stopped by Ctrl-C; all states are saved, the same command resumes."""

    status, code = ExitStatus.INTERRUPTED, "stopped.interrupted"


class ClaimedElsewhere(Stopped):
    """The remaining shots are claimed by other workers."""

    code = "stopped.elsewhere"


class ShotError(WancliError):
    """The numbers of a shot are wrong."""

    status, code = ExitStatus.SOME_FAILED, "shot"


class NotFinite(ShotError):
    """NaN or Inf in an embedding, a latent or frames."""

    code = "shot.not_finite"


class InjectionMissed(ShotError):
    """An injection did not reach the blocks it was planned for."""

    code = "shot.injection_missed"


class Bug(WancliError):
    """An error that wancli did not foresee; the traceback is in a log file."""


def error_types() -> list[type[WancliError]]:
    """List every error class that a user may meet, sorted by exit code; each has a `code` of its own."""
    types: list[type[WancliError]] = []
    pending = WancliError.__subclasses__()
    while pending:
        types.append(kind := pending.pop())
        pending += kind.__subclasses__()
    return sorted(types, key=lambda kind: (kind.status, kind.code))


def describe_error_type(kind: type[WancliError]) -> dict[str, Any]:
    """Return the code, exit code and meaning of an error class, and whether another try may help."""
    meaning = (kind.__doc__ or "").partition("\n")[0].removesuffix(".")
    return {
        "code": kind.code,
        "exit_code": int(kind.status),
        "retryable": kind.retryable,
        "meaning": meaning,
    }


def strip_traceback(error: WancliError) -> WancliError:
    """Remove the frames from an error and its causes: they would keep their tensors as long as it lives."""
    link: BaseException | None = error
    while link:
        link.__traceback__, following = None, link.__cause__ or link.__context__
        link.__cause__ = link.__context__ = None
        link = following
    return error


def format_frames(error: BaseException) -> str:
    """List the frames that an error passed, with the shape and dtype of every tensor in them."""
    lines = []
    for frame, line in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        lines.append(f"{code.co_filename}:{line} {code.co_qualname}")
        for name, value in frame.f_locals.items():
            shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
            if isinstance(shape, tuple) and dtype is not None:  # a module numpy has a shape() and a dtype
                lines.append(f"    {name}: {list(shape)} {dtype}")
    return "\n".join(lines)


class ErrorCapture:
    """A `with` block that keeps the error of its shot instead of raising it.

    Errors that end the batch are raised: NoSpace, Stopped, CheckpointError (all shots need the checkpoint),
    and every error that is not a WancliError. The error is kept without its frames, and so without the
    tensors in them; `stack` has the text of the frames.
    """

    error: WancliError | None = None
    stack: str = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: TracebackType | None) -> bool:
        if not isinstance(error, WancliError) or isinstance(error, (NoSpace, Stopped, CheckpointError)):
            return False
        self.record(error)
        return True

    def record(self, error: WancliError) -> None:
        """Keep an error that was already caught."""
        self.stack = format_frames(error)
        self.error = strip_traceback(error)
