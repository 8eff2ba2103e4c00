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
from wancli.engine.shot_state import ShotState, is_save_due, propagate_state, save_state
from wancli.errors import NotFinite
from wancli.models.config import Expert
from wancli.plan.shot import format_shots
from wancli.resources.measure import PeakMemory
from wancli.sampling.solvers import State
from wancli.sampling.stages import Stage
from wancli.storage import atomic, tensor_file
from wancli.storage.manifest_schema import ShotRecord
from wancli.text.encoder import Encoded
from wancli.video import metrics

if TYPE_CHECKING:
    from torch import Tensor

    from wancli.injection.contexts import ContextCache, Effect
    from wancli.models.dit import WanModel
    from wancli.sampling.denoise import DenoiseRun, StepResult
    from wancli.weights.lora.patch import Loras


def select_ready(batch: Sequence[ShotState], expert: Expert) -> list[ShotState]:
    """The shots of a group whose next steps are this expert's: those that are least far, in lock-step."""
    found = [one for one in batch if one.next_stage and one.next_stage.expert == expert and not one.fork]
    return [one for one in found if one.step == min(other.step for other in found)]


def next_segment(batch: Sequence[ShotState], ready: Sequence[ShotState]) -> range:
    """The steps that the shots `together` of a group take now."""
    start = ready[0].step
    stage = ready[0].next_stage
    assert stage
    ahead = [one.step for one in batch if one.step > start and not one.failed]
    forks = [heir.fork.step for one in ready for heir in one.dependents if heir.fork]
    return range(start, min(stop for stop in (stage.steps.stop, *ahead, *forks) if stop > start))


def run_segment(
    batch: Sequence[ShotState],
    steps: range,
    networks: Networks,
    encoded: Mapping[str, Encoded],
    context: RenderContext,
) -> None:
    """Takes these steps with the network of their expert, all shots of the group in lock-step, and hands
    the states over to shots that fork there; fewer steps where somebody asks for an end.

    A shot that meets NaN or Inf has `failed`; the others go on.
    """
    import torch

    from wancli.injection.contexts import ContextCache
    from wancli.sampling import denoise

    stages = [replace(stage, steps=steps) for one in batch if (stage := one.next_stage)]
    expert, shot = stages[0].expert, batch[0].shot
    loras = networks.loras(shot.loras)
    # Without a name that outlives this call, which would keep this expert in memory beside the next.
    model, patches = networks.transformer(expert), networks.patches
    dependents = [heir for one in batch for heir in one.all_dependents()]
    texts = {text.id for one in (*batch, *dependents) for text in one.shot.prompts}
    rows_NE = {id: encoded[id].embedding.rows_NE.to(shot.model.device) for id in texts}

    def segment_phases() -> list[Record]:
        return [
            networks.load_record,
            manifest_body.phase_record("sample", peak) | {"shots": len(batch) + len(dependents)},
        ]

    with (
        torch.inference_mode(),
        PeakMemory() as peak,
        context.progress.phase("sample", [one.shot.id for one in batch], len(steps)) as bar,
    ):
        patches.at(loras, steps[0], expert)
        contexts = ContextCache(model, rows_NE)
        _prepare(batch, dependents, model, encoded)
        runs = [_make_run(one, stage, contexts) for one, stage in zip(batch, stages)]
        results = denoise.denoise_batch(model, runs, _forwards_per_pass(batch))
        for step in steps:
            if context.stop.requested:
                break
            for one, walk, at in zip(batch, runs, next(results)):
                _record_step(one, walk, at, context)
            bar.advance(note=f"sigma {runs[0].schedule.sigmas[step + 1]:.3f}")
            if any(one.failed for one in batch) or context.lost_claim:  # told before the others go on
                break
            if step + 1 in steps:
                for one in batch:
                    if is_save_due(one) and not one.failed:
                        peak.update()
                        save_state(one, segment_phases())
                if patches.at(loras, step + 1, expert):
                    contexts.clear()
    for one in batch:
        assert one.solver_state is not None
        one.solver_state = one.solver_state.to("cpu")
        one.add_phases(segment_phases())
        propagate_state(one)


