"""What became of a shot, and what follows from one that fails: for itself, for the others, for the exit code.

What goes wrong with one shot fails that shot, and the batch goes on. Tried again is what an error's class
says may go well another time, from what is on disk. A full disk ends the batch at once: what would follow
could not be kept either.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from wancli.errors import (
    ErrorCapture,
    ExitStatus,
    JobError,
    WancliError,
)
from wancli.plan.shot import Shot
from wancli.storage.manifest_schema import Manifest

_WORST_FIRST = (ExitStatus.INTEGRITY, ExitStatus.MACHINE, ExitStatus.MEMORY)


@dataclass(frozen=True)
class FailurePolicy:
    """How many failed shots end the batch, None for no number; how often a shot is tried again."""

    max_failures: int | None = None
    retries: int = 0

    def should_stop(self, failures: int) -> bool:
        """Whether so many failed shots are enough."""
        return self.max_failures is not None and failures >= self.max_failures

    def should_retry(self, error: WancliError, tries: int) -> bool:
        """Whether a shot that failed so after so many tries is tried once more."""
        return error.retryable and tries <= self.retries


def policy_from_flags(fail_fast: bool, max_failures: int | None, retries: int) -> FailurePolicy:
    """What the command line says. Raises JobError."""
    if fail_fast and max_failures is not None:
        raise JobError("--fail-fast is --max-failures 1; give one of them")
    return FailurePolicy(1 if fail_fast else max_failures, retries)


def exit_status(errors: Iterable[WancliError]) -> ExitStatus:
    """The exit code of a batch in which shots failed with these errors: that of the worst.

    An output in the way is a usage error where nothing was started; here it is a shot that failed.
    """
    found = {error.status for error in errors}
    worst = next((status for status in _WORST_FIRST if status in found), ExitStatus.SOME_FAILED)
    return worst if found else ExitStatus.OK


@dataclass(frozen=True)
class Outcome:
    """What became of one shot. `record` is the body of its manifest, if it has one; `stopped` is one that a
    state or a latent on disk waits for, `elsewhere` one that another worker has not finished."""

    shot: Shot
    status: Literal["rendered", "already done", "failed", "stopped", "elsewhere"]
    record: Manifest | None = None
    error: WancliError | None = None  # without its frames: what they say is in `stack`
    stack: str = ""


def failed_outcome(shot: Shot, attempt: ErrorCapture) -> Outcome:
    """A shot with the error that ended an attempt."""
    return Outcome(shot, "failed", error=attempt.error, stack=attempt.stack)
