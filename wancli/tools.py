"""What every phase may use."""

from __future__ import annotations

from dataclasses import dataclass

from wancli.events import Progress
from wancli.store import Store


@dataclass(frozen=True)
class Tools:
    """The embedding cache, the display, and how to treat what is there."""

    store: Store | None
    progress: Progress
    force: bool = False
