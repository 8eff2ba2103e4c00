"""A whole batch: which shots are done, which cannot be, and the others, model by model, as they come.

`wancli.engine.outcome` says what an error ends: its shot, all shots of a checkpoint, or the batch. Shots that
other workers claimed (`wancli.storage.claims`) are waited for at the end. `wancli.engine.pipeline` renders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from wancli.engine.context import RenderContext
from wancli.engine.networks import Networks
from wancli.engine.outcome import Outcome, failed
from wancli.engine.pipeline import render_model
from wancli.engine.preflight import Found, cached, finished, preflight
from wancli.errors import CheckpointError, ClaimedElsewhere, ErrorCapture
from wancli.plan import memory_policy
from wancli.plan.shot import Model, Plan, Shot, named
from wancli.storage import manifest


def render(plan: Plan, tools: RenderContext) -> Iterator[Outcome]:
    """Renders what `preflight` leaves to do, one checkpoint after the other, and yields what became of each.

    Raises what `preflight` does before anything is started, NoSpace at once, with all states on disk that
    found room there, and Stopped at the end where somebody asked for it before all was done. ClaimedElsewhere, where
    the claims do not wait for what other workers are at.
    """
    found = preflight(plan, tools)
    yield from tallied(_outcomes(plan, found, tools), found.todo, tools)


def tallied(outcomes: Iterator[Outcome], todo: Sequence[Shot], tools: RenderContext) -> Iterator[Outcome]:
    """The outcomes as they come. Asks for an end where so many failed that it is enough, and raises at the
    end what `render` does."""
    pending = {shot.index for shot in todo}
    stopped = failures = 0
    elsewhere: list[Shot] = []
    for outcome in outcomes:
        stopped += outcome.status == "stopped"
        failures += outcome.status == "failed"
        elsewhere += [outcome.shot] if outcome.status == "elsewhere" else []
        tools.stop.failure_limit_reached = tools.policy.ends(failures)
        pending.discard(outcome.shot.index)
        yield outcome
    unfinished = bool(stopped or pending)
    if (tools.stop.reason and (unfinished or elsewhere)) or (unfinished and not failures):
        others = f", {len(elsewhere)} with other workers" if elsewhere else ""
        raise tools.stop.error(f"{_shots(stopped)} saved on the way, {len(pending)} not begun{others}")
    if elsewhere and tools.claims and not failures:
        raise ClaimedElsewhere(
            f"{_shots(len(elsewhere))} with other workers: {tools.claims.names(elsewhere) or 'gone now'}"
        )


def _outcomes(plan: Plan, found: Found, tools: RenderContext) -> Iterator[Outcome]:
    """Of shots that are `settled`, then of the others as they come."""
    yield from settled(plan, found)
    held: list[Shot] = []
    todo: Sequence[Shot] = found.todo
    while todo or held:
        for model in dict.fromkeys(shot.model for shot in todo):
            if not tools.stop.requested:
                for outcome in _until_settled(model, [shot for shot in todo if shot.model == model], tools):
                    if outcome.status == "elsewhere":
                        held.append(outcome.shot)
                    else:
                        yield outcome
        free = _let_go(held, tools)
        if not free:
            break
        held = [shot for shot in held if shot.index not in {one.index for one in free}]
        ended = {shot.index: shot for shot in free if not tools.force and finished(shot)}
        yield from (Outcome(shot, "already done", manifest.read(shot.manifest)) for shot in ended.values())
        todo = [shot for shot in free if shot.index not in ended]
    yield from (Outcome(shot, "elsewhere") for shot in held)


def settled(plan: Plan, found: Found) -> Iterator[Outcome]:
    """Of shots that are done, then of those that cannot be."""
    untouched = {shot.index for shot in found.todo} | found.refused.keys()
    for shot in plan.shots:
        if shot.index not in untouched:
            yield Outcome(shot, "already done", manifest.read(shot.manifest))
    for shot in plan.shots:
        if shot.index in found.refused:
            yield Outcome(shot, "failed", error=found.refused[shot.index])


def several(shots: Sequence[Shot]) -> str:
    """What people read of shots in the middle of a sentence."""
    return f"shot {named(shots)}" if len(shots) == 1 else named(shots)


def _let_go(held: Sequence[Shot], tools: RenderContext) -> Sequence[Shot]:
    """Waits until other workers are done with some of these shots, or gave them up; returns those."""
    if not held or tools.claims is None or not tools.claims.waits or tools.stop.requested:
        return []
    if workers := tools.claims.names(held):
        tools.progress.note(f"waiting for {several(held)}, rendered by {workers}")
    return tools.claims.wait(held, tools.stop)


def _until_settled(model: Model, shots: Sequence[Shot], tools: RenderContext) -> Iterator[Outcome]:
    """The shots of a model, those again whose failure may pass: from what is on disk by then, and alone,
    which needs the least memory."""
    networks = _networks(model, shots, tools)
    tries = 0
    while shots and not tools.stop.requested:
        tries += 1
        again = []
        for outcome in _until_damage(model, shots, networks, tools):
            if outcome.error and not tools.stop.requested and tools.policy.tries_again(outcome.error, tries):
                said = f"{outcome.error}; tried again ({tries} of {tools.policy.retries})"
                tools.progress.warn(f"shot {outcome.shot.id}: {said}")
                again.append(outcome)
            else:
                yield outcome
        if tools.stop.requested:
            yield from again
        shots = [replace(outcome.shot, batch=1, shared=None, fork=None) for outcome in again]


def _networks(model: Model, shots: Sequence[Shot], tools: RenderContext) -> Networks:
    """The networks of these shots, or those that were kept; these make room where prompts are to be encoded
    and the text encoder does not fit beside them."""
    lazily = not any(shot.loras for shot in shots)
    if tools.kept is None:
        return Networks(model, lazily)
    networks = tools.kept.networks(model, lazily)
    missing = [shot for shot in shots if not all(text.file or cached(text, tools) for text in shot.texts)]
    if not all(memory_policy.beside(shot) for shot in missing):
        networks.release()
    return networks


def _shots(count: int) -> str:
    return "1 shot is" if count == 1 else f"{count} shots are"


def _until_damage(
    model: Model, shots: Sequence[Shot], networks: Networks, tools: RenderContext
) -> Iterator[Outcome]:
    """Every shot of a model. A checkpoint that turns out to be damaged fails all that are left of them."""
    left = {shot.index: shot for shot in shots}
    broken = ErrorCapture()
    try:
        for outcome in render_model(model, shots, networks, tools):
            left.pop(outcome.shot.index)
            yield outcome
    except CheckpointError as error:
        broken.record(error)
    if broken.error:
        yield from (failed(shot, broken) for shot in left.values())
