"""What there is before a render: what is done, to do, or cannot be; found before anything slow starts.

One output in the way, or one shot that is too large, fails that shot alone. What would meet every shot ends
the batch before it begins: no ffmpeg, a folder that takes no files, too little space, weights that do not fit
their networks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from wancli.engine import manifest_body, output_diff
from wancli.engine.context import RenderContext
from wancli.engine.networks import check_device, check_weights
from wancli.errors import DoesNotFit, EntryError, MachineError, OutputExists, WancliError
from wancli.plan import backends, batching, disk_estimate, memory_policy
from wancli.plan.shot import Plan, Prompt, Shot
from wancli.resources import machine
from wancli.storage import atomic, manifest
from wancli.storage.manifest_schema import ShotRecord
from wancli.video import mp4

OutputStatus = Literal["done", "to do", "damaged", "in the way"]


@dataclass(frozen=True)
class PreflightResult:
    """`todo` are the shots to render, each told with how many others; `refused` why others cannot be, by
    index."""

    todo: tuple[Shot, ...]
    refused: dict[int, WancliError]


def preflight(plan: Plan, context: RenderContext) -> PreflightResult:
    """Looks at every output, and whether the machine will do.

    Raises OutputExists where all that is to do is in the way, DoesNotFit where all of it is too large;
    MachineError when ffmpeg or a folder will not do, NoSpace with figures; CheckpointError for weights that
    do not fit their networks. Nothing was started then.
    """
    todo, refused = check_outputs(plan, context)
    _check_machine(todo, context)
    fitting = []
    limits = {model: memory_policy.memory_limit(model) for model in {shot.model for shot in todo}}
    for shot in batching.assign_batches(todo):
        try:
            encoded = all(text.file or is_cached(text, context) for text in shot.prompts)
            memory_policy.require(shot, encoded=encoded, allowed=limits[shot.model])
            fitting.append(shot)
        except DoesNotFit as error:
            refused[shot.index] = error
    if todo and not fitting:
        raise next(error for error in refused.values() if isinstance(error, DoesNotFit))
    disk_estimate.require(fitting, context.store)
    return PreflightResult(tuple(fitting), refused)


def check_outputs(plan: Plan, context: RenderContext) -> tuple[list[Shot], dict[int, WancliError]]:
    """The shots that are not done, and by index why others cannot be. Raises OutputExists where all that is
    to do is in the way."""
    todo: list[Shot] = []
    refused: dict[int, WancliError] = {}
    for shot in plan.shots:
        state, why = status_for_render(shot, context)
        if state == "in the way":
            refused[shot.index] = output_exists_error(shot, why)
        elif state != "done" or needs_effects(shot):
            todo.append(shot)
    if refused and not todo:
        raise OutputExists("\n".join(map(str, refused.values())), hint=next(iter(refused.values())).hint)
    return todo, refused


def status_for_render(shot: Shot, context: RenderContext) -> tuple[OutputStatus, str]:
    """The condition of a shot, to a render; with --force what lay there before is neither done nor in the
    way."""
    if context.force and context.force.is_outdated(shot, "manifest"):
        return "to do", ""
    return output_status(shot)


def output_exists_error(shot: Shot, why: str) -> OutputExists:
    hint = "--force moves it aside; or change `output`."
    return OutputExists(f"in the way: {why}", where=str(shot.output), hint=hint)


def output_status(shot: Shot) -> tuple[OutputStatus, str]:
    """What is at the output of a shot, and why it is not the finished shot.

    `damaged` is one of this very shot, by its manifest, that no longer verifies: it may be made anew once it
    is moved aside. `in the way` is everything else.
    """
    if not os.path.lexists(shot.output) and not shot.manifest.exists():
        return "to do", "no manifest"  # most of a fresh batch, whose keys are slow to compute
    wrong = manifest.find_problems(shot.output, shot.key)
    if not wrong:
        return "done", ""
    why = wrong[0].text
    if not os.path.lexists(shot.output) or _lacks_only_manifest(shot):
        return "to do", why
    if not manifest.find_problems(shot.output, shot.key):  # another worker has finished it just now
        return "done", ""
    ours = shot.output.is_file() and not shot.output.is_symlink() and _manifest_names_shot(shot)
    return ("damaged", why) if ours else ("in the way", output_diff.describe_differences(shot) or why)


def is_finished(shot: Shot) -> bool:
    """Whether there is nothing to do for it."""
    return output_status(shot)[0] == "done" and not needs_effects(shot)


def _manifest_names_shot(shot: Shot) -> bool:
    """Whether the manifest, sealed or not, says that the output is this very shot."""
    peeked = manifest.peek(shot.manifest)
    return peeked is not None and peeked.key == shot.key


def _lacks_only_manifest(shot: Shot) -> bool:
    """Whether a run may have died between the video of this shot and its manifest: then its latent is
    still there. The video is made once more, and publishing the same bytes is no overwriting."""
    if shot.manifest.exists():
        return False
    try:
        return manifest_body.load_latent(shot.latents)[1].key == shot.key
    except EntryError:
        return False


def needs_effects(shot: Shot) -> bool:
    """Whether a finished shot's injections should be measured and were not. Its pixels stay the same."""
    record = manifest.read(shot.manifest) if shot.measure else None
    return record is not None and effects_missing(shot, record)


def effects_missing(shot: Shot, record: ShotRecord) -> bool:
    return shot.measure and shot.injects and not record.effects


def _check_machine(todo: Sequence[Shot], context: RenderContext) -> None:
    for device in {device for shot in todo for device in (shot.model.device, shot.noise)}:
        check_device(device)
    for model in dict.fromkeys(shot.model for shot in todo):
        backends.check(model)
    for folder in dict.fromkeys(shot.output.parent for shot in todo):
        atomic.require_writable(folder)
        if context.claims:
            context.claims.require_claimable(folder)
    for codec in dict.fromkeys(shot.codec for shot in todo):
        mp4.check_ffmpeg(codec)
    unknown = [
        shot.model for shot in todo if not (context.model_cache and context.model_cache.has(shot.model))
    ]
    for checkpoint in dict.fromkeys(model.checkpoint for model in unknown):
        check_weights(checkpoint)


def missing_capabilities(shots: Sequence[Shot]) -> Iterator[str]:
    """What the shots ask of a machine that this one cannot do: a plan for another says it, `render` refuses.

    Torch is loaded only where a job names its attention or asks for products in fp8."""
    on_cuda = [shot for shot in shots if "cuda" in (shot.model.device, shot.noise)]
    missing = bool(on_cuda) and not machine.has_cuda()
    if missing:
        key = "memory.device" if on_cuda[0].model.device == "cuda" else "noise"
        yield f"{key} is cuda, and no CUDA device is found here: `render` would refuse"
    for model in dict.fromkeys(shot.model for shot in shots):
        try:
            if not (missing and model.device == "cuda"):
                backends.check(model)
        except MachineError as error:
            yield f"{error}: `render` would refuse"


def is_cached(text: Prompt, context: RenderContext) -> bool:
    """Whether the store has the embedding of a prompt."""
    return context.store is not None and context.store.path(text.id).exists()
