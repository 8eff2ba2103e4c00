"""The services of a render, and the files that `--force` ignores.

With `--force` every shot is rendered again. wancli then ignores files beside an output that are older than
the render, and uses files that any worker has made since. So each shot is rendered again once, and a shot
that is retried, or taken over from a worker that died, resumes from what is on disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from wancli.engine.outcome import FailurePolicy
from wancli.progress import Progress
from wancli.signals import Stop
from wancli.storage import disk
from wancli.storage.cache import Store
from wancli.storage.claims import Claims

if TYPE_CHECKING:
    from wancli.engine.networks import ModelCache
    from wancli.plan.shot import Shot

SidecarName = Literal["manifest", "state", "latents"]
FileStamp = tuple[int, int]  # the same as long as a file is the same
_SIDECARS: tuple[SidecarName, ...] = ("manifest", "state", "latents")


@dataclass(frozen=True)
class Force:
    """The files beside the output of each shot when the render began.

    They are known by the index of the shot: hosts may know one folder by several paths.
    """

    stamps: Mapping[int, Mapping[SidecarName, FileStamp | None]]

    @classmethod
    def snapshot(cls, shots: Iterable[Shot]) -> Self:
        """Record the files that exist now."""
        return cls(
            {shot.index: {part: _file_stamp(getattr(shot, part)) for part in _SIDECARS} for shot in shots}
        )

    def is_outdated(self, shot: Shot, part: SidecarName) -> bool:
        """Return whether no worker has written this file since the render began."""
        return _file_stamp(getattr(shot, part)) == self.stamps[shot.index][part]


def _file_stamp(path: Path) -> FileStamp | None:
    status = disk.status(path)
    return (status.st_ino, status.st_mtime_ns) if status else None


@dataclass(frozen=True)
class RenderContext:
    """The services of a run: embedding cache, progress display, overwrite policy, stop flag, failure policy,
    claims, model cache."""

    store: Store | None
    progress: Progress
    force: Force | None = None  # None: finished shots stay
    stop: Stop = field(default_factory=Stop)
    policy: FailurePolicy = field(default_factory=FailurePolicy)
    claims: Claims | None = None  # of this worker; None if it is the only one
    model_cache: ModelCache | None = None  # keeps networks in memory between renders
    started_at: float | None = None  # of the command, in seconds since 1970; None: when this process was

    @property
    def lost_claim(self) -> bool:
        """Whether another worker took over a shot of this one, which was suspended for long."""
        return self.claims is not None and not self.claims.holds_all()
