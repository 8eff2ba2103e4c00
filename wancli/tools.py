"""What every phase may use."""

from __future__ import annotations

from dataclasses import dataclass, field

from wancli.events import Progress
from wancli.policy import Policy
from wancli.signals import Stop
from wancli.store import Store


@dataclass(frozen=True)
class Tools:
    """The embedding cache, the display, how to treat what is there, whether somebody asked for an end, and
    what follows from a failed shot."""

    store: Store | None
    progress: Progress
    force: bool = False
    stop: Stop = field(default_factory=Stop)
    policy: Policy = field(default_factory=Policy)
