"""How a model runs in the memory that it may take: where its weights live, how many tokens at a time.

Of what the user left open the fastest that fits is taken: `resident` before `packed` before `streamed`, all
tokens at once before some at a time. Precision and size change the picture, so they are never chosen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from wancli.errors import DoesNotFit
from wancli.plan import memory_estimate
from wancli.plan.shot import ModelSpec, Shot
from wancli.resources import machine
from wancli.resources.memory_model import Residency
from wancli.units import format_bytes

CHUNKS = (None, 4096, 1024)  # tokens at a time, the fastest first
TRANSFORMER_PHASES = ("sample", "decode")  # the phases in which the transformer is loaded


@dataclass(frozen=True)
class MemoryRequest:
    """What a job says of memory; `auto` is left open. `budget` in bytes, None is what is free."""

    residency: Literal["auto"] | Residency = "auto"
    chunk: Literal["auto"] | int | None = "auto"
    budget: int | None = None


def memory_limit(model: ModelSpec) -> int:
    """Bytes that the process may take at its peak; on CUDA those of the device."""
    if model.budget is not None:
        return model.budget
    if model.device == "cpu":
        return machine.available_memory() + machine.process_memory()
    free = machine.cuda_free_memory()
    return sys.maxsize if free is None else free + machine.cuda_reserved_memory()


def headroom(model: ModelSpec) -> int:
    """Bytes that a phase may take, beside the process itself."""
    return memory_limit(model) - memory_estimate.process_bytes(model)


def encoder_fits_alongside(shot: Shot) -> bool:
    """Whether the text encoder fits beside the networks of an earlier shot of this kind."""
    encode, _, decode = shot.phases
    return memory_estimate.process_bytes(shot.model) + encode.total + decode.model <= memory_limit(shot.model)


def choose_residency(shots: Sequence[Shot], requests: Sequence[MemoryRequest]) -> list[Shot]:
    """The shots with the residencies and the chunk of their models decided, the same for all of a model.

    What does not fit even so is left as small as it gets, for `require` to refuse.
    """
    groups: dict[tuple[ModelSpec, MemoryRequest], list[Shot]] = {}
    for shot, said in zip(shots, requests, strict=True):
        groups.setdefault((shot.model, said), []).append(shot)
    settled = {key: _choose_for_model(*key, _distinct_shots(members)) for key, members in groups.items()}
    return [
        replace(shot, model=settled[shot.model, said]) for shot, said in zip(shots, requests, strict=True)
    ]


def peak_bytes(model: ModelSpec, shots: Sequence[Shot], names: Collection[str]) -> int:
    """Bytes that the process takes at most in these phases of the shots, if they ran with this model."""
    phases = [phase for shot in shots for phase in replace(shot, model=model).phases if phase.name in names]
    return memory_estimate.process_bytes(model) + max(phase.total for phase in phases)


def with_transformer_residency(model: ModelSpec, residency: Residency, chunk: int | None) -> ModelSpec:
    """The model with its transformer's weights there, and so many tokens at a time."""
    return replace(model, residency=residency, kernels=replace(model.kernels, chunk=chunk))


def with_encoder_residency(model: ModelSpec, residency: Residency) -> ModelSpec:
    """The model with its text encoder's weights there."""
    return replace(model, encoder=replace(model.encoder, residency=residency))


def _choose_for_model(model: ModelSpec, request: MemoryRequest, shots: Sequence[Shot]) -> ModelSpec:
    model = replace(model, budget=request.budget)
    of_text: Sequence[Residency] = ("resident", "streamed")
    of_video: Sequence[Residency] = ("resident", "packed", "streamed")
    if request.residency != "auto":
        of_text = of_video = (request.residency,)
    if model.dtype == "fp8":
        of_video = ("resident",) if model.kernels.fp8_matmul else ("packed",)
    chunks = CHUNKS if request.chunk == "auto" else (request.chunk,)
    texts: dict[str, ModelSpec] = {
        residency: with_encoder_residency(model, residency) for residency in of_text
    }
    model, why_text = _fastest("text encoder", texts, shots, ("encode",))
    video = {
        _label(residency, chunk): with_transformer_residency(model, residency, chunk)
        for residency in of_video
        for chunk in chunks
    }
    model, why_video = _fastest("transformer", video, shots, TRANSFORMER_PHASES)
    return replace(model, residency_reasons=(why_text, why_video))


def _label(residency: str, chunk: int | None) -> str:
    return residency if chunk is None else f"{residency}, {chunk:,} tokens at a time"


