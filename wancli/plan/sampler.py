"""Resolve the sampler settings of a job, with the defaults of the solver and the model."""

from __future__ import annotations

from typing import NamedTuple

from wancli.errors import JobError
from wancli.job.loader import Item
from wancli.job.schema import ExpertGuidance
from wancli.models.variants import Variant
from wancli.plan.injections import no_experts_error
from wancli.sampling.solvers import SOLVERS, SigmaSchedule, Solver, build_sigma_schedule
from wancli.sampling.stages import Stage, split_stages

AREA_480P = 832 * 480  # pixels of a video


class SamplerSettings(NamedTuple):
    """Resolved sampler settings. `guidance` is that of the only network or of the high-noise expert."""

    steps: int
    shift: float
    guidance: float
    guidance_low: float | None
    boundary: float | None  # the high-noise expert takes timesteps from 1000 * boundary up
    schedule: SigmaSchedule
    stages: tuple[Stage, ...]


def resolve_sampler(item: Item, variant: Variant, area: int) -> SamplerSettings:
    """Complete the sampler settings of a job for a video of `area` pixels. Raises JobError."""
    sampler = item.job.sampler
    solver = SOLVERS[sampler.solver]
    steps = sampler.steps or solver.steps or variant.steps
    if solver.steps and steps != solver.steps:
        raise JobError(
            f"{sampler.solver} has {solver.steps} steps, not {steps}", where=item.location("sampler", "steps")
        )
    small = variant.shift_480p if area <= AREA_480P else None
    shift = _first_given(sampler.shift, solver.shift, small, variant.shift)
    guidance, low = _resolve_guidance(item, solver, variant)
    boundary = variant.boundary
    if sampler.boundary is not None:
        if boundary is None:
            raise no_experts_error(item, "sampler", "boundary")
        boundary = sampler.boundary
    times = build_sigma_schedule(sampler.solver, steps, shift)
    parts = split_stages(times.timesteps, boundary, guidance, low)
    return SamplerSettings(steps, shift, guidance, low, boundary, times, parts)


def _resolve_guidance(item: Item, solver: Solver, variant: Variant) -> tuple[float, float | None]:
    """Return the guidance of the only network, or of the high-noise and the low-noise expert."""
    requested = item.job.sampler.guidance
    if isinstance(requested, ExpertGuidance):
        if variant.boundary is None:
            raise no_experts_error(item, "sampler", "guidance")
        return requested.high, requested.low
    common = solver.guidance if requested is None else requested
    if common is None:
        return variant.guidance, variant.guidance_low
    return common, None if variant.boundary is None else common


def _first_given(*values: float | None) -> float:
    return next(value for value in values if value is not None)
