"""Everything that can go wrong, drawn, and the exit code each kind becomes.

    WancliError
    ├─ UsageError          2   a command line that no command understands
    ├─ JobError            2   a job file, flag or prompt is wrong; nothing was started
    │  ├─ PromptTooLong        more tokens than text.max_tokens, and truncate is off
    │  └─ OutputExists         an output is there that this plan did not make
    ├─ MachineError        3   space, permission, ffmpeg, device
    │  ├─ NoSpace              the disk or the quota is full; ends the batch
    │  ├─ DiskError            the disk fails (EIO); retryable
    │  └─ FfmpegError          ffmpeg is missing, died, or wrote another number of frames; retryable
    ├─ IntegrityError      4   a file does not verify
    │  ├─ CheckpointError      a checkpoint is truncated, or has missing, unknown or mis-shaped tensors
    │  └─ EntryError           a cache entry, embedding, latent or manifest is damaged
    ├─ DoesNotFit          5   more memory is needed than there is
    │  └─ OutOfMemory          it ran out while a phase was at work; retryable
    ├─ Stopped            75   SIGTERM or SIGUSR1: all that was under way is saved, the same command goes on
    │  ├─ Elsewhere           other workers are at the rest of the batch
    │  └─ Interrupted    130   as Stopped, by Ctrl-C
    ├─ ShotError           1   the numbers of one shot are wrong
    │  ├─ NotFinite            NaN or Inf in an embedding, latent or frame; names step, branch and block
    │  └─ InjectionMissed      a rule reached fewer cells of its table than planned
    └─ Bug                70   anything else, Ctrl-C (130) aside

Everything between raises; `wancli.cli` alone turns an error into an exit code. What goes wrong with one shot
fails that shot, and the batch ends with the worst of them (`wancli.engine.outcome`); NoSpace and Stopped end
it at once. Each class has a `code` for programs, and says in the first line of its docstring what it means:
`wancli errors` lists them.
"""

from __future__ import annotations

import traceback
from enum import IntEnum
from types import TracebackType
from typing import Any, ClassVar, Self


class ExitStatus(IntEnum):
    """What the process tells the shell. A batch ends with the worst that happened to it."""

    OK = 0  # every requested shot exists and verifies
    SOME_FAILED = 1  # some shots failed, the rest are done
    USAGE = 2  # usage or job error, nothing was started
    MACHINE = 3  # space, permission, ffmpeg, device
    INTEGRITY = 4  # checkpoint, cache or output does not verify
    MEMORY = 5  # does not fit
    BUG = 70  # a bug in wancli; the traceback is in the log file
    STOPPED = 75  # stopped early by SIGTERM or SIGUSR1; the same command goes on
    INTERRUPTED = 130  # Ctrl-C


class WancliError(Exception):
    """One message for the user: where it is, what is wrong there, and a way out.

    `where` is a place the user can open (`jobs/a.yaml:12: sampler.steps`, or a file), `hint`
    the next thing to try. `str()` gives the first line, `hint` is printed below it.
    """

    status: ClassVar[ExitStatus] = ExitStatus.BUG
    code: ClassVar[str] = "bug"  # stable name for machines, one per class
    retryable: ClassVar[bool] = False  # whether the same command, unchanged, may come through next time

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(f"{where}: {message}" if where else message)
        self.message = message
        self.where = where
        self.hint = hint

    def as_dict(self) -> dict[str, Any]:
        """The error object of reports, events and envelopes."""
        facts = {"code": self.code, "message": self.message, "where": self.where}
        return facts | {"hint": self.hint, "retryable": self.retryable}


class UsageError(WancliError):
    """The command line is wrong: a command, option or value that there is not."""

    status, code = ExitStatus.USAGE, "usage"


class JobError(WancliError):
    """A job file, flag or prompt is wrong; nothing was started."""

    status, code = ExitStatus.USAGE, "job"


