"""How shots share work: rounds of batches, and the shots that fork from others.

`wancli.plan.batching` builds a schedule from the shots of a plan and the memory limit of their models; the
engine executes it. A schedule changes no pixel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from wancli.plan import memory_estimate
from wancli.plan.prefix_sharing import Fork

if TYPE_CHECKING:
    from wancli.plan.model_spec import ModelSpec
    from wancli.plan.shot import Shot
    from wancli.resources.memory_model import Phase

Batch = tuple["Shot", ...]  # shots whose forwards share each pass over the weights
Round = tuple[Batch, ...]  # batches that one worker claims at once, their states in memory together


@dataclass(frozen=True)
class Placement:
    """What a schedule decides about one shot."""

    batch_size: int = 1
    sample: Phase | None = None  # predicted memory of sampling its batch; None: that of the shot alone
    pictures: Phase | None = None  # of encoding its pictures beside other networks; None: beside none
    keeps_clip: bool = False  # whether CLIP stays in memory for a later round
    fork: Fork | None = None

    @property
    def shared_steps(self) -> int:
        """The number of first steps that another shot takes for this one."""
        return self.fork.step if self.fork else 0


ALONE = Placement()


@dataclass(frozen=True)
class Schedule:
    """Rounds of batches in the order of their execution, and by index the placement of each shot."""

    rounds: tuple[Round, ...] = ()
    placements: Mapping[int, Placement] = field(default_factory=dict)

    @property
    def shots(self) -> tuple[Shot, ...]:
        """All shots, in the order of the job."""
        shots = [shot for round_ in self.rounds for batch in round_ for shot in batch]
        return tuple(sorted(shots, key=lambda shot: shot.index))

    def placement(self, shot: Shot) -> Placement:
        """Return the placement of a shot; a shot that is not scheduled runs alone."""
        return self.placements.get(shot.index, ALONE)

    def phases(self, shot: Shot) -> tuple[Phase, ...]:
        """Predict the memory of encoding, sampling with its batch, decoding, and encoding pictures."""
        place = self.placement(shot)
        return memory_estimate.predict_phases(shot, place.sample, place.pictures)

    def peak(self, shot: Shot) -> int:
        """Predict the peak of the whole process in bytes, on CUDA that of the device."""
        return memory_estimate.peak_of(shot.model, self.phases(shot))

    def shared_steps(self) -> dict[int, int]:
        """Return by index of each shot that forks the number of steps that another shot takes for it."""
        return {index: place.fork.step for index, place in self.placements.items() if place.fork}

    def covers(self, shots: Sequence[Shot]) -> bool:
        """Return whether exactly these shots are scheduled."""
        return self.shots == tuple(sorted(shots, key=lambda shot: shot.index))

    def of_model(self, model: ModelSpec) -> Schedule:
        """Return the rounds of one model; no round mixes models."""
        rounds = tuple(round_ for round_ in self.rounds if round_[0][0].model == model)
        indices = {shot.index for round_ in rounds for batch in round_ for shot in batch}
        placements = {index: place for index, place in self.placements.items() if index in indices}
        return Schedule(rounds, placements)
