"""Memory policy: choose where the weights of a model live, and how many tokens a block takes at a time.

The policy takes the fastest option that the job leaves open and that fits the memory limit: `resident`
before `packed` before `streamed`, all tokens at once before chunks. Precision and size change the picture, so
they are never chosen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Literal

from wancli.errors import DoesNotFit
from wancli.plan import memory_estimate
from wancli.plan.model_spec import ModelSpec
from wancli.plan.schedule import ALONE, Placement
from wancli.plan.shot import Shot
from wancli.resources import machine
from wancli.resources.memory_model import Residency
from wancli.units import format_bytes

CHUNKS = (None, 4096, 1024)  # tokens at a time, the fastest first
TRANSFORMER_PHASES = ("sample", "decode")  # the phases in which the transformer is loaded


@dataclass(frozen=True)
class MemoryRequest:
    """The memory settings of a job. `auto` is left open; `budget` is in bytes, None means what is free."""

    residency: Literal["auto"] | Residency = "auto"
    chunk: Literal["auto"] | int | None = "auto"
    budget: int | None = None


def read_free_memory(device: str) -> int:
    """Read the bytes that this process may take: what is free and what it has; on CUDA of the device."""
    if device == "cpu":
        return machine.available_memory() + machine.process_memory()
    free = machine.cuda_free_memory()
    return sys.maxsize if free is None else free + machine.cuda_reserved_memory()


def headroom(model: ModelSpec) -> int:
    """Return the bytes that a phase may take, beside the process itself."""
    return model.memory_limit - memory_estimate.process_bytes(model)


def encoder_fits_alongside(shot: Shot) -> bool:
    """Return whether the text encoder fits beside the networks of an earlier shot of this kind."""
    encode, _, decode, *_ = memory_estimate.predict_phases(shot)
    return encode.total + decode.model <= headroom(shot.model)


def pictures_fit_alongside(shot: Shot) -> bool:
    """Return whether VAE and CLIP fit beside the transformer when the pictures of a shot are encoded."""
    transformer = memory_estimate.predict_alone(shot).model
    return memory_estimate.predict_pictures(shot, transformer).total <= headroom(shot.model)


def choose_residency(shots: Sequence[Shot], requests: Sequence[MemoryRequest]) -> list[Shot]:
    """Return the shots with memory limit, residencies and chunk of their models decided.

    They are the same for all shots of a model that ask for the same. Free memory is read once per device. A
    shot that fits with no option keeps the smallest, for `require` to refuse.
    """
    free = cache(read_free_memory)
    groups: dict[tuple[ModelSpec, MemoryRequest], list[Shot]] = {}
    for shot, request in zip(shots, requests, strict=True):
        groups.setdefault((shot.model, request), []).append(shot)
    chosen = {}
    for (model, request), members in groups.items():
        limit = free(model.device) if request.budget is None else request.budget
        limited = replace(model, budget=request.budget, memory_limit=limit)
        chosen[model, request] = _choose_for_model(limited, request, _distinct_shots(members))
    return [replace(s, model=chosen[s.model, request]) for s, request in zip(shots, requests, strict=True)]


def peak_bytes(model: ModelSpec, shots: Sequence[Shot], names: Collection[str]) -> int:
    """Predict the peak of the process in these phases, if each of the shots ran alone with this model."""
    variants = [replace(shot, model=model) for shot in shots]
    phases = (phase for shot in variants for phase in memory_estimate.predict_phases(shot))
    return memory_estimate.peak_of(model, (phase for phase in phases if phase.name in names))


def with_transformer_residency(model: ModelSpec, residency: Residency, chunk: int | None) -> ModelSpec:
    """Return the model with this residency of its transformer, and so many tokens at a time."""
    return replace(model, residency=residency, kernels=replace(model.kernels, chunk=chunk))


def with_encoder_residency(model: ModelSpec, residency: Residency) -> ModelSpec:
    """Return the model with this residency of its text encoder."""
    return replace(model, encoder=replace(model.encoder, residency=residency))


@dataclass(frozen=True)
class Option:
    """A way to run one network: where its weights are, and how many tokens it takes at a time."""

    residency: Residency
    chunk: int | None
    model: ModelSpec
    peak: int

    @property
    def label(self) -> str:
        return self.residency if self.chunk is None else f"{self.residency}, {self.chunk:,} tokens at a time"


def smallest_configuration(model: ModelSpec) -> ModelSpec:
    """Return the model as it needs the least memory."""
    return with_encoder_residency(with_transformer_residency(model, "streamed", CHUNKS[-1]), "streamed")


def _choose_for_model(model: ModelSpec, request: MemoryRequest, shots: Sequence[Shot]) -> ModelSpec:
    of_encoder: Sequence[Residency] = ("resident", "streamed")
    of_transformer: Sequence[Residency] = ("resident", "packed", "streamed")
    if request.residency != "auto":
        of_encoder = of_transformer = (request.residency,)
    if model.dtype == "fp8":
        of_transformer = ("resident",) if model.kernels.fp8_matmul else ("packed",)
    chunks = CHUNKS if request.chunk == "auto" else (request.chunk,)
    encoders = []
    for residency in of_encoder:
        variant = with_encoder_residency(model, residency)
        encoders.append(Option(residency, None, variant, peak_bytes(variant, shots, ("encode",))))
    encoder = _fastest(encoders)
    transformers = []
    for residency, chunk in product(of_transformer, chunks):
        variant = with_transformer_residency(encoder.model, residency, chunk)
        transformers.append(Option(residency, chunk, variant, peak_bytes(variant, shots, TRANSFORMER_PHASES)))
    transformer = _fastest(transformers)
    reasons = (
        _explain("text encoder", encoder, encoders),
        _explain("transformer", transformer, transformers),
    )
    return replace(transformer.model, residency_reasons=reasons)


def _fastest(options: Sequence[Option]) -> Option:
    """Return the first option that fits, else the smallest."""
    fitting = (option for option in options if option.peak <= option.model.memory_limit)
    return next(fitting, min(options, key=lambda option: option.peak))


def _explain(network: str, chosen: Option, options: Sequence[Option]) -> str:
    """Say what the chosen option needs, and what the faster ones would have needed."""
    faster = [option for option in options[: options.index(chosen)] if option.chunk is None]
    needs = ", ".join(f"{option.label} {format_bytes(option.peak)}" for option in faster)
    refused = "" if chosen.peak <= chosen.model.memory_limit else ": does not fit"
    return (
        f"{network}: {chosen.label} needs {format_bytes(chosen.peak)}{f' ({needs})' if needs else ''}; "
        f"{describe_limit(chosen.model)}{refused}"
    )


def describe_limit(model: ModelSpec) -> str:
    """Say where the memory limit comes from: `the budget is 12.0 GiB`."""
    if model.budget is not None:
        return f"the budget is {format_bytes(model.memory_limit)}"
    if model.memory_limit == sys.maxsize:
        return "the free memory is not known"
    return f"{format_bytes(model.memory_limit)} are free"


def _distinct_shots(shots: Sequence[Shot]) -> list[Shot]:
    """Return one shot of each kind that needs different memory."""
    kinds = {
        (
            shot.latent_shape,
            tuple(len(text.tokens.ids) for text in shot.prompts),
            tuple(use.path for use in shot.loras),
            shot.decode_chunk,
            shot.forwards_per_step,
        ): shot
        for shot in shots
    }
    return list(kinds.values())


def require(shot: Shot, placement: Placement = ALONE, *, encoded: bool = False) -> None:
    """Raise DoesNotFit if a phase of the shot needs more memory than its model may take.

    The error names the nearest size and number of frames that fit. `placement` is that of the shot in its
    schedule. `encoded`: the prompts are in the cache, so that none is encoded.
    """
    model = shot.model
    names = ("pictures", *TRANSFORMER_PHASES) if encoded else ("encode", "pictures", *TRANSFORMER_PHASES)
    phases = memory_estimate.predict_phases(shot, placement.sample, placement.pictures)
    worst = max((phase for phase in phases if phase.name in names), key=lambda phase: phase.total)
    if worst.total <= headroom(model):
        return

    def peak(other: Shot) -> int:
        return peak_bytes(other.model, [other], names)

    where = f"shot {shot.id}"
    if placement.batch_size > 1 and peak(shot) <= model.memory_limit:
        where += f", one of {placement.batch_size} by `batch`"
        hint = "batch: auto takes as many as fit."
    else:
        hint = _suggest_fix(shot, peak)
    needed = format_bytes(memory_estimate.peak_of(model, [worst]))
    raise DoesNotFit(
        f"{worst.name} needs {needed} of memory, {describe_limit(model)}", where=where, hint=hint
    )


def _suggest_fix(shot: Shot, peak: Callable[[Shot], int]) -> str:
    """Say which change of the job makes the shot fit."""

    def fits(other: Shot) -> bool:
        return peak(other) <= shot.model.memory_limit

    least = peak(replace(shot, model=smallest_configuration(shot.model)))
    if shot.model.residency != "streamed" and shot.model.dtype != "fp8" and least <= shot.model.memory_limit:
        return f"memory.residency: auto would stream the weights, which needs {format_bytes(least)}."
    smaller = nearest_size(shot, fits)
    shorter = nearest_frames(shot, fits)
    fitting = [f"size: {smaller.width}x{smaller.height}"] if smaller else []
    fitting += [f"frames: {shorter.frames}"] if shorter else []
    if fitting:
        return f"What fits: {', or '.join(fitting)}."
    stride = shot.model.checkpoint.variant.stride
    tiny = peak(replace(shot, width=stride, height=stride, frames=1))
    return (
        f"memory.budget: {-(-least // 2**20)}MiB is the least for this shot; "
        f"even 1 frame of {stride}x{stride} needs {format_bytes(tiny)}."
    )


def nearest_size(shot: Shot, fits: Callable[[Shot], bool]) -> Shot | None:
    """Return the shot at the largest smaller size that fits, of the same aspect if the stride allows."""
    stride = shot.model.checkpoint.variant.stride
    for width in range(shot.width - stride, 0, -stride):
        height = max(stride, round(width * shot.height / shot.width / stride) * stride)
        other = replace(shot, width=width, height=min(height, shot.height))
        if fits(other):
            return other
    return None


def nearest_frames(shot: Shot, fits: Callable[[Shot], bool]) -> Shot | None:
    """Return the shot with as many frames, 4n+1, as fit at its size."""
    longest = None
    low, high = 0, (shot.frames - 1) // 4  # n is at least low, if any fits, and below high
    while low < high:
        middle = (low + high) // 2
        other = replace(shot, frames=4 * middle + 1)
        if fits(other):
            longest, low = other, middle + 1
        else:
            high = middle
    return longest