class PromptTooLong(JobError):
    """A prompt has more tokens than `text.max_tokens`, and `truncate` is off."""

    code = "job.prompt_too_long"


class OutputExists(JobError):
    """An output is there that this job does not make."""

    code = "job.output_exists"


class MachineError(WancliError):
    """The machine does not do what is needed: permission, file system, device."""

    status, code = ExitStatus.MACHINE, "machine"


class NoSpace(MachineError):
    """The disk or the quota is full."""

    code = "machine.no_space"


class DiskError(MachineError):
    """The disk fails to keep what it took."""

    code, retryable = "machine.disk", True


class FfmpegError(MachineError):
    """ffmpeg is missing, died, or wrote another number of frames."""

    code, retryable = "machine.ffmpeg", True


class IntegrityError(WancliError):
    """A file is not what it should be."""

    status, code = ExitStatus.INTEGRITY, "integrity"


class CheckpointError(IntegrityError):
    """A checkpoint is truncated, or has missing, unknown or mis-shaped tensors."""

    code = "integrity.checkpoint"


class EntryError(IntegrityError):
    """A cache entry, embedding, latent, state or manifest is damaged."""

    code = "integrity.entry"


class DoesNotFit(WancliError):
    """More memory is needed than there is."""

    status, code = ExitStatus.MEMORY, "memory"


class OutOfMemory(DoesNotFit):
    """Memory ran out while a phase was at work."""

    code, retryable = "memory.exhausted", True


class Stopped(WancliError):
    """SIGTERM or SIGUSR1 asked for an end; all is saved, the same command goes on."""

    status, code, retryable = ExitStatus.STOPPED, "stopped", True
    command = ""  # that goes on, where it is not the same


class Interrupted(Stopped):
    """Ctrl-C asked for an end; all is saved, the same command goes on."""

    status, code = ExitStatus.INTERRUPTED, "stopped.interrupted"


class ClaimedElsewhere(Stopped):
    """Other workers are at the rest of the batch."""

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
    """Something that wancli did not foresee; the traceback is in a log file."""


def error_types() -> list[type[WancliError]]:
    """Every kind of error that a user may meet, sorted by exit code; one `code` each."""
    found: list[type[WancliError]] = []
    open_to = WancliError.__subclasses__()
    while open_to:
        found.append(kind := open_to.pop())
        open_to += kind.__subclasses__()
    return sorted(found, key=lambda kind: (kind.status, kind.code))


def describe_error_type(kind: type[WancliError]) -> dict[str, Any]:
    """Its code, exit code, whether another try may help, and what it means in one line."""
    meaning = (kind.__doc__ or "").partition("\n")[0].removesuffix(".")
    return {
        "code": kind.code,
        "exit_code": int(kind.status),
        "retryable": kind.retryable,
        "meaning": meaning,
    }


def strip_traceback(error: WancliError) -> WancliError:
    """The error without the frames it passed, which would keep their tensors as long as it lives."""
    link: BaseException | None = error
    while link:
        link.__traceback__, following = None, link.__cause__ or link.__context__
        link.__cause__ = link.__context__ = None
        link = following
    return error


def format_frames(error: BaseException) -> str:
    """Where an error comes from, and the shape and dtype of every tensor in the frames on the way."""
    lines = []
    for frame, line in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        lines.append(f"{code.co_filename}:{line} {code.co_qualname}")
        for name, value in frame.f_locals.items():
            shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
            if shape is not None and dtype is not None:
                lines.append(f"    {name}: {list(shape)} {dtype}")
    return "\n".join(lines)


class ErrorCapture:
    """A `with` block that keeps the error of its shot instead of raising it.

    What ends the batch goes through: NoSpace, Stopped, a checkpoint that all its shots need, and whatever is
    no WancliError. The error is kept without its frames, and so without the tensors in them; what they say is
    in `stack`.
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
        """Keeps an error that was caught already."""
        self.stack = format_frames(error)
        self.error = strip_traceback(error)
