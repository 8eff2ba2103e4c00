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
from wancli.engine.encode_stage import embed_each
from wancli.engine.manifest_body import Record
from wancli.engine.networks import Networks
from wancli.engine.outcome import Outcome, failed
from wancli.engine.preflight import in_the_way, lacks_effects, standing, unmeasured
from wancli.engine.shot_state import Underway
from wancli.errors import ClaimedElsewhere, EntryError, ErrorCapture, ShotError, Stopped, WancliError
from wancli.models.config import EXPERTS, Expert
from wancli.plan import batching
from wancli.plan.shot import Model, Shot
from wancli.resources.measure import fitting, release
from wancli.storage import atomic, manifest
from wancli.storage.manifest_schema import ShotRecord
from wancli.text.encoder import Encoded

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Means:
    """What the shots of a model are made with: its networks, the embeddings of their prompts by id, and what
    encoding them took."""

    networks: Networks
    tools: RenderContext
    encoded: dict[str, Encoded] = field(default_factory=dict)
    stage1: Record = field(default_factory=dict)


def render_model(
    model: Model, shots: Sequence[Shot], networks: Networks, tools: RenderContext
) -> Iterator[Outcome]:
    """Every shot of a model, as they come; of those that other workers hold, that they do.

    Raises CheckpointError and NoSpace, with all states on disk that found room there. Where an end is asked
    for, shots that were not begun are left out.
    """
    recalled = {shot.index for shot in shots if _recalled(shot, tools)}
    fresh = [shot for shot in shots if shot.index not in recalled]
    means = Means(networks, tools)
    unencoded: dict[str, ErrorCapture] = {}
    attempt = ErrorCapture()
    try:
        with attempt:
            encoded, unencoded, stage1 = embed_each(model, [text for s in fresh for text in s.texts], tools)
            means = replace(means, encoded=encoded, stage1=stage1)
    except Stopped:
        fresh = []
    if attempt.error:
        release()
        yield from (failed(shot, attempt) for shot in fresh)
        fresh = []
    sick = {shot.index: unencoded[id] for shot in fresh for id in reversed(_ids(shot)) if id in unencoded}
    yield from (failed(shot, sick[shot.index]) for shot in fresh if shot.index in sick)
    for shot in shots:
        if shot.index in recalled:
            yield from _render_taken([[shot]], means)
    for wave in batching.waves([shot for shot in fresh if shot.index not in sick]):
        if not tools.stop.requested:
            yield from _render_taken(wave, means)


def _render_taken(wave: Sequence[Sequence[Shot]], means: Means) -> Iterator[Outcome]:
    """Of a wave what no other worker holds. What another has finished, or left as a latent, since this run
    looked at it is not sampled."""
    claims = means.tools.claims
    shots = [shot for group in wave for shot in group]
    taken = claims.take(shots) if claims else shots
    others = {shot.index for shot in shots} - {shot.index for shot in taken}
    yield from (Outcome(shot, "elsewhere") for shot in shots if shot.index in others)
    try:
        settled = set(others)
        for shot in taken:
            if outcome := _settled(shot, means):
                settled.add(shot.index)
                yield outcome
        mine = [[shot for shot in group if shot.index not in settled] for group in wave]
        for outcome in _render_wave([group for group in mine if group], means):
            if claims:
                claims.release([outcome.shot])
            yield outcome
    finally:
        if claims:
            claims.release(taken)


def _settled(shot: Shot, means: Means) -> Outcome | None:
    """What became of a shot that is not to be sampled. What was this very shot and no longer verifies moves
    aside, for whoever wants to know why."""
    tools = means.tools
    with ErrorCapture() as attempt:
        state, why = standing(shot, tools)
        if state == "done" and not unmeasured(shot):
            return Outcome(shot, "already done", manifest.read(shot.manifest))
        if state == "in the way":
            raise in_the_way(shot, why)
        if state == "damaged":
            aside = atomic.set_aside(shot.output, "damaged")
            atomic.set_aside(shot.manifest, "damaged")
            moved = f"moved to {aside.name if aside else 'nowhere'}, shot {shot.id} is made anew"
            tools.progress.warn(f"{shot.output} no longer verifies; {moved}")
    if attempt.error:
        return failed(shot, attempt)
    latent = _recalled(shot, tools)
    unencoded = any(id not in means.encoded for id in _ids(shot))
    return _published(shot, latent, means) if latent or unencoded else None


