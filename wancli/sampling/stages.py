"""Split the steps among the experts: Wan 2.2 A14B has one network for high noise and one for low."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wancli.models.config import Expert


@dataclass(frozen=True)
class Stage:
    """Consecutive steps that one network takes with one guidance."""

    expert: Expert
    steps: range
    guidance: float

    def as_dict(self) -> dict[str, Any]:
        """Return the stage for JSON, with the first and the last step."""
        return {"expert": self.expert, "steps": [self.steps[0], self.steps[-1]], "guidance": self.guidance}


def split_stages(
    timesteps: Sequence[float], boundary: float | None, guidance: float, guidance_low: float | None
) -> tuple[Stage, ...]:
    """Return one stage with all steps or, with a boundary, a first one for the steps at t >= 1000·boundary.

    Timesteps must decrease. A stage without steps is left out. `guidance` is that of the only network
    or of the high-noise expert. Source: official wan/text2video.py of Wan 2.2.
    """
    if boundary is None or guidance_low is None:
        return (Stage("only", range(len(timesteps)), guidance),)
    count = sum(t >= 1000 * boundary for t in timesteps)
    high = Stage("high", range(count), guidance)
    low = Stage("low", range(count, len(timesteps)), guidance_low)
    return tuple(stage for stage in (high, low) if stage.steps)
