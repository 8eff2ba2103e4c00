"""The only file that knows the order of the stages: encode, load, denoise, decode, write, record.

Shots are sampled in the rounds and batches of their schedule. All latents of a batch are saved before the
first of them is decoded, and its videos are written before other shots take their last steps. After a stop
request the current step, prompt or chunk of frames is finished, and every state with a step behind it is
saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from wancli.engine import denoise_stage, manifest_body, shot_state
from wancli.engine.context import RenderContext
from wancli.engine.decode_stage import decode_latent
from wancli.engine.encode_stage import encode_each
from wancli.engine.kept_frames import lacks_frames
from wancli.engine.manifest_body import Record
from wancli.engine.networks import Networks
from wancli.engine.outcome import Outcome, failed_outcome
from wancli.engine.picture_stage import EncodedFrames, encode_frames
from wancli.engine.preflight import (
    are_measurements_missing,
    lacks_measurements,
    only_video_differs,
    output_exists_error,
    status_for_render,
)
from wancli.engine.shot_state import ShotState, Status
from wancli.errors import ClaimedElsewhere, EntryError, ErrorCapture, ShotError, Stopped, WancliError
from wancli.models.config import EXPERTS, Expert
from wancli.plan import batching
from wancli.plan.model_spec import ModelSpec
from wancli.plan.schedule import Round, Schedule
from wancli.plan.shot import Shot
from wancli.resources.measure import oom_as_error, release_memory
from wancli.storage import atomic, disk, manifest, tensor_file
from wancli.storage.manifest_schema import ShotRecord
from wancli.text.encoder import Encoded

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ModelContext:
    """What rendering the shots of a model needs: its networks, their schedule, the embeddings of prompts by
    id and, within a round, the given frames of its shots by index, with the records of encoding both."""

    networks: Networks
    context: RenderContext
    schedule: Schedule
    encoded: dict[str, Encoded] = field(default_factory=dict)
    frames: dict[int, EncodedFrames] = field(default_factory=dict)
    stage1: tuple[Record, ...] = ()


def render_model(
    model: ModelSpec, schedule: Schedule, networks: Networks, context: RenderContext
) -> Iterator[Outcome]:
    """Render the shots of one model and yield an outcome for each as it finishes.

    A shot claimed by another worker yields `elsewhere`. After a stop request, shots that have not started are
    not yielded. Raises CheckpointError or NoSpace; every state that fits on the disk has been saved by then.
    """
    shots = schedule.shots
    model_context = ModelContext(networks, context, schedule)
    have_latent, unreadable = set(), set()
    for shot in shots:
        with ErrorCapture() as look:
            if _load_saved_latent(shot, model_context):
                have_latent.add(shot.index)
        if look.error:
            unreadable.add(shot.index)
            yield failed_outcome(shot, look)
    fresh = [shot for shot in shots if shot.index not in have_latent | unreadable]
    prompt_errors: dict[str, ErrorCapture] = {}
    attempt = ErrorCapture()
    try:
        with attempt:
            prompts = [prompt for shot in fresh for prompt in shot.prompts]
            encoded, prompt_errors, of_prompts = encode_each(model, prompts, context)
            model_context = replace(model_context, encoded=encoded, stage1=(of_prompts,))
    except Stopped:
        fresh = []
    if attempt.error:
        release_memory()
        yield from (failed_outcome(shot, attempt) for shot in fresh)
        fresh = []
    unencodable = {
        shot.index: prompt_errors[id]
        for shot in fresh
        for id in reversed(_prompt_ids(shot))
        if id in prompt_errors
    }
    yield from (failed_outcome(shot, unencodable[shot.index]) for shot in fresh if shot.index in unencodable)
    for shot in shots:
        if shot.index in have_latent:
            yield from _render_round(((shot,),), model_context)
    schedule = batching.reschedule(schedule, [shot for shot in fresh if shot.index not in unencodable])
    model_context = replace(model_context, schedule=schedule)
    for round_ in schedule.rounds:
        if not context.stop.requested:
            yield from _render_round(round_, model_context)


def _render_round(round_: Round, model_context: ModelContext) -> Iterator[Outcome]:
    """Render the shots of a round that this worker can claim.

    A shot that another worker has finished, or left as a latent, since preflight is not sampled again.
    """
    claims = model_context.context.claims
    shots = [shot for batch in round_ for shot in batch]
    claimed = claims.take(shots) if claims else shots
    others = {shot.index for shot in shots} - {shot.index for shot in claimed}
    yield from (Outcome(shot, "elsewhere") for shot in shots if shot.index in others)
    try:
        resolved = set(others)
        for shot in claimed:
            if outcome := _resolve_unsampled(shot, model_context):
                resolved.add(shot.index)
                yield outcome
        to_sample = [shot for shot in claimed if shot.index not in resolved]
        for outcome in _encode_and_sample(round_, to_sample, model_context):
            if claims:
                claims.release([outcome.shot])
            yield outcome
    finally:
        if claims:
            claims.release(claimed)


def _resolve_unsampled(shot: Shot, model_context: ModelContext) -> Outcome | None:
    """Return the outcome of a shot that need not be sampled, None for one that must be.

    A finished output of this very shot that no longer verifies is moved aside and kept.
    """
    context = model_context.context
    with ErrorCapture() as attempt:
        status, why = status_for_render(shot, context)
        if status == "done" and not lacks_measurements(shot) and not lacks_frames(shot):
            return Outcome(shot, "already done", manifest.read_if_usable(shot.manifest))
        if status == "in the way":
            raise output_exists_error(shot, why)
        if status == "damaged":
            aside = atomic.move_aside(shot.output, "damaged")
            atomic.move_aside(shot.manifest, "damaged")
            moved = f"moved to {aside.name if aside else 'nowhere'}, shot {shot.id} is rendered again"
            context.progress.warn(f"{shot.output} no longer verifies: {why}; {moved}")
        latent = _load_saved_latent(shot, model_context)
    if attempt.error:
        return failed_outcome(shot, attempt)
    unencoded = any(id not in model_context.encoded for id in _prompt_ids(shot))
    return _publish_video(shot, latent, model_context) if latent or unencoded else None


def _encode_and_sample(
    round_: Round, shots: Sequence[Shot], model_context: ModelContext
) -> Iterator[Outcome]:
    """Encode the pictures of the shots of a round that are to be sampled, and sample them.

    No other worker encodes them: the shots are claimed.
    """
    networks, context = model_context.networks, model_context.context
    keep_clip = any(model_context.schedule.placement(shot).keeps_clip for shot in shots)
    try:
        frames, errors, record = encode_frames(shots, networks, context, keep_clip=keep_clip)
    except Stopped:
        return
    if errors:
        release_memory()
    yield from (failed_outcome(shot, errors[shot.index]) for shot in shots if shot.index in errors)
    records = (*model_context.stage1, *([record] if record else []))
    left = {shot.index for shot in shots} - errors.keys()
    batches = [[shot for shot in batch if shot.index in left] for batch in round_]
    model_context = replace(model_context, frames=frames, stage1=records)
    yield from _sample_round([batch for batch in batches if batch], model_context)


def _sample_round(batches: Sequence[Sequence[Shot]], model_context: ModelContext) -> Iterator[Outcome]:
    """Sample the batches of a round, and yield an outcome for every shot that has started."""
    context = model_context.context
    started: list[list[ShotState]] = [[] for _ in batches]
    for shots, of_batch in zip(batches, started):
        for shot in shots:
            with ErrorCapture() as attempt, oom_as_error("load", f"shot {shot.id}"):
                of_batch.append(shot_state.load_or_start(shot, context))
            if attempt.error:
                yield failed_outcome(shot, attempt)
    states = [state for batch in started for state in batch]
    shot_state.warn_of_other_threads(states, context)
    shot_state.link_dependents(states)
    try:
        for expert in EXPERTS:
            for batch in started:
                yield from _render_stage(batch, expert, model_context)
    except Exception:  # a full disk above all: if one state does not fit, the next may
        for state in states:
            with suppress(WancliError):
                _save_unsaved(state, context)
        raise
    stopped = context.stop.requested  # else a claim was lost, if only for one look; `batch` finds out
    for state in states:
        if not state.is_over and (state.step or not stopped):
            with ErrorCapture() as attempt:
                _save_unsaved(state, context)
            left = Outcome(state.shot, "stopped" if stopped else "elsewhere")
            yield failed_outcome(state.shot, attempt) if attempt.error else left


def _render_stage(
    batch: Sequence[ShotState], expert: Expert, model_context: ModelContext
) -> Iterator[Outcome]:
    """Take the steps of one expert, then turn finished latents into videos.

    A failed shot is yielded as soon as its segment ends. All latents of the batch are on disk before the
    first is decoded; the states of shots that wait for the next expert are saved.
    """
    networks, context = model_context.networks, model_context.context
    while not (context.stop.requested or context.lost_claim):
        segment = denoise_stage.next_segment(batch, expert)
        if segment is None:
            break
        with ErrorCapture() as attempt, oom_as_error("sample", segment.label):
            denoise_stage.run_segment(segment, networks, model_context.encoded, model_context.frames, context)
        if attempt.error:
            release_memory()
            for state in segment.states:
                state.fail(attempt)
        yield from _report_failures(batch, context)
    yield from _report_failures(batch, context)
    latents: list[tuple[Shot, tuple[Tensor, ShotRecord]]] = []
    for state in batch:
        if state.status is not Status.RUNNING or not _holds_claim(state.shot, context):
            continue
        with ErrorCapture() as attempt, oom_as_error("sample", f"shot {state.shot.id}"):
            if state.step == state.shot.steps:
                latents.append((state.shot, _finish_latent(state, model_context)))
            else:
                _save_unsaved(state, context)
        if attempt.error:
            state.status = Status.REPORTED
            if isinstance(attempt.error, ShotError):
                with suppress(WancliError):
                    atomic.remove(state.shot.state)
            yield failed_outcome(state.shot, attempt)
    for shot, latent in latents:
        yield _publish_video(shot, latent, model_context)


def _report_failures(batch: Sequence[ShotState], context: RenderContext) -> Iterator[Outcome]:
    """Yield the outcomes of shots that failed in their steps.

    The state of a shot that met NaN is removed: it would only lead there again. Any other state is saved, and
    the next run resumes from it.
    """
    for state in batch:
        if state.status is Status.FAILED and state.failure and _holds_claim(state.shot, context):
            with suppress(WancliError):
                if isinstance(state.failure.error, ShotError):
                    atomic.remove(state.shot.state)
                else:
                    _save_unsaved(state, context)
            state.status, state.solver_state, state.attention = Status.REPORTED, None, None
            yield failed_outcome(state.shot, state.failure)


def _finish_latent(state: ShotState, model_context: ModelContext) -> tuple[Tensor, ShotRecord]:
    placement = model_context.schedule.placement(state.shot)
    loras = model_context.networks.loras(state.shot.loras)
    return denoise_stage.finish_latent(
        state, placement, model_context.encoded, model_context.frames, loras, model_context.stage1
    )


def _publish_video(
    shot: Shot, latent: tuple[Tensor, ShotRecord] | None, model_context: ModelContext
) -> Outcome:
    """Decode a latent and publish its video; None is a latent that an earlier run left and that is gone."""
    networks, context = model_context.networks, model_context.context
    body = None
    attempt = ErrorCapture()
    if not _holds_claim(shot, context):
        return Outcome(shot, "elsewhere")
    try:
        if context.stop.requested:
            raise context.stop.error("before decoding")
        with attempt, oom_as_error("decode", f"shot {shot.id}"):
            if latent is None:
                raise EntryError("gone or changed since this run began", where=str(shot.latents))
            kept = {frame: shot.frame_key(frame) for frame in shot.kept_frames}
            keeps_latent = shot.keep_latents or _is_of_earlier_render(shot, context)
            body = decode_latent(*latent, shot.output, networks.vae, context, kept)
            if not keeps_latent:
                atomic.remove(shot.latents)
            atomic.remove(shot.state)
    except ClaimedElsewhere:
        return Outcome(shot, "elsewhere")
    except Stopped:
        return Outcome(shot, "stopped")
    if attempt.error:
        latent = None
        release_memory()
        # Two workers that make the same video may write different bytes: the holder of the claim is right.
        return failed_outcome(shot, attempt) if _holds_claim(shot, context) else Outcome(shot, "elsewhere")
    shared_steps = model_context.schedule.placement(shot).shared_steps
    return Outcome(shot, "rendered", body, shared_steps=shared_steps)


def _load_saved_latent(shot: Shot, model_context: ModelContext) -> tuple[Tensor, ShotRecord] | None:
    """Load the latent that an earlier run left for this shot, whose video settings may have changed since."""
    force = model_context.context.force
    if force and force.is_outdated(shot, "latents") and not only_video_differs(shot):
        return None
    said = tensor_file.read_record(shot.latents, ShotRecord)
    if said is not None and said.latents_key != shot.latents_key:
        return None
    try:
        z_CTYX, record = manifest_body.load_latent(shot.latents, shot.latent_shape)
        if record.latents_key != shot.latents_key or are_measurements_missing(shot, record):
            return None
        if record.attention and shot.attention is None:
            record = record.model_copy(update={"attention": None})
        return z_CTYX, manifest_body.continue_record(record, shot, model_context.schedule.placement(shot))
    except EntryError as error:
        if disk.is_taken(shot.latents):
            model_context.context.progress.warn(f"{error}; shot {shot.id} is sampled again")
        return None


def _is_of_earlier_render(shot: Shot, context: RenderContext) -> bool:
    """Return whether the latent was kept by a finished render: with --force, older than this one."""
    return context.force is not None and context.force.is_outdated(shot, "latents")


def _save_unsaved(state: ShotState, context: RenderContext) -> None:
    """Save the state of a shot if the one on disk has fewer steps, and this worker still has the claim."""
    over = state.is_over or state.solver_state is None
    if state.step > state.saved_step and not over and _holds_claim(state.shot, context):
        shot_state.save_state(state)


def _holds_claim(shot: Shot, context: RenderContext) -> bool:
    return context.claims is None or context.claims.holds(shot)


def _prompt_ids(shot: Shot) -> list[str]:
    return [prompt.id for prompt in shot.prompts]
