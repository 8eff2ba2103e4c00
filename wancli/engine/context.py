"""What every phase may use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from wancli.engine.force import Force
from wancli.engine.policy import Policy
from wancli.progress import Progress
from wancli.signals import Stop
from wancli.storage.cache import Store
from wancli.storage.claims import Claims

if TYPE_CHECKING:
    from wancli.engine.networks import Kept


@dataclass(frozen=True)
class Tools:
    """The embedding cache, the display, how to treat what is there, whether somebody asked for an end, and
    what follows from a failed shot."""

    store: Store | None
    progress: Progress
    force: Force | None = None  # None: what is done stays
    stop: Stop = field(default_factory=Stop)
    policy: Policy = field(default_factory=Policy)
    claims: Claims | None = None  # of this worker; None where nobody else is at work
    kept: Kept | None = None  # networks that stay in memory between renders
    began: float | None = None  # when the command did, in seconds since 1970; None: with this process

    @property
    def lost(self) -> bool:
        """Whether another worker took a shot over that this one is at: it was suspended for long."""
        return self.claims is not None and not self.claims.intact()
