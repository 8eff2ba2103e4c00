"""Everything that can go wrong, drawn, and the exit code each kind becomes.

    WancliError
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
    │  ├─ Interrupted    130   the same by Ctrl-C
    │  └─ Elsewhere           other workers are at the rest
    └─ ShotError           1   the numbers of one shot are wrong
       ├─ NotFinite            NaN or Inf in an embedding, latent or frame; names step, branch and block
       └─ InjectionMissed      a rule reached fewer cells of its table than planned

Everything between raises; `wancli.cli` alone turns an error into an exit code. What goes wrong with one shot
fails that shot, and the batch ends with the worst of them (`wancli.policy`); NoSpace and Stopped end it at
once. Anything that is not a WancliError, nor Ctrl-C (130), is a bug in wancli and exits with 70.
"""

from __future__ import annotations

import traceback
from enum import IntEnum
from typing import ClassVar


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
    retryable: ClassVar[bool] = False  # whether the same may go well another time

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(f"{where}: {message}" if where else message)
        self.message = message
        self.where = where
        self.hint = hint


class JobError(WancliError):
    status, code = ExitStatus.USAGE, "job"


class PromptTooLong(JobError):
    code = "job.prompt_too_long"


class OutputExists(JobError):
    code = "job.output_exists"


class MachineError(WancliError):
    status, code = ExitStatus.MACHINE, "machine"


class NoSpace(MachineError):
    code = "machine.no_space"


class DiskError(MachineError):
    code, retryable = "machine.disk", True


class FfmpegError(MachineError):
    code, retryable = "machine.ffmpeg", True


class IntegrityError(WancliError):
    status, code = ExitStatus.INTEGRITY, "integrity"


class CheckpointError(IntegrityError):
    code = "integrity.checkpoint"


class EntryError(IntegrityError):
    code = "integrity.entry"


class DoesNotFit(WancliError):
    status, code = ExitStatus.MEMORY, "memory"


class OutOfMemory(DoesNotFit):
    code, retryable = "memory.exhausted", True


class Stopped(WancliError):
    status, code = ExitStatus.STOPPED, "stopped"


class Interrupted(Stopped):
    status, code = ExitStatus.INTERRUPTED, "stopped.interrupted"


class Elsewhere(Stopped):
    code = "stopped.elsewhere"


class ShotError(WancliError):
    status, code = ExitStatus.SOME_FAILED, "shot"


class NotFinite(ShotError):
    code = "shot.not_finite"


class InjectionMissed(ShotError):
    code = "shot.injection_missed"


def bare(error: WancliError) -> WancliError:
    """The error without the frames it passed, which would keep their tensors as long as it lives."""
    link: BaseException | None = error
    while link:
        link.__traceback__, following = None, link.__cause__ or link.__context__
        link.__cause__ = link.__context__ = None
        link = following
    return error


def stack(error: BaseException) -> str:
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
