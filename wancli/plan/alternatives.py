"""Alternative settings of a shot: precision x residency x chunk x size, each with the memory it needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from wancli.plan import memory_estimate, memory_policy
from wancli.plan.model_spec import ModelSpec
from wancli.plan.shot import Shot
from wancli.resources.memory_model import Phase, Residency

SIZES = ((1280, 720), (960, 544), (832, 480), (640, 368), (480, 272), (320, 176), (256, 144))
SQUARES = ((960, 960), (720, 720), (512, 512), (384, 384), (256, 256), (128, 128))
MAX_SMALLER_SIZES = 3  # sizes beside that of the job
Dtype = Literal["fp32", "bf16", "fp16", "fp8"]


@dataclass(frozen=True)
class Alternative:
    """One way to run a shot. `phases` are those in which the transformer is loaded; `total` is the peak of
    the whole process in these phases, on CUDA that of the device."""

    dtype: Dtype
    residency: Residency
    chunk: int | None
    width: int
    height: int
    phases: tuple[Phase, ...]
    total: int
    fits: bool
    chosen: bool


def alternatives(shot: Shot) -> list[Alternative]:
    """Return all valid ways to run a shot alone, the most precise first.

    Its text encoder, frames and prompts stay the same.
    """
    ways = []
    for model in _model_variants(shot.model):
        for width, height in nearby_sizes(shot):
            other = replace(shot, model=model, width=width, height=height)
            phases = tuple(
                phase
                for phase in memory_estimate.predict_phases(other)
                if phase.name in memory_policy.TRANSFORMER_PHASES
            )
            total = memory_estimate.peak_of(model, phases)
            ways.append(
                Alternative(
                    model.dtype,
                    model.residency,
                    model.kernels.chunk,
                    width,
                    height,
                    phases,
                    total,
                    fits=total <= shot.model.memory_limit,
                    chosen=(model, width, height) == (shot.model, shot.width, shot.height),
                )
            )
    return ways


def _model_variants(model: ModelSpec) -> Iterator[ModelSpec]:
    lean = model.kernels.chunk or memory_policy.CHUNKS[-1]
    for dtype in get_args(Dtype):
        residencies: tuple[Residency, ...] = ("packed",) if dtype == "fp8" else get_args(Residency)
        for residency in residencies:
            if residency == "packed" != model.residency and memory_estimate.stored_dtype(model) == dtype:
                continue  # nothing is to be unpacked
            for chunk in (None, lean):
                yield replace(memory_policy.with_transformer_residency(model, residency, chunk), dtype=dtype)


def nearby_sizes(shot: Shot) -> list[tuple[int, int]]:
    """Return the size of the shot, and the next smaller standard sizes of about its aspect."""
    stride = shot.model.checkpoint.variant.stride
    square = max(shot.width, shot.height) < 1.2 * min(shot.width, shot.height)
    upright = shot.height > shot.width
    found = [(shot.width, shot.height)]
    for long, short in SQUARES if square else SIZES:
        sides = (short, long) if upright else (long, short)
        width, height = (side // stride * stride for side in sides)
        area = width * height
        if area and area < 0.9 * found[-1][0] * found[-1][1] and len(found) <= MAX_SMALLER_SIZES:
            found.append((width, height))
    return found
