"""What every phase of a render may use, and what `--force` sets aside.

With `--force` every shot is rendered once more, whatever lies there. What lay beside an output when the
render began does not count; what was made since does, by whichever worker. So each shot is made again once,
and one that is tried again, or taken over from a worker that died, goes on from what is on disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from wancli.engine.outcome import FailurePolicy
from wancli.progress import Progress
from wancli.signals import Stop
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
    """What lay beside the output of each shot, by its index: hosts may know one folder by several paths."""

    stamps: Mapping[int, Mapping[SidecarName, FileStamp | None]]

    @classmethod
    def snapshot(cls, shots: Iterable[Shot]) -> Self:
        """Notes what lies there now."""
        return cls(
            {shot.index: {part: _file_stamp(getattr(shot, part)) for part in _SIDECARS} for shot in shots}
        )

    def is_outdated(self, shot: Shot, part: SidecarName) -> bool:
        """Whether nobody has written this since."""
        return _file_stamp(getattr(shot, part)) == self.stamps[shot.index][part]


def _file_stamp(path: Path) -> FileStamp | None:
    with suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns
    return None


@dataclass(frozen=True)
class RenderContext:
    """The embedding cache, the display, how to treat what is there, whether somebody asked for an end, and
    what follows from a failed shot."""

    store: Store | None
    progress: Progress
    force: Force | None = None  # None: what is done stays
    stop: Stop = field(default_factory=Stop)
    policy: FailurePolicy = field(default_factory=FailurePolicy)
    claims: Claims | None = None  # of this worker; None where nobody else is at work
    model_cache: ModelCache | None = None  # networks that stay in memory between renders
    started_at: float | None = None  # when the command did, in seconds since 1970; None: with this process

    @property
    def lost_claim(self) -> bool:
        """Whether another worker took a shot over that this one is at: it was suspended for long."""
        return self.claims is not None and not self.claims.holds_all()
