"""Which network takes which steps, with which guidance: Wan 2.2 A14B has one for high noise, one for low."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wancli.models.config import Expert


@dataclass(frozen=True)
class Stage:
    """Steps that follow one another, taken by one network with one guidance."""

    expert: Expert
    steps: range
    guidance: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the steps as the first and the last."""
        return {"expert": self.expert, "steps": [self.steps[0], self.steps[-1]], "guidance": self.guidance}


def split_stages(
    timesteps: Sequence[float], boundary: float | None, guidance: float, guidance_low: float | None
) -> tuple[Stage, ...]:
    """All steps in one stage; or with a boundary those at t >= 1000·boundary in a first one.

    Timesteps must fall. A stage without steps is left out. `guidance` is that of the only network
    or of the high-noise expert. Source: official wan/text2video.py of Wan 2.2.
    """
    if boundary is None or guidance_low is None:
        return (Stage("only", range(len(timesteps)), guidance),)
    count = sum(t >= 1000 * boundary for t in timesteps)
    high = Stage("high", range(count), guidance)
    low = Stage("low", range(count, len(timesteps)), guidance_low)
    return tuple(stage for stage in (high, low) if stage.steps)
