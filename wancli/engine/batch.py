"""A whole batch: which shots are done, which cannot be, and the others, model by model, as they come.

`wancli.engine.outcome` says what an error ends: its shot, all shots of a checkpoint, or the batch. Shots that
other workers claimed (`wancli.storage.claims`) are waited for at the end. `wancli.engine.pipeline` renders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from wancli.engine.context import RenderContext
from wancli.engine.networks import Networks
from wancli.engine.outcome import Outcome, failed_outcome
from wancli.engine.pipeline import render_model
from wancli.engine.preflight import PreflightResult, is_cached, is_finished, preflight
from wancli.errors import CheckpointError, ClaimedElsewhere, ErrorCapture
from wancli.plan import memory_policy
from wancli.plan.shot import ModelSpec, Plan, Shot, format_shots
from wancli.storage import manifest


def render(plan: Plan, context: RenderContext) -> Iterator[Outcome]:
    """Renders what `preflight` leaves to do, one checkpoint after the other, and yields what became of each.

    Raises what `preflight` does before anything is started, NoSpace at once, with all states on disk that
    found room there, and Stopped at the end where somebody asked for it before all was done. Elsewhere, where
    the claims do not wait for what other workers are at.
    """
    found = preflight(plan, context)
    yield from track_outcomes(_render_all(plan, found, context), found.todo, context)


def track_outcomes(
    outcomes: Iterator[Outcome], todo: Sequence[Shot], context: RenderContext
) -> Iterator[Outcome]:
    """The outcomes as they come. Asks for an end where so many failed that it is enough, and raises at the
    end what `render` does."""
    pending = {shot.index for shot in todo}
    stopped = failures = 0
    elsewhere: list[Shot] = []
    for outcome in outcomes:
        stopped += outcome.status == "stopped"
        failures += outcome.status == "failed"
        elsewhere += [outcome.shot] if outcome.status == "elsewhere" else []
        context.stop.failure_limit_reached = context.policy.should_stop(failures)
        pending.discard(outcome.shot.index)
        yield outcome
    unfinished = bool(stopped or pending)
    if (context.stop.reason and (unfinished or elsewhere)) or (unfinished and not failures):
        others = f", {len(elsewhere)} with other workers" if elsewhere else ""
        raise context.stop.error(f"{_shots_are(stopped)} saved on the way, {len(pending)} not begun{others}")
    if elsewhere and context.claims and not failures:
        raise ClaimedElsewhere(
            f"{_shots_are(len(elsewhere))} with other workers: "
            f"{context.claims.name_holders(elsewhere) or 'gone now'}"
        )


def _render_all(plan: Plan, found: PreflightResult, context: RenderContext) -> Iterator[Outcome]:
    """Of shots that are `settled`, then of the others as they come."""
    yield from iter_resolved(plan, found)
    claimed_elsewhere: list[Shot] = []
    todo: Sequence[Shot] = found.todo
    while todo or claimed_elsewhere:
        for model in dict.fromkeys(shot.model for shot in todo):
            if not context.stop.requested:
                for outcome in _render_with_retries(
                    model, [shot for shot in todo if shot.model == model], context
                ):
                    if outcome.status == "elsewhere":
                        claimed_elsewhere.append(outcome.shot)
                    else:
                        yield outcome
        released = _wait_for_claims(claimed_elsewhere, context)
        if not released:
            break
        claimed_elsewhere = [
            shot for shot in claimed_elsewhere if shot.index not in {one.index for one in released}
        ]
        done = {shot.index: shot for shot in released if not context.force and is_finished(shot)}
        yield from (Outcome(shot, "already done", manifest.read(shot.manifest)) for shot in done.values())
        todo = [shot for shot in released if shot.index not in done]
    yield from (Outcome(shot, "elsewhere") for shot in claimed_elsewhere)


def iter_resolved(plan: Plan, found: PreflightResult) -> Iterator[Outcome]:
    """Of shots that are done, then of those that cannot be."""
    untouched = {shot.index for shot in found.todo} | found.refused.keys()
    for shot in plan.shots:
        if shot.index not in untouched:
            yield Outcome(shot, "already done", manifest.read(shot.manifest))
    for shot in plan.shots:
        if shot.index in found.refused:
            yield Outcome(shot, "failed", error=found.refused[shot.index])


def format_shots_inline(shots: Sequence[Shot]) -> str:
    """What people read of shots in the middle of a sentence."""
    return f"shot {format_shots(shots)}" if len(shots) == 1 else format_shots(shots)


def _wait_for_claims(shots: Sequence[Shot], context: RenderContext) -> Sequence[Shot]:
    """Waits until other workers are done with some of these shots, or gave them up; returns those."""
    if not shots or context.claims is None or not context.claims.waits_for_others or context.stop.requested:
        return []
    if workers := context.claims.name_holders(shots):
        context.progress.note(f"waiting for {format_shots_inline(shots)}, rendered by {workers}")
    return context.claims.wait_for_release(shots, context.stop)


def _render_with_retries(
    model: ModelSpec, shots: Sequence[Shot], context: RenderContext
) -> Iterator[Outcome]:
    """The shots of a model, those again whose failure may pass: from what is on disk by then, and alone,
    which needs the least memory."""
    networks = _get_networks(model, shots, context)
    tries = 0
    while shots and not context.stop.requested:
        tries += 1
        retried = []
        for outcome in _render_until_damaged(model, shots, networks, context):
            if (
                outcome.error
                and not context.stop.requested
                and context.policy.should_retry(outcome.error, tries)
            ):
                said = f"{outcome.error}; tried again ({tries} of {context.policy.retries})"
                context.progress.warn(f"shot {outcome.shot.id}: {said}")
                retried.append(outcome)
            else:
                yield outcome
        if context.stop.requested:
            yield from retried
        shots = [replace(outcome.shot, batch=1, shared=None, fork=None) for outcome in retried]


def _get_networks(model: ModelSpec, shots: Sequence[Shot], context: RenderContext) -> Networks:
    """The networks of these shots, or those that were kept; these make room where prompts are to be encoded
    and the text encoder does not fit beside them."""
    lazily = not any(shot.loras for shot in shots)
    if context.model_cache is None:
        return Networks(model, lazily)
    networks = context.model_cache.get(model, lazily)
    missing = [
        shot for shot in shots if not all(text.file or is_cached(text, context) for text in shot.prompts)
    ]
    if not all(memory_policy.encoder_fits_alongside(shot) for shot in missing):
        networks.release()
    return networks


def _shots_are(count: int) -> str:
    return "1 shot is" if count == 1 else f"{count} shots are"


def _render_until_damaged(
    model: ModelSpec, shots: Sequence[Shot], networks: Networks, context: RenderContext
) -> Iterator[Outcome]:
    """Every shot of a model. A checkpoint that turns out to be damaged fails all that are left of them."""
    left = {shot.index: shot for shot in shots}
    broken = ErrorCapture()
    try:
        for outcome in render_model(model, shots, networks, context):
            left.pop(outcome.shot.index)
            yield outcome
    except CheckpointError as error:
        broken.record(error)
    if broken.error:
        yield from (failed_outcome(shot, broken) for shot in left.values())
