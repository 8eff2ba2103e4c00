"""The outcome of a shot, and the consequences of a failure: retries, the end of the batch, the exit code.

An error in one shot fails that shot, and the batch continues. A failed shot is retried from what is on disk
if the class of its error is retryable. A full disk ends the batch at once: later shots could not be saved
either.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from wancli.errors import ErrorCapture, ExitStatus, WancliError

if TYPE_CHECKING:  # the command line imports this module before it knows the command
    from wancli.plan.shot import Shot
    from wancli.storage.manifest_schema import Manifest

_WORST_FIRST = (ExitStatus.INTEGRITY, ExitStatus.MACHINE, ExitStatus.MEMORY)


@dataclass(frozen=True)
class FailurePolicy:
    """How many failed shots stop the batch, None if none do, and how often a shot is retried."""

    max_failures: int | None = None
    retries: int = 0

    def should_stop(self, failures: int) -> bool:
        """Return whether this many failed shots stop the batch."""
        return self.max_failures is not None and failures >= self.max_failures

    def should_retry(self, error: WancliError, tries: int) -> bool:
        """Return whether a shot that failed with this error after so many tries is retried."""
        return error.retryable and tries <= self.retries


def exit_status(errors: Iterable[WancliError]) -> ExitStatus:
    """Return the exit code of a batch in which shots failed with these errors: that of the worst.

    An output that already exists is a usage error if nothing was started; here it is a failed shot.
    """
    statuses = {error.status for error in errors}
    worst = next((status for status in _WORST_FIRST if status in statuses), ExitStatus.SOME_FAILED)
    return worst if statuses else ExitStatus.OK


@dataclass(frozen=True)
class Outcome:
    """What became of one shot. `record` is the body of its manifest, if it has one.

    `stopped`: a later run resumes from the state or latent on disk. `elsewhere`: claimed by another worker,
    which has not finished it.
    """

    shot: Shot
    status: Literal["rendered", "already done", "failed", "stopped", "elsewhere"]
    record: Manifest | None = None
    error: WancliError | None = None  # without its frames, which are described in `stack`
    stack: str = ""
    shared_steps: int = 0  # first steps that another shot took for this one
    follows_failure: bool = False  # whether it failed only because the shot that it continues did


def failed_outcome(shot: Shot, attempt: ErrorCapture) -> Outcome:
    """Return the outcome of a shot whose attempt ended with an error."""
    return Outcome(shot, "failed", error=attempt.error, stack=attempt.stack)