def _fastest(
    what: str, options: Mapping[str, ModelSpec], shots: Sequence[Shot], names: Collection[str]
) -> tuple[ModelSpec, str]:
    """The first option that fits, else the smallest; and a line that tells why."""
    needs = {label: peak_bytes(model, shots, names) for label, model in options.items()}
    allowed = memory_limit(next(iter(options.values())))
    fits = [label for label in options if needs[label] <= allowed]
    chosen = fits[0] if fits else min(needs, key=needs.__getitem__)
    faster = [label for label in list(options)[: list(options).index(chosen)] if label.isalpha()]
    against = ", ".join(f"{label} {format_bytes(needs[label])}" for label in faster)
    others = f" ({against})" if against else ""
    suffix = "" if fits else ": does not fit"
    why = f"{others}; {describe_limit(options[chosen], allowed)}{suffix}"
    line = f"{what}: {chosen} needs {format_bytes(needs[chosen])}{why}"
    return options[chosen], line


def describe_limit(model: ModelSpec, allowed: int) -> str:
    """Where a limit comes from: `the budget is 12.0 GiB`."""
    if model.budget is not None:
        return f"the budget is {format_bytes(allowed)}"
    return "what is free is not known" if allowed == sys.maxsize else f"{format_bytes(allowed)} are free"


def _distinct_shots(shots: Sequence[Shot]) -> list[Shot]:
    """One shot of each kind that memory can tell apart."""
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


def require(shot: Shot, *, encoded: bool = False, allowed: int | None = None) -> None:
    """Raises DoesNotFit if a phase of the shot needs more memory than it may take, with the nearest size and
    number of frames that would fit. `encoded`: its prompts are in the cache, so none is encoded. `allowed`:
    the `limit` of its model, where it is known."""
    names = TRANSFORMER_PHASES if encoded else ("encode", *TRANSFORMER_PHASES)
    allowed = memory_limit(shot.model) if allowed is None else allowed

    def fits(other: Shot) -> bool:
        return peak_bytes(other.model, [other], names) <= allowed

    if fits(shot):
        return
    worst = max((phase for phase in shot.phases if phase.name in names), key=lambda phase: phase.total)
    needed = memory_estimate.process_bytes(shot.model) + worst.total
    alone = replace(shot, shared=None)
    if shot.sharing > 1 and fits(alone):
        where, hint = f"shot {shot.id}, one of {shot.sharing} by `batch`", "batch: auto takes as many as fit."
    else:
        where = f"shot {shot.id}"
        hint = _suggest_fix(alone, fits, lambda other: peak_bytes(other.model, [other], names))
    raise DoesNotFit(
        f"{worst.name} needs {format_bytes(needed)} of memory, {describe_limit(shot.model, allowed)}",
        where=where,
        hint=hint,
    )


def _suggest_fix(shot: Shot, fits: Callable[[Shot], bool], needs: Callable[[Shot], int]) -> str:
    if shot.model.residency != "streamed" and shot.model.dtype != "fp8":
        streamed = replace(
            shot,
            model=with_encoder_residency(
                with_transformer_residency(shot.model, "streamed", CHUNKS[-1]), "streamed"
            ),
        )
        if fits(streamed):
            needed = format_bytes(needs(streamed))
            return f"memory.residency: auto would stream the weights, which needs {needed}."
    smaller = nearest_size(shot, fits)
    frames = nearest_frames(shot, fits)
    found = [f"size: {smaller.width}x{smaller.height}"] if smaller else []
    found += [f"frames: {frames.frames}"] if frames else []
    if found:
        return f"What fits: {', or '.join(found)}."
    stride = shot.model.checkpoint.variant.stride
    least = needs(replace(shot, width=stride, height=stride, frames=1))
    lean = needs(
        replace(
            shot,
            model=with_encoder_residency(
                with_transformer_residency(shot.model, "streamed", CHUNKS[-1]), "streamed"
            ),
        )
    )
    return (
        f"memory.budget: {-(-lean // 2**20)}MiB is the least for this shot; "
        f"even 1 frame of {stride}x{stride} needs {format_bytes(least)}."
    )


def nearest_size(shot: Shot, fits: Callable[[Shot], bool]) -> Shot | None:
    """The largest smaller size of the same aspect, as near as the stride allows, that fits."""
    stride = shot.model.checkpoint.variant.stride
    for width in range(shot.width - stride, 0, -stride):
        height = max(stride, round(width * shot.height / shot.width / stride) * stride)
        other = replace(shot, width=width, height=min(height, shot.height))
        if fits(other):
            return other
    return None


def nearest_frames(shot: Shot, fits: Callable[[Shot], bool]) -> Shot | None:
    """The same size with as many frames, 4n+1, as fit."""
    most = None
    low, high = 0, (shot.frames - 1) // 4  # n is at least low, if any fits, and below high
    while low < high:
        middle = (low + high) // 2
        other = replace(shot, frames=4 * middle + 1)
        if fits(other):
            most, low = other, middle + 1
        else:
            high = middle
    return most
