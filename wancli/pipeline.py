"""The only file that knows the order of the phases: encode, load, sample, decode, write, record.

Shots are sampled in the groups and waves of `wancli.lockstep`, one by one where weights are resident. The
latents of a group are on disk before any of them is decoded, and its videos before other shots
take their last steps. `render` yields an Outcome per shot; a ShotError ends one shot, any other
WancliError ends the batch. Where somebody asks for an end it comes after the step, prompt or chunk of
frames that is being worked on, with all states on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from wancli import advance, choose, files, kernels, latents, lockstep, manifest, record, underway, video
from wancli.encode import Encoded, encode, load_embedding
from wancli.errors import (
    EntryError,
    JobError,
    OutputExists,
    ShotError,
    Stopped,
    WancliError,
)
from wancli.experts import EXPERTS, Expert
from wancli.loaded import Networks, check_device, check_weights
from wancli.peak import Peak, fitting
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
    error: WancliError | None = None


def preflight(plan: Plan, tools: Tools) -> list[Shot]:
    """The shots that are not done yet. Raises before anything slow starts.

    OutputExists lists every file in the way; MachineError when ffmpeg or a folder will not do;
    CheckpointError for weights that do not fit their networks; DoesNotFit when the machine has less memory
    than a shot needs.
    """
    wrong = {shot.index: manifest.problems(shot.output, shot.key) for shot in plan.shots}
    todo = [shot for shot in plan.shots if tools.force or wrong[shot.index] or _unmeasured(shot)]
    in_the_way = [
        shot
        for shot in todo
        if shot.output.exists() and wrong[shot.index] and not tools.force and not _unrecorded(shot)
    ]
    if in_the_way:
        reasons = {shot.output: wrong[shot.index][0].rpartition(": ")[2] for shot in in_the_way}
        raise OutputExists(
            "\n".join(
                f"{p} exists, and is not what this job makes now ({why})" for p, why in reasons.items()
            ),
            hint="--force moves it aside; or change `output`.",
        )
    for device in {device for shot in todo for device in (shot.model.device, shot.noise)}:
        check_device(device)
    for model in dict.fromkeys(shot.model for shot in todo):
        kernels.check(model)
    for folder in dict.fromkeys(shot.output.parent for shot in todo):
        files.writable(folder)
    for codec in dict.fromkeys(shot.codec for shot in todo):
        video.check_ffmpeg(codec)
    unknown = [shot.model for shot in todo if not (tools.kept and tools.kept.holds(shot.model))]
    for checkpoint in dict.fromkeys(model.checkpoint for model in unknown):
        check_weights(checkpoint)
    todo = lockstep.arranged(todo)
    for shot in todo:
        choose.require(shot, encoded=all(text.file or _cached(text, tools) for text in shot.texts))
    return todo


def _unmeasured(shot: Shot) -> bool:
    """Whether a finished shot's injections should be measured and were not. Its pixels stay the same."""
    body = manifest.read(shot.manifest) if shot.measure else None
    return body is not None and _lacks_effects(shot, body)


def _lacks_effects(shot: Shot, facts: Record) -> bool:
    return shot.measure and shot.injects and not facts["effects"]


def _unrecorded(shot: Shot) -> bool:
    """Whether a run may have died between the video of this shot and its manifest: then its latent is
    still there. The video is made once more, and publishing the same bytes is no overwriting."""
    if shot.manifest.exists():
        return False
    try:
        return bool(latents.load(shot.latents)[1]["key"] == shot.key)
    except EntryError:
        return False


def _cached(text: Prompt, tools: Tools) -> bool:
    return tools.store is not None and tools.store.path(text.id).exists()


def render(plan: Plan, tools: Tools) -> Iterator[Outcome]:
    """Renders what `preflight` leaves to do, one checkpoint after the other.

    Raises Stopped at the end where somebody asked for it before all was done.
    """
    todo = preflight(plan, tools)
    pending = {shot.index for shot in todo}
    for shot in plan.shots:
        if shot.index not in pending:
            yield Outcome(shot, "already done", manifest.read(shot.manifest))
    stopped = 0
    for model in dict.fromkeys(shot.model for shot in todo):
        for outcome in _render_all(model, [shot for shot in todo if shot.model == model], tools):
            stopped += outcome.status == "stopped"
            pending.discard(outcome.shot.index)
            yield outcome
    if tools.stop.asked and (stopped or pending):
        raise tools.stop.error(f"{_shots(stopped)} saved on the way, {len(pending)} not begun")


def _shots(count: int) -> str:
    return "1 shot is" if count == 1 else f"{count} shots are"


def _render_all(model: Model, shots: Sequence[Shot], tools: Tools) -> Iterator[Outcome]:
    recalled = {shot.index for shot in shots if not tools.force and _recalled(shot)}
    fresh = [shot for shot in shots if shot.index not in recalled]
    waves = lockstep.waves(fresh)
    networks = _networks(model, shots, tools)
    try:
        with fitting("encoding prompts"):
            encoded, stage1 = encode_prompts(model, [text for shot in fresh for text in shot.texts], tools)
    except ShotError as error:
        yield from (Outcome(shot, "failed", error=error) for shot in fresh)
        waves, encoded, stage1 = [], {}, {}
    except Stopped:
        waves, encoded, stage1 = [], {}, {}
    for shot in shots:
        if shot.index in recalled:
            if not (known := _recalled(shot)):
                raise EntryError("gone or changed since this run began", where=str(shot.latents))
            yield _published(shot, *known, networks, tools)
    for wave in waves:
        if not tools.stop.asked:
            yield from _render_wave(wave, encoded, stage1, networks, tools)


