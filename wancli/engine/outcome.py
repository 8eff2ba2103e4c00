"""What became of a shot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wancli.engine.manifest_body import Record
from wancli.engine.policy import Failing
from wancli.errors import WancliError
from wancli.plan.shot import Shot


@dataclass(frozen=True)
class Outcome:
    """What became of one shot. `record` is the body of its manifest, if it has one; `stopped` is one that a
    state or a latent on disk waits for, `elsewhere` one that another worker has not finished."""

    shot: Shot
    status: Literal["rendered", "already done", "failed", "stopped", "elsewhere"]
    record: Record | None = None
    error: WancliError | None = None  # without its frames: what they say is in `stack`
    stack: str = ""


def failed(shot: Shot, attempt: Failing) -> Outcome:
    """A shot with the error that ended an attempt."""
    return Outcome(shot, "failed", error=attempt.error, stack=attempt.stack)
