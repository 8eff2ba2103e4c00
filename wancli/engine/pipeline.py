"""The only file that knows the order of the phases: encode, load, sample, decode, write, record.

Shots are sampled in the groups and waves of `wancli.plan.batching`, one by one where weights are resident.
The latents of a group are on disk before any of them is decoded, and its videos before other shots take their
last steps. After a stop request the current step, prompt or chunk of frames is finished, and all states are
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
from wancli.engine.manifest_body import Record
from wancli.engine.networks import Networks
from wancli.engine.outcome import Outcome, failed_outcome
from wancli.engine.preflight import effects_missing, needs_effects, output_exists_error, status_for_render
from wancli.engine.shot_state import ShotState
from wancli.errors import ClaimedElsewhere, EntryError, ErrorCapture, ShotError, Stopped, WancliError
from wancli.models.config import EXPERTS, Expert
from wancli.plan import batching
from wancli.plan.shot import ModelSpec, Shot
from wancli.resources.measure import oom_as_error, release_memory
from wancli.storage import atomic, manifest
from wancli.storage.manifest_schema import ShotRecord
from wancli.text.encoder import Encoded

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ModelContext:
    """What the shots of a model are made with: its networks, the embeddings of their prompts by id, and what
    encoding them took."""

    networks: Networks
    context: RenderContext
    encoded: dict[str, Encoded] = field(default_factory=dict)
    stage1: Record = field(default_factory=dict)


def render_model(
    model: ModelSpec, shots: Sequence[Shot], networks: Networks, context: RenderContext
) -> Iterator[Outcome]:
    """Every shot of a model, as they come; of those that other workers hold, that they do.

    Raises CheckpointError and NoSpace, with all states on disk that found room there. Where an end is asked
    for, shots that were not begun are left out.
    """
    have_latent = {shot.index for shot in shots if _load_saved_latent(shot, context)}
    fresh = [shot for shot in shots if shot.index not in have_latent]
    model_context = ModelContext(networks, context)
    encode_errors: dict[str, ErrorCapture] = {}
    attempt = ErrorCapture()
    try:
        with attempt:
            encoded, encode_errors, stage1 = encode_each(
                model, [text for s in fresh for text in s.prompts], context
            )
            model_context = replace(model_context, encoded=encoded, stage1=stage1)
    except Stopped:
        fresh = []
    if attempt.error:
        release_memory()
        yield from (failed_outcome(shot, attempt) for shot in fresh)
        fresh = []
    unencodable = {
        shot.index: encode_errors[id]
        for shot in fresh
        for id in reversed(_prompt_ids(shot))
        if id in encode_errors
    }
    yield from (failed_outcome(shot, unencodable[shot.index]) for shot in fresh if shot.index in unencodable)
    for shot in shots:
        if shot.index in have_latent:
            yield from _render_round([[shot]], model_context)
    for round_ in batching.waves([shot for shot in fresh if shot.index not in unencodable]):
        if not context.stop.requested:
            yield from _render_round(round_, model_context)


def _render_round(batches: Sequence[Sequence[Shot]], model_context: ModelContext) -> Iterator[Outcome]:
    """Of a wave what no other worker holds. What another has finished, or left as a latent, since this run
    looked at it is not sampled."""
    claims = model_context.context.claims
    shots = [shot for group in batches for shot in group]
    taken = claims.take(shots) if claims else shots
    others = {shot.index for shot in shots} - {shot.index for shot in taken}
    yield from (Outcome(shot, "elsewhere") for shot in shots if shot.index in others)
    try:
        settled = set(others)
        for shot in taken:
            if outcome := _resolve_unsampled(shot, model_context):
                settled.add(shot.index)
                yield outcome
        mine = [[shot for shot in group if shot.index not in settled] for group in batches]
        for outcome in _sample_round([group for group in mine if group], model_context):
            if claims:
                claims.release([outcome.shot])
            yield outcome
    finally:
        if claims:
            claims.release(taken)


def _resolve_unsampled(shot: Shot, model_context: ModelContext) -> Outcome | None:
    """What became of a shot that is not to be sampled. What was this very shot and no longer verifies moves
    aside, for whoever wants to know why."""
    context = model_context.context
    with ErrorCapture() as attempt:
        state, why = status_for_render(shot, context)
        if state == "done" and not needs_effects(shot):
            return Outcome(shot, "already done", manifest.read(shot.manifest))
        if state == "in the way":
            raise output_exists_error(shot, why)
        if state == "damaged":
            aside = atomic.move_aside(shot.output, "damaged")
            atomic.move_aside(shot.manifest, "damaged")
            moved = f"moved to {aside.name if aside else 'nowhere'}, shot {shot.id} is made anew"
            context.progress.warn(f"{shot.output} no longer verifies; {moved}")
    if attempt.error:
        return failed_outcome(shot, attempt)
    latent = _load_saved_latent(shot, context)
    unencoded = any(id not in model_context.encoded for id in _prompt_ids(shot))
    return _publish_video(shot, latent, model_context) if latent or unencoded else None


def _sample_round(batches: Sequence[Sequence[Shot]], model_context: ModelContext) -> Iterator[Outcome]:
    """Every shot that failed or was finished, and where an end is asked for those that were begun."""
    context = model_context.context
    started: list[list[ShotState]] = [[] for _ in batches]
    for shots, ones in zip(batches, started):
        for shot in shots:
            with ErrorCapture() as attempt, oom_as_error("load", f"shot {shot.id}"):
                ones.append(shot_state.load_or_start(shot, context))
            if attempt.error:
                yield failed_outcome(shot, attempt)
    states = [one for group in started for one in group]
    shot_state.link_dependents(states)
    try:
        for expert in EXPERTS:
            for group in started:
                yield from _render_stage(group, expert, model_context)
    except Exception:  # a full disk above all: where there is no room for one, there may be for the next
        for one in states:
            with suppress(WancliError):
                _save_state(one, context)
        raise
    stopped = context.stop.requested  # else a claim was lost, if only for one look; `batch` finds out
    for one in states:
        if not one.over and (one.step or not stopped):
            with ErrorCapture() as attempt:
                _save_state(one, context)
            left = Outcome(one.shot, "stopped" if stopped else "elsewhere")
            yield failed_outcome(one.shot, attempt) if attempt.error else left


def _render_stage(
    batch: Sequence[ShotState], expert: Expert, model_context: ModelContext
) -> Iterator[Outcome]:
    """The steps that an expert takes, and after the last ones latents to videos. A shot that fails is told
    as soon as it does."""
    networks, context = model_context.networks, model_context.context
    while not (context.stop.requested or context.lost_claim) and (
        ready := denoise_stage.select_ready(batch, expert)
    ):
        with ErrorCapture() as attempt, oom_as_error("sample", denoise_stage.format_batch(ready)):
            denoise_stage.run_segment(
                ready, denoise_stage.next_segment(batch, ready), networks, model_context.encoded, context
            )
        if attempt.error:
            release_memory()
            shot_state.fail_states(ready, attempt.error)
        yield from _report_failures(batch, attempt.stack, context)
    yield from _report_failures(batch, "", context)
    finished: list[tuple[Shot, tuple[Tensor, ShotRecord]]] = []
    for one in batch:
        if one.over or one.fork or not _holds_claim(one.shot, context):
            continue
        with ErrorCapture() as attempt, oom_as_error("sample", f"shot {one.shot.id}"):
            if one.step == one.shot.steps:
                loras = networks.loras(one.shot.loras)
                finished.append(
                    (
                        one.shot,
                        denoise_stage.finish_latent(one, model_context.encoded, loras, model_context.stage1),
                    )
                )
                one.over = True
            else:
                _save_state(one, context)
        if attempt.error:
            one.over = True
            if isinstance(attempt.error, ShotError):
                with suppress(WancliError):
                    atomic.remove(one.shot.state)
            yield failed_outcome(one.shot, attempt)
    for shot, latent in finished:
        yield _publish_video(shot, latent, model_context)


def _report_failures(batch: Sequence[ShotState], stack: str, context: RenderContext) -> Iterator[Outcome]:
    """Those that failed in their steps. The state of one that met NaN would only lead there again; that of
    another is what the next run goes on from."""
    for one in batch:
        if one.failed and not one.over and _holds_claim(one.shot, context):
            attempt = ErrorCapture()
            attempt.record(one.failed)
            with suppress(WancliError):
                if isinstance(one.failed, ShotError):
                    atomic.remove(one.shot.state)
                else:
                    _save_state(one, context)
            one.over, one.solver_state = True, None
            yield Outcome(one.shot, "failed", error=attempt.error, stack=attempt.stack or stack)


def _publish_video(
    shot: Shot, latent: tuple[Tensor, ShotRecord] | None, model_context: ModelContext
) -> Outcome:
    """The video of a latent; None is one that an earlier run left and that is not there any more."""
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
            body = decode_latent(*latent, shot.output, networks.vae, context)
            if not shot.keep_latents:
                atomic.remove(shot.latents)
            atomic.remove(shot.state)
    except ClaimedElsewhere:
        return Outcome(shot, "elsewhere")
    except Stopped:
        return Outcome(shot, "stopped")
    if attempt.error:
        latent = None
        release_memory()
        # Two that make the same video may differ in what wrote it: whoever holds the shot has it right.
        return failed_outcome(shot, attempt) if _holds_claim(shot, context) else Outcome(shot, "elsewhere")
    return Outcome(shot, "rendered", body)


def _load_saved_latent(shot: Shot, context: RenderContext) -> tuple[Tensor, ShotRecord] | None:
    """The latent that an earlier run left for this shot, whose video may have changed since."""
    if context.force and context.force.is_outdated(shot, "latents"):
        return None
    try:
        z_CTYX, record = manifest_body.load_latent(shot.latents)
    except EntryError:
        return None
    if record.latents_key != shot.latents_key or effects_missing(shot, record):
        return None
    return z_CTYX, manifest_body.continue_record(record, shot)


def _save_state(state: ShotState, context: RenderContext) -> None:
    if (
        state.step > state.saved_step
        and state.solver_state is not None
        and not state.over
        and _holds_claim(state.shot, context)
    ):
        shot_state.save_state(state)


def _holds_claim(shot: Shot, context: RenderContext) -> bool:
    return context.claims is None or context.claims.holds(shot)


def _prompt_ids(shot: Shot) -> list[str]:
    return [text.id for text in shot.prompts]
