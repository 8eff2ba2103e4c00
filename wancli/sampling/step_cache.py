"""Step caches as data: which forwards of a shot reuse the residual of an earlier one.

The residual of a forward is x after the blocks minus x before them. A forward that reuses one runs no block.
The rules here decide from numbers alone, so the plan knows every reused forward before a model is loaded.

MagCache: Ma et al. 2025, arXiv 2506.09045. How fast residuals shrink from step to step is measured once for a
model; it tells how much is lost by reusing one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from wancli.injection.exprs import Branch

Method = Literal["magcache"]
NOTHING_REUSED: frozenset[tuple[int, Branch]] = frozenset()


@dataclass(frozen=True)
class CacheSettings:
    """The settings of a step cache. `threshold` bounds the summed error of consecutive reuses, `skips` their
    number; the first steps, the share `retention` of those of each expert, are computed. `table` names the
    measured ratios. The other expert than `expert` computes all its steps.
    """

    method: Method
    threshold: float
    skips: int
    retention: float
    table: str
    expert: Literal["both", "high", "low"] = "both"


@dataclass(frozen=True)
class StepCache:
    """The settings of a step cache, and the steps at which the forward of each branch reuses a residual."""

    settings: CacheSettings
    steps: tuple[tuple[Branch, tuple[int, ...]], ...]

    @cached_property
    def reused(self) -> frozenset[tuple[int, Branch]]:
        """Every reused forward: its step and its branch."""
        return frozenset((step, branch) for branch, steps in self.steps for step in steps)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches that reuse residuals, for which memory is needed."""
        return tuple(branch for branch, steps in self.steps if steps)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings and, by branch, the reused steps, for JSON."""
        return asdict(self.settings) | {"reused": {branch: list(steps) for branch, steps in self.steps}}


def reuse_by_magnitude(
    ratios: Sequence[float],
    settings: CacheSettings,
    steps: int,
    stages: Sequence[range],
    changed: Collection[int],
) -> Iterator[int]:
    """Yield the steps of a branch that reuse a residual, by the rule of MagCache.

    `ratios[i]` is the size of the residual of step i over that of the step before, of a render of
    `len(ratios)` steps; another number of `steps` takes the nearest. `stages` are the steps of each expert
    that may reuse. The first step of a stage and every `changed` one is computed.
    """
    for stage in stages:
        first = stage.start + int(len(stage) * settings.retention + 1e-9)  # 0.58 * 50 is 28.999..
        ratio, count, error = 1.0, 0, 0.0
        for step in stage:
            if step > stage.start and step >= first and step not in changed:
                ratio *= ratios[round(step * (len(ratios) - 1) / (steps - 1))]
                count += 1
                error += abs(1 - ratio)
                if error < settings.threshold and count <= settings.skips:
                    yield step
                    continue
            ratio, count, error = 1.0, 0, 0.0
