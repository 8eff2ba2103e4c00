"""Check before a render what is done, what is to do, and what this machine cannot do.

An output that already exists, or a shot that is too large, fails that shot alone. A problem that affects
every shot stops the batch before it starts: no ffmpeg, an unwritable folder, too little disk space, weights
that do not fit their networks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from wancli.engine import attention_stage, manifest_body, output_diff
from wancli.engine.context import RenderContext
from wancli.engine.kept_frames import lacks_frames
from wancli.engine.networks import check_weights, prepare_device
from wancli.errors import DoesNotFit, EntryError, MachineError, OutputExists, Unreadable, WancliError
from wancli.plan import backends, batching, disk_estimate, memory_policy
from wancli.plan.picture_entries import entry_values
from wancli.plan.render_plan import Plan
from wancli.plan.schedule import Schedule
from wancli.plan.shot import Prompt, Shot
from wancli.resources import machine
from wancli.storage import atomic, disk, manifest, tensor_file
from wancli.storage.manifest_schema import ShotRecord
from wancli.video import mp4

OutputStatus = Literal["done", "to do", "damaged", "in the way"]


@dataclass(frozen=True)
class PreflightResult:
    """The shots to render as a schedule, and by index why other shots are refused."""

    schedule: Schedule
    refused: dict[int, WancliError]


def preflight(plan: Plan, context: RenderContext) -> PreflightResult:
    """Check every output, the machine, the memory and the disk, before anything is started.

    Raises OutputExists if the outputs of all shots to render already exist, DoesNotFit if all of these shots
    are too large, MachineError if ffmpeg or a folder is unusable, NoSpace with figures, and CheckpointError
    if weights do not fit their networks.
    """
    todo, refused = check_outputs(plan, context)
    _check_machine(todo, context)
    fitting = []
    schedule = batching.reschedule(plan.schedule, todo)
    for shot in schedule.shots:
        try:
            encoded = all(text.file or is_cached(text, context) for text in shot.prompts)
            memory_policy.require(shot, schedule.placement(shot), encoded=encoded)
            fitting.append(shot)
        except DoesNotFit as error:
            refused[shot.index] = error
    if todo and not fitting:
        raise next(error for error in refused.values() if isinstance(error, DoesNotFit))
    schedule = batching.reschedule(schedule, fitting)
    disk_estimate.require(schedule, context.store)
    return PreflightResult(schedule, refused)


def check_outputs(plan: Plan, context: RenderContext) -> tuple[list[Shot], dict[int, WancliError]]:
    """Return the shots to render, in the order of the job, and by index why other shots are refused.

    These shots are not done, or lack what the job or another shot asks of them. A shot is refused, too, if
    the disk does not tell whether it is done: its files may be sound, and stay as they are. If this holds for
    a shot and all shots are refused, raises Unreadable. Raises OutputExists if the outputs of all shots that
    are not done exist otherwise.
    """
    todo: list[Shot] = []
    states, refused = _look_at_outputs(plan.shots, context)
    for shot in plan.shots:
        if shot.index in refused:
            continue
        status, why = states[shot.index]
        if status == "in the way":
            refused[shot.index] = output_exists_error(shot, why)
        elif status != "done" or lacks_measurements(shot):
            todo.append(shot)
        else:
            _warn_of_damaged_latent(shot, context)
    todo = _add_shots_without_frames(plan.shots, todo, refused, context)
    unreadable = next((error for error in refused.values() if isinstance(error, Unreadable)), None)
    if unreadable and len(refused) == len(plan.shots):
        raise unreadable
    if refused and not todo and not unreadable:
        raise OutputExists("\n".join(map(str, refused.values())), hint=next(iter(refused.values())).hint)
    return todo, refused


def _add_shots_without_frames(
    shots: Sequence[Shot], todo: Sequence[Shot], refused: Collection[int], context: RenderContext
) -> list[Shot]:
    """Add finished shots whose kept frames are missing, and are needed by shots that are to be rendered.

    They are decoded again if their latents are there, else rendered again, and so may need frames themselves.
    """
    by_index = {shot.index: shot for shot in shots if shot.index not in refused}
    needed = {shot.index: shot for shot in todo}
    queue = list(todo)
    while queue:
        shot = queue.pop()
        before = by_index.get(shot.continues.shot) if shot.continues else None
        if before is None or before.index in needed:
            continue
        try:
            if not _reads_pictures(shot, context) or not lacks_frames(before):
                continue
            again = "decoded" if _has_latent(before) else "rendered"
        except Unreadable:  # it fails the shot alone, which may be tried again
            continue
        needed[before.index] = before
        queue.append(before)
        why = f"shot {shot.id} begins with a frame of it, not found"
        context.progress.warn(f"shot {before.id} is done, and is {again} again: {why}")
    return [shot for shot in shots if shot.index in needed]


def _reads_pictures(shot: Shot, context: RenderContext) -> bool:
    """Return whether a render reads the pictures of a shot: neither their entries nor its latent exist."""
    store = context.store
    is_encoded = store is not None and all(map(store.has, entry_values(shot)))
    return not is_encoded and not _has_latent(shot)


def _has_latent(shot: Shot) -> bool:
    """Return whether a render decodes the latent of a shot, and samples nothing."""
    try:
        record = manifest_body.verify_latent(shot.latents, shot.latent_shape)
    except EntryError:
        return False
    return record.latents_key == shot.latents_key and not are_measurements_missing(shot, record)


def _look_at_outputs(
    shots: Sequence[Shot], context: RenderContext
) -> tuple[dict[int, tuple[OutputStatus, str]], dict[int, WancliError]]:
    """Return by index the statuses of outputs, and why other outputs cannot be looked at.

    If that may pass, the shot is tried again after the others, as often as the policy of failures says.
    """
    states: dict[int, tuple[OutputStatus, str]] = {}
    refused: dict[int, WancliError] = {}
    tries = 0
    while shots:
        tries += 1
        retried = []
        for shot in shots:
            try:
                states[shot.index] = status_for_render(shot, context)
                refused.pop(shot.index, None)
            except Unreadable as error:
                refused[shot.index] = error
                if context.policy.should_retry(error, tries):
                    attempts = f"tried again ({tries} of {context.policy.retries})"
                    context.progress.warn(f"shot {shot.id}: {error}; {attempts}")
                    retried.append(shot)
        shots = retried
    return states, refused


def _warn_of_damaged_latent(shot: Shot, context: RenderContext) -> None:
    """Warn if a finished shot was to keep its latent, and that is damaged or cannot be read."""
    try:
        if shot.keep_latents and disk.is_taken(shot.latents):
            manifest_body.verify_latent(shot.latents, shot.latent_shape)
    except (EntryError, Unreadable) as error:
        way_out = f"the video of shot {shot.id} is whole; --force renders both again"
        context.progress.warn(f"{error}; {way_out}")


def status_for_render(shot: Shot, context: RenderContext) -> tuple[OutputStatus, str]:
    """Return the status of an output for a render, and why it is not the finished shot.

    With --force an output from before this render neither is done nor blocks the shot.
    """
    if context.force and context.force.is_outdated(shot, "manifest"):
        return "to do", ""
    return output_status(shot)


def output_exists_error(shot: Shot, why: str) -> OutputExists:
    unknown = disk.is_taken(shot.manifest) and manifest.peek_key(shot.manifest) is None
    maker = "Nothing proves that this job made it" if unknown else "This job did not make it"
    decodes = only_video_differs(shot) and disk.is_taken(shot.latents)
    again = " and decodes its latent again, without sampling" if decodes else ""
    hint = f"{maker}: --force moves it aside{again}; or change `output`."
    return OutputExists(f"already exists: {why}", where=str(shot.output), hint=hint)


def output_status(shot: Shot) -> tuple[OutputStatus, str]:
    """Return the status of the output of a shot, and why it is not the finished shot.

    `damaged`: by its manifest it is this very shot, but it no longer verifies; a render moves it aside and
    renders the shot again. `in the way`: a file that this job did not make. Raises Unreadable if the
    disk does not tell.
    """
    if not disk.is_taken(shot.output) and not disk.exists(shot.manifest):
        return "to do", "no manifest"  # most of a fresh batch, whose keys are slow to compute
    wrong = manifest.find_problems(shot.output, shot.key)
    if not wrong:
        return "done", ""
    why = wrong[0].text
    if not disk.is_taken(shot.output) or _lacks_only_manifest(shot):
        return "to do", why
    if not manifest.find_problems(shot.output, shot.key):  # another worker has finished it just now
        return "done", ""
    if origin := find_origin(shot):
        return "damaged", f"{why}; by {origin} it is this shot"
    return "in the way", output_diff.describe_differences(shot) or why


def is_finished(shot: Shot) -> bool:
    """Return whether nothing is left to do for a shot."""
    return output_status(shot)[0] == "done" and not lacks_measurements(shot)


def find_origin(shot: Shot) -> str:
    """Name what says that the video at the output is this very shot; empty if nothing does.

    That is its manifest, sealed or not. If that cannot be read, it is the latent that is still there, or the
    comment in the video.
    """
    if disk.is_link(shot.output) or not disk.is_file(shot.output) or not disk.is_taken(shot.manifest):
        return ""
    if key := manifest.peek_key(shot.manifest):
        return "its manifest" if key == shot.key else ""
    latent = tensor_file.read_record(shot.latents, ShotRecord)
    if latent is not None and latent.key == shot.key:
        return "its latent"
    return "the comment in the video" if mp4.names_shot(shot.output, shot.key) else ""


def _lacks_only_manifest(shot: Shot) -> bool:
    """Return whether a run may have died after the video of this shot and before its manifest.

    The latent still exists then. The video is made once more, which overwrites it with the same bytes.
    """
    if disk.exists(shot.manifest):
        return False
    try:
        return manifest_body.verify_latent(shot.latents, shot.latent_shape).key == shot.key
    except EntryError:
        return False


def only_video_differs(shot: Shot) -> bool:
    """Return whether the finished video at the output has the latent of this shot, and other settings of
    `video` or another VAE."""
    record = manifest.read_if_usable(shot.manifest)
    return record is not None and record.latents_key == shot.latents_key and record.key != shot.key


def lacks_measurements(shot: Shot) -> bool:
    """Return whether a finished shot lacks the effects of its injections, or attention maps, which the job
    asks for.

    Its pixels stay the same when it is rendered again.
    """
    measures = shot.measure or shot.attention is not None
    record = manifest.read_if_usable(shot.manifest) if measures else None
    return record is not None and are_measurements_missing(shot, record)


def are_measurements_missing(shot: Shot, record: ShotRecord) -> bool:
    """Return whether the record of a shot lacks what the job asks to be measured."""
    return (shot.measure and shot.injects and not record.effects) or attention_stage.are_missing(shot, record)


def _check_machine(todo: Sequence[Shot], context: RenderContext) -> None:
    for device in {device for shot in todo for device in (shot.model.device, shot.noise)}:
        prepare_device(device)
    for model in dict.fromkeys(shot.model for shot in todo):
        backends.check_backends(model)
    for folder in dict.fromkeys(shot.output.parent for shot in todo):
        atomic.require_writable(folder)
        if context.claims:
            context.claims.require_claimable(folder)
    for codec in dict.fromkeys(shot.codec for shot in todo):
        mp4.check_ffmpeg(codec)
    unchecked = [
        shot.model for shot in todo if not (context.model_cache and context.model_cache.has(shot.model))
    ]
    for checkpoint in dict.fromkeys(model.checkpoint for model in unchecked):
        check_weights(checkpoint)


def missing_capabilities(shots: Sequence[Shot]) -> Iterator[str]:
    """Yield what the shots require and this machine cannot do. `plan` reports it, `render` refuses.

    Torch is loaded only if a job names its attention backend or asks for matmuls in fp8.
    """
    on_cuda = [shot for shot in shots if "cuda" in (shot.model.device, shot.noise)]
    missing = bool(on_cuda) and not machine.has_cuda()
    if missing:
        key = "memory.device" if on_cuda[0].model.device == "cuda" else "noise"
        yield f"{key} is cuda, and no CUDA device is found here: `render` would refuse"
    for model in dict.fromkeys(shot.model for shot in shots):
        try:
            if not (missing and model.device == "cuda"):
                backends.check_backends(model)
        except MachineError as error:
            yield f"{error}: `render` would refuse"


def is_cached(prompt: Prompt, context: RenderContext) -> bool:
    """Return whether the cache has the embedding of a prompt."""
    return context.store is not None and context.store.has(prompt.id)
