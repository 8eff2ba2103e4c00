"""Which LoRA is applied at which blocks and steps, as plain data: no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wancli.models.config import Expert
from wancli.weights.lora.match import Coverage


@dataclass(frozen=True)
class LoraUse:
    """One LoRA of a shot. `blocks` None is everything, parameters outside the blocks included."""

    path: Path
    sha256: str
    strength: float
    blocks: tuple[int, ...] | None
    steps: tuple[int, ...] | None  # None is every step
    expert: Expert | None  # None is both, or the only one
    coverage: Coverage
    rescaled: bool = False  # by metadata that the first versions of wancli did not read

    def strength_at(self, step: int, block: int | None, expert: Expert = "only") -> float:
        """Return the strength for a block (None: outside the blocks) at a step; 0 if it does not apply."""
        applies = (
            (self.steps is None or step in self.steps)
            and (self.blocks is None or block in self.blocks)
            and self.expert in (None, expert)
        )
        return self.strength if applies else 0.0

    @property
    def pixel_settings(self) -> dict[str, object]:
        """All settings that pixels depend on. The scales are part of them only if the first versions of
        wancli took other ones, so that the keys of all other shots stay.
        """
        scales = {"scales": self.coverage.scales} if self.rescaled else {}
        return scales | {
            "sha256": self.sha256,
            "strength": self.strength,
            "blocks": self.blocks,
            "steps": self.steps,
            "expert": self.expert,
        }