def _networks(model: Model, shots: Sequence[Shot], tools: Tools) -> Networks:
    """The networks of these shots, or those that were kept; these make room where prompts are to be encoded
    and the text encoder does not fit beside them."""
    lazily = not any(shot.loras for shot in shots)
    if tools.kept is None:
        return Networks(model, lazily)
    networks = tools.kept.networks(model, lazily)
    missing = [shot for shot in shots if not all(text.file or _cached(text, tools) for text in shot.texts)]
    if not all(choose.beside(shot) for shot in missing):
        networks.release()
    return networks


def _render_wave(
    wave: Sequence[Sequence[Shot]],
    encoded: dict[str, Encoded],
    stage1: Record,
    networks: Networks,
    tools: Tools,
) -> Iterator[Outcome]:
    begun = [[underway.begin(shot, tools) for shot in group] for group in wave]
    ones = [one for group in begun for one in group]
    underway.join(ones)
    for expert in EXPERTS:
        for group in begun:
            yield from _render_stage(group, expert, encoded, stage1, networks, tools)
    for one in ones:  # where somebody asked for an end
        if one.step and not one.over:
            if one.step > one.saved:
                underway.save(one)
            yield Outcome(one.shot, "stopped")


def _render_stage(
    group: Sequence[Underway],
    expert: Expert,
    encoded: dict[str, Encoded],
    stage1: Record,
    networks: Networks,
    tools: Tools,
) -> Iterator[Outcome]:
    """The steps that an expert takes, and after the last ones latents to videos."""
    while not tools.stop.asked and (together := advance.ready(group, expert)):
        with fitting(f"sampling {advance.title(together)}"):
            advance.advance(together, advance.leg(group, together), networks, encoded, tools)
    kept = []
    for one in group:
        try:
            if one.over or one.fork:
                continue
            if one.failed:
                raise one.failed
            if one.step == one.shot.steps:
                loras = networks.loras(one.shot.loras)
                kept.append((one.shot, *advance.keep(one, encoded, loras, stage1)))
                one.over = True
            elif one.step > one.saved:
                underway.save(one)
        except ShotError as error:
            one.over = True
            files.remove(one.shot.state)
            yield Outcome(one.shot, "failed", error=error)
    for shot, z_CTYX, facts in kept:
        yield _published(shot, z_CTYX, facts, networks, tools)


def _published(shot: Shot, z_CTYX: Tensor, facts: Record, networks: Networks, tools: Tools) -> Outcome:
    try:
        if tools.stop.asked:
            raise tools.stop.error("before decoding")
        with fitting(f"shot {shot.id}"):
            body = finish(z_CTYX, facts, shot.output, networks.vae, tools)
    except ShotError as error:
        return Outcome(shot, "failed", error=error)
    except Stopped:
        return Outcome(shot, "stopped")
    if not shot.keep_latents:
        files.remove(shot.latents)
    files.remove(shot.state)
    return Outcome(shot, "rendered", body)


def encode_prompts(
    model: Model, prompts: Sequence[Prompt], tools: Tools
) -> tuple[dict[str, Encoded], Record]:
    """Stage 1: every distinct prompt's embedding by id, and what it took. UMT5 is gone when it returns.

    Raises Stopped between two prompts."""
    import torch  # noqa: F401 - before the measurement, which is of what comes on top

    check_device(model.device)
    texts = {prompt.id: prompt for prompt in prompts}
    found: dict[str, Encoded] = {}
    with Peak() as peak, tools.progress.phase("prompts", "encode", len(texts)) as bar:
        for prompt in texts.values():
            if prompt.file:
                found[prompt.id] = Encoded(prompt.id, load_embedding(prompt.file, prompt.index), hit=True)
                bar.advance()
        for result in encode(model.encoder, [p.tokens for p in texts.values() if not p.file], tools.store):
            found[result.key] = result
            bar.advance()
            if tools.stop.asked and len(found) < len(texts):
                raise tools.stop.error(f"{len(found)} of {len(texts)} prompts encoded")
    width = model.checkpoint.transformer.text_dim
    for prompt in texts.values():
        rows_NE = found[prompt.id].embedding.rows_NE
        if rows_NE.shape[1] != width:
            message = f"its rows are {rows_NE.shape[1]} wide, the model reads {width}"
            raise JobError(message, where=str(prompt.file or model.encoder.files[0]))
    return found, record.phase("encode", peak)


def _recalled(shot: Shot) -> tuple[Tensor, Record] | None:
    """The latent that an earlier run left for this shot, whose video may have changed since."""
    try:
        z_CTYX, facts = latents.load(shot.latents)
    except EntryError:
        return None
    if facts["latents_key"] != shot.latents_key or _lacks_effects(shot, facts):
        return None
    now = record.plain(record.of_shot(shot))
    now["model"]["attention"] = facts["model"]["attention"]  # what ran then
    return z_CTYX, facts | now
