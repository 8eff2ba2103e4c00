"""A whole batch: which shots are done, which are refused, and the others, rendered model by model.

`wancli.engine.outcome` decides what an error ends: its shot, all shots of a checkpoint, or the batch. The
batch waits at the end for shots claimed by other workers (`wancli.storage.claims`). `wancli.engine.pipeline`
renders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from wancli.engine import shot_state
from wancli.engine.context import RenderContext
from wancli.engine.kept_frames import lacks_frames
from wancli.engine.networks import ModelCache, Networks
from wancli.engine.outcome import Outcome, failed_outcome
from wancli.engine.pipeline import render_model
from wancli.engine.preflight import PreflightResult, is_cached, is_finished, preflight
from wancli.errors import CheckpointError, ClaimedElsewhere, ErrorCapture, MachineError, ShotError
from wancli.plan import batching, memory_policy
from wancli.plan.chains import split_waves
from wancli.plan.model_spec import ModelSpec
from wancli.plan.render_plan import Plan, format_shots_inline
from wancli.plan.schedule import Schedule
from wancli.plan.shot import Shot
from wancli.storage import disk, manifest
from wancli.storage.claims import find_holder
from wancli.units import format_ranges, list_some


def render(plan: Plan, context: RenderContext) -> Iterator[Outcome]:
    """Render what `preflight` leaves to do, model by model, and yield the outcome of each shot.

    Raises what `preflight` raises before anything is started. Raises NoSpace at once; every state that fits
    on the disk has been saved by then. Raises Stopped at the end if a stop request left shots undone, and
    ClaimedElsewhere at the end if the claims do not wait for other workers and these still hold shots.
    """
    result = preflight(plan, context)
    if note := _describe_rerun(plan.shots, result):
        context.progress.note(note)
    yield from track_outcomes(_render_all(plan, result, context), result.schedule.shots, context)


def _describe_rerun(shots: Sequence[Shot], result: PreflightResult) -> str:
    """Say of a job that is rendered in part how many shots are done, and what is new about the others:
    `4 of 6 shots are done already; to render: 1,3 (strength 0.6)`. Empty if all or none are done."""
    todo = {shot.index: shot for shot in result.schedule.shots}
    done = [shot for shot in shots if shot.index not in todo and shot.index not in result.refused]
    if not todo or not done:
        return ""
    new = []
    for name in dict.fromkeys(name for shot in todo.values() for name in shot.labels):
        known = {str(shot.labels.get(name)) for shot in done}
        values = dict.fromkeys(str(shot.labels[name]) for shot in todo.values() if name in shot.labels)
        if fresh := [value for value in values if value not in known]:
            new.append(f"{name} {list_some(fresh, 3)}")
    about = f" ({'; '.join(new)})" if new else ""
    return f"{len(done)} of {len(shots)} shots are done already; to render: {format_ranges([*todo])}{about}"


def track_outcomes(
    outcomes: Iterator[Outcome], todo: Sequence[Shot], context: RenderContext
) -> Iterator[Outcome]:
    """Yield the outcomes as they come, and request a stop once the policy allows no more failures.

    Raises at the end what `render` raises there.
    """
    pending = {shot.index for shot in todo}
    stopped = failures = done = total = 0
    elsewhere: list[Shot] = []
    for outcome in outcomes:
        total += 1
        done += outcome.status in ("rendered", "already done")
        stopped += outcome.status == "stopped"
        failures += outcome.status == "failed" and not outcome.follows_failure
        elsewhere += [outcome.shot] if outcome.status == "elsewhere" else []
        context.stop.failure_limit_reached = context.policy.should_stop(failures)
        pending.discard(outcome.shot.index)
        yield outcome
    unfinished = bool(stopped or pending)
    if (context.stop.reason and (unfinished or elsewhere)) or (unfinished and not failures):
        others = f", {len(elsewhere)} claimed by other workers" if elsewhere else ""
        raise context.stop.error(
            f"{_shots_are(stopped)} saved in progress, {len(pending)} not started{others}; "
            f"{done} of {total + len(pending)} done"
        )
    if elsewhere and context.claims and not failures:
        raise ClaimedElsewhere(
            f"{_shots_are(len(elsewhere))} claimed by other workers: "
            f"{context.claims.name_holders(elsewhere) or 'gone now'}"
        )


def _render_all(plan: Plan, result: PreflightResult, context: RenderContext) -> Iterator[Outcome]:
    """Yield what is known without rendering, then render the rest.

    A shot is free once the shot that it continues is over. Shots that other workers hold are waited for only
    when no shot is free.
    """
    failed: dict[int, Outcome] = {}
    for outcome in iter_resolved(plan, result):
        if outcome.status == "failed":
            failed[outcome.shot.index] = outcome
        yield outcome
    left = {shot.index: shot for shot in result.schedule.shots}
    elsewhere: dict[int, Shot] = {}
    if context.model_cache is None and any(shot.continues for shot in left.values()):
        context = replace(context, model_cache=ModelCache())  # a chain loads its model once
    schedule = result.schedule
    while left and not context.stop.requested:
        free = [shot for shot in next(split_waves([*left.values()])) if shot.index not in elsewhere]
        if free:
            outcomes = _render_free(batching.reschedule(schedule, free), failed, context)
        else:
            released = _wait_for_claims([*elsewhere.values()], context)
            if not released:
                break
            for shot in released:
                del elsewhere[shot.index]
            outcomes = _find_finished(released, context)
        for outcome in outcomes:
            if outcome.status == "elsewhere":
                elsewhere[outcome.shot.index] = outcome.shot
                continue
            if outcome.status == "failed":
                failed[outcome.shot.index] = outcome
            del left[outcome.shot.index]
            yield outcome
    hanging = elsewhere if context.stop.requested else left  # all that is left hangs on shots of others
    yield from (Outcome(shot, "elsewhere") for shot in hanging.values())


def _render_free(
    schedule: Schedule, failed: Mapping[int, Outcome], context: RenderContext
) -> Iterator[Outcome]:
    """Render shots, model by model, except those that continue a failed shot."""
    ready = []
    for shot in schedule.shots:
        before = failed.get(shot.continues.shot) if shot.continues else None
        if before is None:
            ready.append(shot)
        else:
            yield _outcome_after(before.shot, shot)
    schedule = batching.reschedule(schedule, ready)
    for model in dict.fromkeys(shot.model for shot in ready):
        if not context.stop.requested:
            yield from _render_with_retries(model, schedule.of_model(model), context)


def _outcome_after(before: Shot, shot: Shot) -> Outcome:
    """Return the outcome of a shot whose first frame is missing, because the shot that has it failed."""
    attempt = ErrorCapture()
    hint = f"Once shot {before.id} is done, the same command renders this one."
    attempt.record(
        ShotError(f"shot {before.id}, which it continues, failed", where=f"shot {shot.id}", hint=hint)
    )
    return replace(failed_outcome(shot, attempt), follows_failure=True)


def _find_finished(released: Sequence[Shot], context: RenderContext) -> Iterator[Outcome]:
    """Yield the outcomes of shots that other workers have finished, or whose files cannot be read."""
    for shot in released:
        with ErrorCapture() as attempt:
            if not context.force and is_finished(shot) and not lacks_frames(shot):
                yield Outcome(shot, "already done", manifest.read_if_usable(shot.manifest))
        if attempt.error:
            yield failed_outcome(shot, attempt)


def iter_resolved(plan: Plan, result: PreflightResult) -> Iterator[Outcome]:
    """Yield the outcomes of shots that are done, then those of shots that were refused."""
    unresolved = {shot.index for shot in result.schedule.shots} | result.refused.keys()
    for shot in plan.shots:
        if shot.index not in unresolved:
            _remove_abandoned_state(shot)
            yield Outcome(shot, "already done", manifest.read_if_usable(shot.manifest))
    for shot in plan.shots:
        if shot.index in result.refused:
            yield Outcome(shot, "failed", error=result.refused[shot.index])


def _remove_abandoned_state(shot: Shot) -> None:
    """Remove the state of a finished shot, which a stopped render with --force left and nobody resumes."""
    with suppress(MachineError):  # a folder that cannot be looked at or written keeps it
        if disk.exists(shot.state) and find_holder(shot) is None:
            shot_state.remove_state(shot)


def _wait_for_claims(shots: Sequence[Shot], context: RenderContext) -> Sequence[Shot]:
    """Wait until other workers have finished or given up some of these shots; return those."""
    if not shots or context.claims is None or not context.claims.waits_for_others or context.stop.requested:
        return []
    if workers := context.claims.name_holders(shots):
        context.progress.note(f"waiting for {format_shots_inline(shots)}, rendered by {workers}")
    return context.claims.wait_for_release(shots, context.stop)


def _render_with_retries(model: ModelSpec, schedule: Schedule, context: RenderContext) -> Iterator[Outcome]:
    """Render the shots of a model, and retry those whose failure may pass.

    A retry continues from what is on disk by then. It runs alone, which needs the least memory.
    """
    networks = _get_networks(model, schedule.shots, context)
    tries = 0
    while schedule.rounds and not context.stop.requested:
        tries += 1
        retried = []
        for outcome in _render_until_damaged(model, schedule, networks, context):
            error = outcome.error
            if error and not context.stop.requested and context.policy.should_retry(error, tries):
                attempts = f"tried again ({tries} of {context.policy.retries})"
                context.progress.warn(f"shot {outcome.shot.id}: {error}; {attempts}")
                retried.append(outcome)
            else:
                yield outcome
        if context.stop.requested:
            yield from retried
        schedule = batching.build_schedule([replace(outcome.shot, batch=1) for outcome in retried])


def _get_networks(model: ModelSpec, shots: Sequence[Shot], context: RenderContext) -> Networks:
    """Return the networks of these shots, from the cache of models if there is one.

    If prompts are to be encoded and the text encoder does not fit beside cached networks, these are released.
    """
    lazy = not any(shot.loras for shot in shots)
    if context.model_cache is None:
        return Networks(model, lazy)
    networks = context.model_cache.get(model, lazy)
    missing = [
        shot for shot in shots if not all(text.file or is_cached(text, context) for text in shot.prompts)
    ]
    if not all(memory_policy.encoder_fits_alongside(shot) for shot in missing):
        networks.release()
    return networks


def _shots_are(count: int) -> str:
    return "1 shot is" if count == 1 else f"{count} shots are"


def _render_until_damaged(
    model: ModelSpec, schedule: Schedule, networks: Networks, context: RenderContext
) -> Iterator[Outcome]:
    """Render the shots of a model. If its checkpoint turns out to be damaged, all that are left fail."""
    left = {shot.index: shot for shot in schedule.shots}
    broken = ErrorCapture()
    try:
        for outcome in render_model(model, schedule, networks, context):
            left.pop(outcome.shot.index)
            yield outcome
    except CheckpointError as error:
        broken.record(error)
    if broken.error:
        yield from (failed_outcome(shot, broken) for shot in left.values())
