"""The only file that knows the order of the phases: encode, load, sample, decode, write, record.

Shots are sampled in the groups and waves of `wancli.lockstep`, one by one where weights are resident. The
latents of a group are on disk before any of them is decoded, and its videos before other shots
take their last steps. `render` yields an Outcome per shot; what an error ends, its shot, all shots of a
checkpoint or the batch, `wancli.policy` tells. Where somebody asks for an end it comes after the step,
prompt or chunk of frames that is being worked on, with all states on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from wancli import advance, choose, files, latents, lockstep, manifest, record, underway
from wancli.encode import Encoded, encode, load_embedding
from wancli.errors import (
    CheckpointError,
    Elsewhere,
    EntryError,
    JobError,
    OutputExists,
    ShotError,
    Stopped,
    WancliError,
)
from wancli.experts import EXPERTS, Expert
from wancli.loaded import Networks, check_device
from wancli.peak import Peak, fitting, release
from wancli.policy import Failing
from wancli.preflight import Found, cached, condition, lacks_effects, preflight, unmeasured
from wancli.record import Record
from wancli.shot import Model, Plan, Prompt, Shot
from wancli.stage3 import finish
from wancli.tools import Tools
from wancli.underway import Underway

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Outcome:
    """What became of one shot. `record` is the body of its manifest, if it has one; `stopped` is one that a
    state or a latent on disk waits for, `elsewhere` one that another worker has not finished."""

    shot: Shot
    status: Literal["rendered", "already done", "failed", "stopped", "elsewhere"]
    record: Record | None = None
    error: WancliError | None = None  # without its frames: what they say is in `stack`
    stack: str = ""


def render(plan: Plan, tools: Tools) -> Iterator[Outcome]:
    """Renders what `preflight` leaves to do, one checkpoint after the other, and yields what became of each.

    Raises what `preflight` does before anything is started, NoSpace at once, with all states on disk that
    found room there, and Stopped at the end where somebody asked for it before all was done. Elsewhere, where
    the claims do not wait for what other workers are at.
    """
    if tools.claims:
        tools.claims.remember(plan.shots)
    found = preflight(plan, tools)
    yield from tallied(_outcomes(plan, found, tools), found.todo, tools)


def tallied(outcomes: Iterator[Outcome], todo: Sequence[Shot], tools: Tools) -> Iterator[Outcome]:
    """The outcomes as they come. Asks for an end where so many failed that it is enough, and raises at the
    end what `render` does."""
    pending = {shot.index for shot in todo}
    stopped = failed = 0
    elsewhere: list[Shot] = []
    for outcome in outcomes:
        stopped += outcome.status == "stopped"
        failed += outcome.status == "failed"
        elsewhere += [outcome.shot] if outcome.status == "elsewhere" else []
        tools.stop.enough = tools.policy.ends(failed)
        pending.discard(outcome.shot.index)
        yield outcome
    if tools.stop.reason and (stopped or pending or elsewhere):
        others = f", {len(elsewhere)} with other workers" if elsewhere else ""
        raise tools.stop.error(f"{_shots(stopped)} saved on the way, {len(pending)} not begun{others}")
    if elsewhere and tools.claims and not failed:
        raise Elsewhere(
            f"{_shots(len(elsewhere))} with other workers: {tools.claims.names(elsewhere) or 'gone now'}"
        )


def _outcomes(plan: Plan, found: Found, tools: Tools) -> Iterator[Outcome]:
    """Of shots that are done, then of those that cannot be, then of the others as they come."""
    untouched = {shot.index for shot in found.todo} | found.refused.keys()
    for shot in plan.shots:
        if shot.index not in untouched:
            yield Outcome(shot, "already done", manifest.read(shot.manifest))
    for shot in plan.shots:
        if shot.index in found.refused:
            yield Outcome(shot, "failed", error=found.refused[shot.index])
    held: list[Shot] = []
    todo: Sequence[Shot] = found.todo
    while todo:
        for model in dict.fromkeys(shot.model for shot in todo):
            if not tools.stop.asked:
                for outcome in _until_settled(model, [shot for shot in todo if shot.model == model], tools):
                    if outcome.status == "elsewhere":
                        held.append(outcome.shot)
                    else:
                        yield outcome
        todo = _let_go(held, tools)
        held = [shot for shot in held if shot.index not in {free.index for free in todo}]
    yield from (Outcome(shot, "elsewhere") for shot in held)


def _let_go(held: Sequence[Shot], tools: Tools) -> Sequence[Shot]:
    """Waits until other workers are done with some of these shots, or gave them up; returns those."""
    if not held or tools.claims is None or not tools.claims.waits or tools.stop.asked:
        return []
    first, last = held[0].id, held[-1].id
    which = f"shot {first}" if len(held) == 1 else f"{len(held)} shots, {first} to {last}"
    if workers := tools.claims.names(held):
        tools.progress.note(f"waiting for {which}, rendered by {workers}")
    return tools.claims.wait(held, tools.stop)


def _until_settled(model: Model, shots: Sequence[Shot], tools: Tools) -> Iterator[Outcome]:
    """The shots of a model, those again whose failure may pass. What is tried again goes on from what is on
    disk, also with --force, and alone, which needs the least memory."""
    networks = _networks(model, shots, tools)
    tries = 0
    while shots and not tools.stop.asked:
        tries += 1
        again = []
        for outcome in _render_all(model, shots, networks, tools, anew=tools.force and tries == 1):
            if outcome.error and not tools.stop.asked and tools.policy.tries_again(outcome.error, tries):
                said = f"{outcome.error}; tried again ({tries} of {tools.policy.retries})"
                tools.progress.warn(f"shot {outcome.shot.id}: {said}")
                again.append(outcome)
            else:
                yield outcome
        if tools.stop.asked:
            yield from again
        shots = [replace(outcome.shot, batch=1, shared=None, fork=None) for outcome in again]


def _networks(model: Model, shots: Sequence[Shot], tools: Tools) -> Networks:
    """The networks of these shots, or those that were kept; these make room where prompts are to be encoded
    and the text encoder does not fit beside them."""
    lazily = not any(shot.loras for shot in shots)
    if tools.kept is None:
        return Networks(model, lazily)
    networks = tools.kept.networks(model, lazily)
    missing = [shot for shot in shots if not all(text.file or cached(text, tools) for text in shot.texts)]
    if not all(choose.beside(shot) for shot in missing):
        networks.release()
    return networks


def _shots(count: int) -> str:
    return "1 shot is" if count == 1 else f"{count} shots are"


def _render_all(
    model: Model, shots: Sequence[Shot], networks: Networks, tools: Tools, *, anew: bool
) -> Iterator[Outcome]:
    """Every shot of a model. A checkpoint that turns out to be damaged fails all that are left of them."""
    left = {shot.index: shot for shot in shots}
    broken = Failing()
    try:
        for outcome in _one_by_one(model, shots, networks, tools, anew):
            left.pop(outcome.shot.index)
            yield outcome
    except CheckpointError as error:
        broken.take(error)
    if broken.error:
        yield from (_failed(shot, broken) for shot in left.values())


def _one_by_one(
    model: Model, shots: Sequence[Shot], networks: Networks, tools: Tools, anew: bool
) -> Iterator[Outcome]:
    recalled = {shot.index for shot in shots if not anew and _recalled(shot)}
    encoded: dict[str, Encoded] = {}
    unencoded: dict[str, Failing] = {}
    stage1: Record = {}
    fresh = [shot for shot in shots if shot.index not in recalled]
    attempt = Failing()
    try:
        with attempt:
            texts = [text for shot in fresh for text in shot.texts]
            encoded, unencoded, stage1 = _encode_prompts(model, texts, tools)
    except Stopped:
        fresh = []
    if attempt.error:
        release()
        yield from (_failed(shot, attempt) for shot in fresh)
        fresh = []
    sick = {shot.index: unencoded[id] for shot in fresh for id in _ids(shot) if id in unencoded}
    yield from (_failed(shot, sick[shot.index]) for shot in fresh if shot.index in sick)
    for shot in shots:
        if shot.index in recalled:
            yield from _render_taken([[shot]], encoded, stage1, networks, tools, anew)
    for wave in lockstep.waves([shot for shot in fresh if shot.index not in sick]):
        if not tools.stop.asked:
            yield from _render_taken(wave, encoded, stage1, networks, tools, anew)


def _render_taken(
    wave: Sequence[Sequence[Shot]],
    encoded: dict[str, Encoded],
    stage1: Record,
    networks: Networks,
    tools: Tools,
    anew: bool,
) -> Iterator[Outcome]:
    """Of a wave what no other worker holds. What another has finished, or left as a latent, since this run
    looked at it is not sampled."""
    shots = [shot for group in wave for shot in group]
    taken = tools.claims.take(shots) if tools.claims else shots
    others = {shot.index for shot in shots} - {shot.index for shot in taken}
    yield from (Outcome(shot, "elsewhere") for shot in shots if shot.index in others)
    try:
        settled = set(others)
        for shot in taken:
            if outcome := _settled(shot, encoded, networks, tools, anew):
                settled.add(shot.index)
                yield outcome
        mine = [[shot for shot in group if shot.index not in settled] for group in wave]
        for outcome in _render_wave(
            [group for group in mine if group], encoded, stage1, networks, tools, anew
        ):
            if tools.claims:
                tools.claims.release([outcome.shot])
            yield outcome
    finally:
        if tools.claims:
            tools.claims.release(taken)


def _settled(
    shot: Shot, encoded: dict[str, Encoded], networks: Networks, tools: Tools, anew: bool
) -> Outcome | None:
    """What became of a shot that is not to be sampled. What was this very shot and no longer verifies moves
    aside, for whoever wants to know why."""
    with Failing() as attempt:
        if not tools.force or (tools.claims and tools.claims.remade(shot)):
            state, why = condition(shot)
            if state == "done" and not unmeasured(shot):
                return Outcome(shot, "already done", manifest.read(shot.manifest))
            if state == "in the way":
                raise OutputExists(
                    f"exists, and is not what this job makes now ({why})", where=str(shot.output)
                )
            if state == "damaged":
                aside = files.set_aside(shot.output, "damaged")
                files.set_aside(shot.manifest, "damaged")
                moved = f"moved to {aside.name if aside else 'nowhere'}, shot {shot.id} is made anew"
                tools.progress.warn(f"{shot.output} no longer verifies; {moved}")
    if attempt.error:
        return _failed(shot, attempt)
    unencoded = any(id not in encoded for id in _ids(shot))
    if unencoded or (not anew and _recalled(shot)):
        return _published(shot, None, networks, tools)
    return None


def _ours(shot: Shot, tools: Tools) -> bool:
    return tools.claims is None or tools.claims.holds(shot)


def _ids(shot: Shot) -> list[str]:
    return [text.id for text in shot.texts]


def _failed(shot: Shot, attempt: Failing) -> Outcome:
    return Outcome(shot, "failed", error=attempt.error, stack=attempt.stack)


def _render_wave(
    wave: Sequence[Sequence[Shot]],
    encoded: dict[str, Encoded],
    stage1: Record,
    networks: Networks,
    tools: Tools,
    anew: bool,
) -> Iterator[Outcome]:
    begun: list[list[Underway]] = [[] for _ in wave]
    for shots, ones in zip(wave, begun):
        for shot in shots:
            with Failing() as attempt, fitting("load", f"shot {shot.id}"):
                ones.append(underway.begin(shot, replace(tools, force=anew)))
            if attempt.error:
                yield _failed(shot, attempt)
    everyone = [one for group in begun for one in group]
    underway.join(everyone)
    try:
        for expert in EXPERTS:
            for group in begun:
                yield from _render_stage(group, expert, encoded, stage1, networks, tools)
    except Exception:  # a full disk above all: where there is no room for one, there may be for the next
        for one in everyone:
            with suppress(WancliError):
                _save(one, tools)
        raise
    lost = tools.lost
    for one in everyone:  # where an end was asked for, or another worker took shots over
        if not one.over and (one.step or lost):
            with Failing() as attempt:
                _save(one, tools)
            left = Outcome(one.shot, "elsewhere" if lost else "stopped")
            yield _failed(one.shot, attempt) if attempt.error else left


def _save(one: Underway, tools: Tools) -> None:
    if one.step > one.saved and one.state is not None and not one.over and _ours(one.shot, tools):
        underway.save(one)


def _render_stage(
    group: Sequence[Underway],
    expert: Expert,
    encoded: dict[str, Encoded],
    stage1: Record,
    networks: Networks,
    tools: Tools,
) -> Iterator[Outcome]:
    """The steps that an expert takes, and after the last ones latents to videos. A shot that fails is told
    as soon as it does."""
    while not (tools.stop.asked or tools.lost) and (together := advance.ready(group, expert)):
        with Failing() as attempt, fitting("sample", advance.title(together)):
            advance.advance(together, advance.leg(group, together), networks, encoded, tools)
        if attempt.error:
            release()
            underway.fail(together, attempt.error)
        yield from _told(group, attempt.stack, tools)
    yield from _told(group, "", tools)
    kept: list[tuple[Shot, tuple[Tensor, Record]]] = []
    for one in group:
        if one.over or one.fork or not _ours(one.shot, tools):
            continue
        with Failing() as attempt, fitting("sample", f"shot {one.shot.id}"):
            if one.step == one.shot.steps:
                loras = networks.loras(one.shot.loras)
                kept.append((one.shot, advance.keep(one, encoded, loras, stage1)))
                one.over = True
            else:
                _save(one, tools)
        if attempt.error:
            one.over = True
            if isinstance(attempt.error, ShotError):
                with suppress(WancliError):
                    files.remove(one.shot.state)
            yield _failed(one.shot, attempt)
    for shot, latent in kept:
        yield _published(shot, latent, networks, tools)


def _told(group: Sequence[Underway], stack: str, tools: Tools) -> Iterator[Outcome]:
    """Those that failed in their steps. The state of one that met NaN would only lead there again; that of
    another is what the next run goes on from."""
    for one in group:
        if one.failed and not one.over and _ours(one.shot, tools):
            attempt = Failing()
            attempt.take(one.failed)
            with suppress(WancliError):
                if isinstance(one.failed, ShotError):
                    files.remove(one.shot.state)
                else:
                    _save(one, tools)
            one.over, one.state = True, None
            yield Outcome(one.shot, "failed", error=attempt.error, stack=attempt.stack or stack)


def _published(shot: Shot, latent: tuple[Tensor, Record] | None, networks: Networks, tools: Tools) -> Outcome:
    """The video of a latent: the one given, or the one that an earlier run left."""
    body = None
    attempt = Failing()
    if not _ours(shot, tools):
        return Outcome(shot, "elsewhere")
    try:
        if tools.stop.asked:
            raise tools.stop.error("before decoding")
        with attempt, fitting("decode", f"shot {shot.id}"):
            if latent is None and (latent := _recalled(shot)) is None:
                raise EntryError("gone or changed since this run began", where=str(shot.latents))
            body = finish(*latent, shot.output, networks.vae, tools)
            if not shot.keep_latents:
                files.remove(shot.latents)
            files.remove(shot.state)
    except Elsewhere:
        return Outcome(shot, "elsewhere")
    except Stopped:
        return Outcome(shot, "stopped")
    if attempt.error:
        latent = None
        release()
        # Two that make the same video may differ in what wrote it: whoever holds the shot has it right.
        return _failed(shot, attempt) if _ours(shot, tools) else Outcome(shot, "elsewhere")
    return Outcome(shot, "rendered", body)


def encode_prompts(
    model: Model, prompts: Sequence[Prompt], tools: Tools
) -> tuple[dict[str, Encoded], Record]:
    """Stage 1: every distinct prompt's embedding by id, and what it took. UMT5 is gone when it returns.

    Raises Stopped between two prompts, and in the end what went wrong with the first that failed."""
    found, failed, stage1 = _encode_prompts(model, prompts, tools)
    for attempt in failed.values():
        assert attempt.error
        raise attempt.error
    return found, stage1


def _encode_prompts(
    model: Model, prompts: Sequence[Prompt], tools: Tools
) -> tuple[dict[str, Encoded], dict[str, Failing], Record]:
    """As `encode_prompts`, with those that failed by id."""
    import torch  # noqa: F401 - before the measurement, which is of what comes on top

    check_device(model.device)
    texts = {prompt.id: prompt for prompt in prompts}
    found: dict[str, Encoded] = {}
    failed: dict[str, Failing] = {}
    with Peak() as peak, tools.progress.phase("prompts", "encode", len(texts)) as bar:
        for prompt in texts.values():
            if prompt.file:
                with Failing() as attempt:
                    found[prompt.id] = Encoded(prompt.id, load_embedding(prompt.file, prompt.index), hit=True)
                failed |= {prompt.id: attempt} if attempt.error else {}
                bar.advance()
        for result in encode(model.encoder, [p.tokens for p in texts.values() if not p.file], tools.store):
            if isinstance(result, Encoded):
                found[result.key] = result
            else:
                failed[result.key] = Failing()
                failed[result.key].take(result.error)
            bar.advance()
            if tools.stop.asked and len(found) + len(failed) < len(texts):
                raise tools.stop.error(f"{len(found)} of {len(texts)} prompts encoded")
    width = model.checkpoint.transformer.text_dim
    for id, done in found.items():
        rows_NE = done.embedding.rows_NE
        if rows_NE.shape[1] != width:
            message = f"its rows are {rows_NE.shape[1]} wide, the model reads {width}"
            failed[id] = Failing()
            failed[id].take(JobError(message, where=str(texts[id].file or model.encoder.files[0])))
    return found, failed, record.phase("encode", peak)


def _recalled(shot: Shot) -> tuple[Tensor, Record] | None:
    """The latent that an earlier run left for this shot, whose video may have changed since."""
    try:
        z_CTYX, facts = latents.load(shot.latents)
    except EntryError:
        return None
    if facts["latents_key"] != shot.latents_key or lacks_effects(shot, facts):
        return None
    now = record.plain(record.of_shot(shot))
    now["model"]["attention"] = facts["model"]["attention"]  # what ran then
    return z_CTYX, facts | now | {"phases": record.earlier(facts["phases"])}
