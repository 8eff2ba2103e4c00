"""Stage 2 of the pipeline, leg by leg: steps that one network takes for some shots in lock-step.

A leg ends where the expert changes, where a shot forks or catches up with others of its group, or with the
last step.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from wancli.engine import manifest_body
from wancli.engine.context import RenderContext
from wancli.engine.manifest_body import Record
from wancli.engine.networks import Networks
from wancli.engine.shot_state import Underway, due, hand_over, save
from wancli.errors import NotFinite
from wancli.models.config import Expert
from wancli.plan.shot import named
from wancli.resources.measure import Peak
from wancli.sampling.solvers import State
from wancli.sampling.stages import Stage
from wancli.storage import atomic, tensor_file
from wancli.storage.manifest_schema import ShotRecord
from wancli.text.encoder import Encoded
from wancli.video import metrics

if TYPE_CHECKING:
    from torch import Tensor

    from wancli.injection.contexts import Contexts, Effect
    from wancli.models.dit import WanModel
    from wancli.sampling.denoise import Sampled, Walk
    from wancli.weights.lora.patch import Loras


def ready(group: Sequence[Underway], expert: Expert) -> list[Underway]:
    """The shots of a group whose next steps are this expert's: those that are least far, in lock-step."""
    found = [one for one in group if one.next_stage and one.next_stage.expert == expert and not one.fork]
    return [one for one in found if one.step == min(other.step for other in found)]


def leg(group: Sequence[Underway], together: Sequence[Underway]) -> range:
    """The steps that the shots `together` of a group take now."""
    start = together[0].step
    stage = together[0].next_stage
    assert stage
    ahead = [one.step for one in group if one.step > start and not one.failed]
    forks = [heir.fork.step for one in together for heir in one.heirs if heir.fork]
    return range(start, min(stop for stop in (stage.steps.stop, *ahead, *forks) if stop > start))


def advance(
    group: Sequence[Underway],
    steps: range,
    networks: Networks,
    encoded: Mapping[str, Encoded],
    tools: RenderContext,
) -> None:
    """Takes these steps with the network of their expert, all shots of the group in lock-step, and hands
    the states over to shots that fork there; fewer steps where somebody asks for an end.

    A shot that meets NaN or Inf has `failed`; the others go on.
    """
    import torch

    from wancli.injection.contexts import Contexts
    from wancli.sampling import denoise

    stages = [replace(stage, steps=steps) for one in group if (stage := one.next_stage)]
    expert, shot = stages[0].expert, group[0].shot
    loras = networks.loras(shot.loras)
    # Without a name that outlives this call, which would keep this expert in memory beside the next.
    model, patches = networks.transformer(expert), networks.patches
    heirs = [heir for one in group for heir in one.all_heirs()]
    texts = {text.id for one in (*group, *heirs) for text in one.shot.texts}
    rows_NE = {id: encoded[id].embedding.rows_NE.to(shot.model.device) for id in texts}

    def taken() -> list[Record]:
        return [
            networks.loading,
            manifest_body.phase_record("sample", peak) | {"shots": len(group) + len(heirs)},
        ]

    with (
        torch.inference_mode(),
        Peak() as peak,
        tools.progress.phase(title(group), "sample", len(steps), [one.shot.id for one in group]) as bar,
    ):
        patches.at(loras, steps[0], expert)
        contexts = Contexts(model, rows_NE)
        _start(group, heirs, model, encoded)
        walks = [_walk(one, stage, contexts) for one, stage in zip(group, stages)]
        results = denoise.denoise_together(model, walks, _riders(group))
        for step in steps:
            if tools.stop.requested:
                break
            for one, walk, at in zip(group, walks, next(results)):
                _note(one, walk, at, tools)
            bar.advance(note=f"sigma {walks[0].schedule.sigmas[step + 1]:.3f}")
            if any(one.failed for one in group) or tools.lost:  # told before the others go on
                break
            if step + 1 in steps:
                for one in group:
                    if due(one) and not one.failed:
                        peak.read()
                        save(one, taken())
                if patches.at(loras, step + 1, expert):
                    contexts.forget()
    for one in group:
        assert one.state is not None
        one.state = one.state.to("cpu")
        one.add_phases(taken())
        hand_over(one)


def title(group: Sequence[Underway]) -> str:
    """What people read of a group."""
    return named([one.shot for one in group])


def _riders(group: Sequence[Underway]) -> int:
    """Forwards on a pass over the blocks: all of the group where the pass fetches weights."""
    resident = group[0].shot.model.residency == "resident"
    return 1 if resident else sum(one.shot.riders for one in group)


def _start(
    group: Sequence[Underway], heirs: Sequence[Underway], model: WanModel, encoded: Mapping[str, Encoded]
) -> None:
    """Noise, the time, and how different the injected prompts are: by the network of the first step, so for
    those that fork later, too."""
    from wancli.sampling import denoise
    from wancli.text.prompt_distance import compare_all

    now = time.monotonic()
    for one in group:
        shot = one.shot
        one.began, one.unsaved_since = min(one.began, now), min(one.unsaved_since, now)
        if one.state is None:
            one.state = State(denoise.noise(shot.latent_shape, shot.seed, shot.noise))
    new = [one for one in (*group, *heirs) if one.shot.injected and not one.differences]
    pairs = {(one.shot.prompt.id, text.id): None for one in new for text in one.shot.injected}
    embeddings = [(encoded[main].embedding, encoded[other].embedding) for main, other in pairs]
    differences = dict(zip(pairs, compare_all(embeddings, model)))
    for one in new:
        one.differences = [differences[one.shot.prompt.id, text.id].as_dict() for text in one.shot.injected]


def _walk(one: Underway, stage: Stage, contexts: Contexts) -> Walk:
    from wancli.sampling import denoise

    assert one.state is not None
    shot, state = one.shot, one.state.to(one.shot.model.device)
    effects: list[Effect] | None = [] if shot.measure else None
    return denoise.Walk(state, shot.schedule, shot.solver, shot.table, contexts, stage, effects)


def _note(one: Underway, walk: Walk, at: Sampled | NotFinite, tools: RenderContext) -> None:
    """What a step has left."""
    if isinstance(at, NotFinite):
        one.failed = at
        return
    one.step, one.state = at.step, at.state
    one.read |= at.read
    one.first_step = one.first_step or manifest_body.seconds_since(tools.began)
    if walk.effects:
        one.effects += [asdict(effect) for effect in walk.effects]
        walk.effects.clear()


def keep(
    one: Underway, encoded: Mapping[str, Encoded], loras: Loras, stage1: Record
) -> tuple[Tensor, ShotRecord]:
    """The finished latent, now durable on disk, and all that the manifest will say of its making.

    Raises InjectionMissed where a rule did not reach the blocks it was planned for.
    """
    from wancli.sampling.denoise import check_hits

    shot = one.shot
    assert one.state is not None
    check_hits(shot.table, frozenset(one.read))
    z_CTYX = one.state.x
    record = manifest_body.build_record(
        shot,
        cached={id: result.hit for id, result in encoded.items()},
        reads=one.read,
        differences=one.differences,
        effects=one.effects,
        loras=loras,
        phases=[stage1, *one.phases],
        first_step_after=one.first_step,
        latent=metrics.sketch(z_CTYX.numpy()),
    )
    atomic.set_aside(shot.latents)  # another shot's, or with --force this one's
    tensor_file.save(shot.latents, z_CTYX, record.as_dict())
    atomic.remove(shot.state)
    one.state = None
    return z_CTYX, record
