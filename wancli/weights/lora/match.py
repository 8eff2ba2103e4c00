"""Selects the changes of a LoRA file that apply to a model; refuses a file made for another model. No
torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wancli.errors import CheckpointError
from wancli.models.variants import NAMES_BY_WIDTH
from wancli.weights.formats.infer_config import IMAGE_CHANNELS, Shapes
from wancli.weights.lora.change import Change
from wancli.weights.lora.file import MAX_EXAMPLES, LoraFile
from wancli.weights.lora.key_mapping import block_index, is_image_only, module_name

TEXT_ENCODER_PREFIXES = ("lora_te", "text_encoder", "te_", "cond_stage_model")  # beginnings of keys


@dataclass(frozen=True)
class Coverage:
    """How much of a LoRA file applies to a model, as plain data."""

    style: str
    targets: int  # parameters changed
    kinds: Mapping[str, int]  # how many of them by which sort of change
    blocks: tuple[int, ...]
    outside: int  # targets outside the blocks
    ranks: tuple[int, ...]
    scaled: bool  # False: no alpha anywhere, so the scale is taken as 1
    skipped: int  # changes of what only image-to-video models have
    unused: int  # keys that name nothing of this model
    examples: tuple[str, ...]  # some of the unused keys
    scales: tuple[float, ...] = ()  # the distinct ones
    notes: tuple[str, ...] = ()  # what a user should know about the scales


def select_changes(file: LoraFile, shapes: Shapes) -> tuple[tuple[Change, ...], Coverage]:
    """Return the changes that apply to a model with these parameters, and their coverage.

    Changes of layers that only image-to-video models have are skipped. Raises CheckpointError if a parameter
    has another shape or is in a block past the last, and if nothing applies.
    """
    depth = 1 + max((n for n in map(block_index, shapes) if n is not None), default=-1)
    used: list[Change] = []
    strays: list[Change] = []
    skipped = 0
    unused = list(file.unknown)
    for change in file.changes:
        block, shape = block_index(change.name), shapes.get(change.name)
        if shape and _shape_matches(change, shape):
            used.append(change)
        elif _is_image_only_change(change, shapes):
            skipped += 1
        elif shape or (block is not None and block >= depth):
            raise _wrong_model_error(file, change, shapes, depth)
        else:
            strays.append(change)
    unused += [key for change in strays for key in change.keys.values()]
    changed = {module_name(change.name) for change in used}
    if beside := next((change for change in strays if module_name(change.name) in changed), None):
        raise CheckpointError(
            f"{beside.key} changes {beside.name}, which this model does not have beside what it changes",
            where=str(file.path),
            hint="This LoRA was made for another model.",
        )
    if not used:
        raise _no_effect_error(file, skipped, unused)
    blocks = [block_index(change.name) for change in used]
    coverage = Coverage(
        style=file.style,
        targets=len(used),
        kinds=dict(Counter(change.kind for change in used)),
        blocks=tuple(sorted({block for block in blocks if block is not None})),
        outside=blocks.count(None),
        ranks=tuple(sorted({change.rank for change in used if change.rank})),
        scaled=file.scaled,
        skipped=skipped,
        unused=len(unused),
        examples=tuple(unused[:MAX_EXAMPLES]),
        scales=tuple(sorted({change.scale for change in used})),
        notes=file.notes,
    )
    return tuple(used), coverage


def _shape_matches(change: Change, shape: tuple[int, ...]) -> bool:
    if change.kind == "full":
        return change.shape == shape
    return len(shape) > 1 and change.shape == (shape[0], math.prod(shape[1:]))


def _is_image_only_change(change: Change, shapes: Shapes) -> bool:
    """Return whether only an image-to-video model has a use for this change."""
    if change.name not in shapes:
        return is_image_only(change.name)
    if change.name != "patch_embedding.weight":
        return False
    width, _, *patch = shapes[change.name]
    columns = IMAGE_CHANNELS * math.prod(patch)
    return change.shape[0] == width and math.prod(change.shape[1:]) == columns


def _no_effect_error(file: LoraFile, skipped: int, unused: Sequence[str]) -> CheckpointError:
    what = f"none of its {len(unused)} keys names a part of it" + "".join(f", {key!r}" for key in unused[:1])
    hint = (
        "Is it a LoRA for a Wan text-to-video model? Known are the namings of ComfyUI, diffusers, "
        "PEFT, kohya, LyCORIS and DiffSynth."
    )
    if skipped:
        what = f"all {skipped} changes are of layers that only image-to-video models have"
        hint = "Take the text-to-video version of this LoRA."
    elif unused and all(key.startswith(TEXT_ENCODER_PREFIXES) for key in unused):
        hint = "Its keys are those of a text encoder; wancli applies LoRAs to the transformer."
    return CheckpointError(f"changes nothing in this model; {what}", where=str(file.path), hint=hint)


def _wrong_model_error(file: LoraFile, change: Change, shapes: Shapes, depth: int) -> CheckpointError:
    """Return the error for a LoRA of another model, with a guess at both models."""
    if change.name in shapes:
        there = f"{list(shapes[change.name])} in this model"
    else:
        there = f"not in this model, whose last block is {depth - 1}"
    theirs = next((c.shape[-1] for c in file.changes if _has_model_width(c.name) and c.kind != "full"), 0)
    ours = next((shape[-1] for name, shape in shapes.items() if _has_model_width(name)), 0)
    models = [NAMES_BY_WIDTH.get(width, f"a model of width {width}") for width in (theirs, ours)]
    return CheckpointError(
        f"{change.key} makes a change of {list(change.shape)} to {change.name}, which is {there}",
        where=str(file.path),
        hint=f"This LoRA was made for {models[0]}, and this is {models[1]}."
        if theirs and theirs != ours
        else "This LoRA was made for another model.",
    )


def _has_model_width(name: str) -> bool:
    return name.endswith(("attn.q.weight", "attn.k.weight", "attn.v.weight", "attn.o.weight", "ffn.0.weight"))
