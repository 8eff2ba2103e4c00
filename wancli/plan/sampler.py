"""The way from noise to the latent that the sampler of a job means for a model."""

from __future__ import annotations

from typing import NamedTuple

from wancli.errors import JobError
from wancli.job.loader import Item
from wancli.job.schema import ExpertGuidance
from wancli.models.variants import Variant
from wancli.plan.injections import no_experts
from wancli.sampling.solvers import SOLVERS, Schedule, Solver, build_schedule
from wancli.sampling.stages import Stage, split_stages


class Way(NamedTuple):
    """Guidance is that of the only network, or of the high-noise expert and the low-noise one."""

    steps: int
    shift: float
    guidance: float
    guidance_low: float | None
    schedule: Schedule
    stages: tuple[Stage, ...]


def way_of(item: Item, variant: Variant) -> Way:
    """With the defaults of solver and model. Raises JobError."""
    sampler = item.job.sampler
    solver = SOLVERS[sampler.solver]
    steps = sampler.steps or solver.steps or variant.steps
    if solver.steps and steps != solver.steps:
        raise JobError(
            f"{sampler.solver} has {solver.steps} steps, not {steps}", where=item.where("sampler", "steps")
        )
    shift = _first(sampler.shift, solver.shift, variant.shift)
    guidance, low = _guidance(item, solver, variant)
    times = build_schedule(sampler.solver, steps, shift)
    parts = split_stages(times.timesteps, variant.boundary, guidance, low)
    return Way(steps, shift, guidance, low, times, parts)


def _guidance(item: Item, solver: Solver, variant: Variant) -> tuple[float, float | None]:
    """Of the only network; or of the high-noise expert and the low-noise one."""
    said = item.job.sampler.guidance
    if isinstance(said, ExpertGuidance):
        if variant.boundary is None:
            raise no_experts(item, "sampler", "guidance")
        return said.high, said.low
    of_all = solver.guidance if said is None else said
    if of_all is None:
        return variant.guidance, variant.guidance_low
    return of_all, None if variant.boundary is None else of_all


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)