def format_batch(batch: Sequence[ShotState]) -> str:
    """What people read of a group."""
    return format_shots([one.shot for one in batch])


def _forwards_per_pass(batch: Sequence[ShotState]) -> int:
    """Forwards on a pass over the blocks: all of the group where the pass fetches weights."""
    resident = batch[0].shot.model.residency == "resident"
    return 1 if resident else sum(one.shot.forwards_per_step for one in batch)


def _prepare(
    batch: Sequence[ShotState],
    dependents: Sequence[ShotState],
    model: WanModel,
    encoded: Mapping[str, Encoded],
) -> None:
    """Noise, the time, and how different the injected prompts are: by the network of the first step, so for
    those that fork later, too."""
    from wancli.sampling import denoise
    from wancli.text.prompt_distance import compare_all

    now = time.monotonic()
    for one in batch:
        shot = one.shot
        one.started_at, one.unsaved_since = min(one.started_at, now), min(one.unsaved_since, now)
        if one.solver_state is None:
            one.solver_state = State(denoise.draw_noise(shot.latent_shape, shot.seed, shot.noise))
    new = [one for one in (*batch, *dependents) if one.shot.injected and not one.differences]
    pairs = {(one.shot.prompt.id, text.id): None for one in new for text in one.shot.injected}
    embeddings = [(encoded[main].embedding, encoded[other].embedding) for main, other in pairs]
    differences = dict(zip(pairs, compare_all(embeddings, model)))
    for one in new:
        one.differences = [differences[one.shot.prompt.id, text.id].as_dict() for text in one.shot.injected]


def _make_run(state: ShotState, stage: Stage, contexts: ContextCache) -> DenoiseRun:
    from wancli.sampling import denoise

    assert state.solver_state is not None
    shot, solver_state = state.shot, state.solver_state.to(state.shot.model.device)
    effects: list[Effect] | None = [] if shot.measure else None
    return denoise.DenoiseRun(
        solver_state, shot.sigma_schedule, shot.solver, shot.table, contexts, stage, effects
    )


def _record_step(
    state: ShotState, run: DenoiseRun, result: StepResult | NotFinite, context: RenderContext
) -> None:
    """What a step has left."""
    if isinstance(result, NotFinite):
        state.failed = result
        return
    state.step, state.solver_state = result.step, result.state
    state.reads |= result.cells_read
    state.first_step_after = state.first_step_after or manifest_body.seconds_since(context.started_at)
    if run.effects:
        state.effects += [asdict(effect) for effect in run.effects]
        run.effects.clear()


def finish_latent(
    state: ShotState, encoded: Mapping[str, Encoded], loras: Loras, stage1: Record
) -> tuple[Tensor, ShotRecord]:
    """The finished latent, now durable on disk, and all that the manifest will say of its making.

    Raises InjectionMissed where a rule did not reach the blocks it was planned for.
    """
    from wancli.sampling.denoise import check_hits

    shot = state.shot
    assert state.solver_state is not None
    check_hits(shot.table, frozenset(state.reads))
    z_CTYX = state.solver_state.x
    record = manifest_body.build_record(
        shot,
        cached={id: result.hit for id, result in encoded.items()},
        reads=state.reads,
        differences=state.differences,
        effects=state.effects,
        loras=loras,
        phases=[stage1, *state.phases],
        first_step_after=state.first_step_after,
        latent=metrics.sketch_latent(z_CTYX.numpy()),
    )
    atomic.move_aside(shot.latents)  # another shot's, or with --force this one's
    tensor_file.save_latent(shot.latents, z_CTYX, record.as_dict())
    atomic.remove(shot.state)
    state.solver_state = None
    return z_CTYX, record