def _render_wave(wave: Sequence[Sequence[Shot]], means: Means) -> Iterator[Outcome]:
    """Every shot that failed or was finished, and where an end is asked for those that were begun."""
    tools = means.tools
    begun: list[list[Underway]] = [[] for _ in wave]
    for shots, ones in zip(wave, begun):
        for shot in shots:
            with ErrorCapture() as attempt, fitting("load", f"shot {shot.id}"):
                ones.append(shot_state.begin(shot, tools))
            if attempt.error:
                yield failed(shot, attempt)
    everyone = [one for group in begun for one in group]
    shot_state.join(everyone)
    try:
        for expert in EXPERTS:
            for group in begun:
                yield from _render_stage(group, expert, means)
    except Exception:  # a full disk above all: where there is no room for one, there may be for the next
        for one in everyone:
            with suppress(WancliError):
                _save(one, tools)
        raise
    stopped = tools.stop.requested  # else a claim was lost, if only for one look; `batch` finds out
    for one in everyone:
        if not one.over and (one.step or not stopped):
            with ErrorCapture() as attempt:
                _save(one, tools)
            left = Outcome(one.shot, "stopped" if stopped else "elsewhere")
            yield failed(one.shot, attempt) if attempt.error else left


def _render_stage(group: Sequence[Underway], expert: Expert, means: Means) -> Iterator[Outcome]:
    """The steps that an expert takes, and after the last ones latents to videos. A shot that fails is told
    as soon as it does."""
    networks, tools = means.networks, means.tools
    while not (tools.stop.requested or tools.lost) and (together := denoise_stage.ready(group, expert)):
        with ErrorCapture() as attempt, fitting("sample", denoise_stage.title(together)):
            denoise_stage.advance(
                together, denoise_stage.leg(group, together), networks, means.encoded, tools
            )
        if attempt.error:
            release()
            shot_state.fail(together, attempt.error)
        yield from _failures(group, attempt.stack, tools)
    yield from _failures(group, "", tools)
    kept: list[tuple[Shot, tuple[Tensor, ShotRecord]]] = []
    for one in group:
        if one.over or one.fork or not _ours(one.shot, tools):
            continue
        with ErrorCapture() as attempt, fitting("sample", f"shot {one.shot.id}"):
            if one.step == one.shot.steps:
                loras = networks.loras(one.shot.loras)
                kept.append((one.shot, denoise_stage.keep(one, means.encoded, loras, means.stage1)))
                one.over = True
            else:
                _save(one, tools)
        if attempt.error:
            one.over = True
            if isinstance(attempt.error, ShotError):
                with suppress(WancliError):
                    atomic.remove(one.shot.state)
            yield failed(one.shot, attempt)
    for shot, latent in kept:
        yield _published(shot, latent, means)


def _failures(group: Sequence[Underway], stack: str, tools: RenderContext) -> Iterator[Outcome]:
    """Those that failed in their steps. The state of one that met NaN would only lead there again; that of
    another is what the next run goes on from."""
    for one in group:
        if one.failed and not one.over and _ours(one.shot, tools):
            attempt = ErrorCapture()
            attempt.record(one.failed)
            with suppress(WancliError):
                if isinstance(one.failed, ShotError):
                    atomic.remove(one.shot.state)
                else:
                    _save(one, tools)
            one.over, one.state = True, None
            yield Outcome(one.shot, "failed", error=attempt.error, stack=attempt.stack or stack)


def _published(shot: Shot, latent: tuple[Tensor, ShotRecord] | None, means: Means) -> Outcome:
    """The video of a latent; None is one that an earlier run left and that is not there any more."""
    networks, tools = means.networks, means.tools
    body = None
    attempt = ErrorCapture()
    if not _ours(shot, tools):
        return Outcome(shot, "elsewhere")
    try:
        if tools.stop.requested:
            raise tools.stop.error("before decoding")
        with attempt, fitting("decode", f"shot {shot.id}"):
            if latent is None:
                raise EntryError("gone or changed since this run began", where=str(shot.latents))
            body = decode_latent(*latent, shot.output, networks.vae, tools)
            if not shot.keep_latents:
                atomic.remove(shot.latents)
            atomic.remove(shot.state)
    except ClaimedElsewhere:
        return Outcome(shot, "elsewhere")
    except Stopped:
        return Outcome(shot, "stopped")
    if attempt.error:
        latent = None
        release()
        # Two that make the same video may differ in what wrote it: whoever holds the shot has it right.
        return failed(shot, attempt) if _ours(shot, tools) else Outcome(shot, "elsewhere")
    return Outcome(shot, "rendered", body)


def _recalled(shot: Shot, tools: RenderContext) -> tuple[Tensor, ShotRecord] | None:
    """The latent that an earlier run left for this shot, whose video may have changed since."""
    if tools.force and tools.force.outdated(shot, "latents"):
        return None
    try:
        z_CTYX, record = manifest_body.load_latent(shot.latents)
    except EntryError:
        return None
    if record.latents_key != shot.latents_key or lacks_effects(shot, record):
        return None
    return z_CTYX, manifest_body.continue_record(record, shot)


def _save(one: Underway, tools: RenderContext) -> None:
    if one.step > one.saved and one.state is not None and not one.over and _ours(one.shot, tools):
        shot_state.save(one)


def _ours(shot: Shot, tools: RenderContext) -> bool:
    return tools.claims is None or tools.claims.holds(shot)


def _ids(shot: Shot) -> list[str]:
    return [text.id for text in shot.texts]
