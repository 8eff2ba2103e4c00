"""The denoise stage, segment by segment: steps that one network takes for some shots together.

A segment ends where the expert changes, where a shot forks or catches up with others of its batch, or with
the last step.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from wancli.engine import attention_stage, manifest_body, picture_stage
from wancli.engine.context import RenderContext
from wancli.engine.manifest_body import Record
from wancli.engine.networks import Networks
from wancli.engine.picture_stage import EncodedFrames
from wancli.engine.shot_state import ShotState, Status, is_save_due, propagate_state, save_state
from wancli.errors import ErrorCapture, NotFinite
from wancli.models.config import Expert
from wancli.plan.render_plan import format_shots
from wancli.plan.schedule import Placement
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


@dataclass(frozen=True)
class Segment:
    """Steps that the network of one expert takes for some shots of a batch together."""

    states: tuple[ShotState, ...]
    expert: Expert
    steps: range

    @property
    def label(self) -> str:
        """The name of its shots, for people."""
        return format_shots([state.shot for state in self.states])


def next_segment(batch: Sequence[ShotState], expert: Expert) -> Segment | None:
    """Return the next steps that an expert can take for a batch: those of the shots that are least far."""
    found = [(state, state.next_stage) for state in batch if state.status is Status.RUNNING]
    ready = [(state, stage) for state, stage in found if stage and stage.expert == expert]
    if not ready:
        return None
    start, stage = min(((state.step, stage) for state, stage in ready), key=lambda pair: pair[0])
    states = tuple(state for state, _ in ready if state.step == start)
    ahead = [state.step for state in batch if state.failure is None]
    forks = [dependent.fork.step for state in states for dependent in state.dependents if dependent.fork]
    stop = min(step for step in (stage.steps.stop, *ahead, *forks) if step > start)
    return Segment(states, expert, range(start, stop))


def run_segment(
    segment: Segment,
    networks: Networks,
    encoded: Mapping[str, Encoded],
    frames: Mapping[int, EncodedFrames],
    context: RenderContext,
) -> None:
    """Take the steps of a segment, and pass the states on to the shots that fork at its end.

    Takes fewer steps after a stop request. A shot that meets NaN or Inf fails and ends the segment; the other
    shots continue in the next.
    """
    import torch

    from wancli.injection.contexts import ContextCache
    from wancli.sampling import denoise

    states, steps = segment.states, segment.steps
    stages = [replace(stage, steps=steps) for state in states if (stage := state.next_stage)]
    shot = states[0].shot
    loras = networks.loras(shot.loras)
    # Without a name that outlives this call, which would keep this expert in memory beside the next.
    (model, load_record), patches = networks.load(segment.expert), networks.patches
    dependents = [dependent for state in states for dependent in state.all_dependents()]
    prompts = {prompt.id for state in (*states, *dependents) for prompt in state.shot.prompts}
    rows_NE = {id: encoded[id].embedding.rows_NE.to(shot.model.device) for id in prompts}

    def segment_phases() -> list[Record]:
        shots = len(states) + len(dependents)
        return [load_record, manifest_body.phase_record("sample", peak) | {"shots": shots}]

    with (
        torch.inference_mode(),
        PeakMemory() as peak,
        context.progress.phase("sample", [state.shot.id for state in states], len(steps)) as bar,
    ):
        patches.apply_step(loras, steps[0], segment.expert)
        contexts = ContextCache(model, rows_NE, _clip_rows(states, dependents, frames))
        _prepare(states, dependents, model, encoded)
        runs = [_make_run(state, stage, contexts, frames) for state, stage in zip(states, stages)]
        results = denoise.denoise_batch(model, runs, _forwards_per_pass(states))
        for step in steps:
            if context.stop.requested:
                break
            for state, run, result in zip(states, runs, next(results)):
                _record_step(state, run, result, context)
            bar.advance(note=f"sigma {runs[0].schedule.sigmas[step + 1]:.3f}")
            if any(state.failure for state in states) or context.lost_claim:
                break  # failures are reported before the other shots continue
            if step + 1 in steps:
                for state in states:
                    if is_save_due(state):
                        peak.update()
                        save_state(state, segment_phases())
                if patches.apply_step(loras, step + 1, segment.expert):
                    contexts.clear()
    for state in states:
        state.move_to_host()
        state.add_phases(segment_phases())
        propagate_state(state)


def _clip_rows(
    states: Sequence[ShotState], dependents: Sequence[ShotState], frames: Mapping[int, EncodedFrames]
) -> dict[str, Tensor]:
    """Return the CLIP rows of the pictures of shots by id, on their device."""
    rows_NE = {}
    for shot in (state.shot for state in (*states, *dependents)):
        for id, clip_NE in frames[shot.index].clip_NE.items() if shot.clip_pictures else ():
            if id not in rows_NE:
                rows_NE[id] = clip_NE.to(shot.model.device)
    return rows_NE


def _forwards_per_pass(states: Sequence[ShotState]) -> int:
    """Return how many forwards share a pass over the blocks: all, if the pass fetches weights."""
    resident = states[0].shot.model.residency == "resident"
    return 1 if resident else sum(state.shot.forwards_per_step for state in states)


def _prepare(
    states: Sequence[ShotState],
    dependents: Sequence[ShotState],
    model: WanModel,
    encoded: Mapping[str, Encoded],
) -> None:
    """Draw noise, note the time, and measure how different the injected prompts are.

    The network of the first step measures it, so for the dependents, too, which fork later.
    """
    from wancli.injection.attention_maps import AttentionMaps
    from wancli.sampling import denoise
    from wancli.text.prompt_distance import compare_all

    now = time.monotonic()
    for state in states:
        shot = state.shot
        state.started_at, state.unsaved_since = min(state.started_at, now), min(state.unsaved_since, now)
        if state.solver_state is None:
            state.solver_state = State(denoise.draw_noise(shot.latent_shape, shot.seed, shot.noise))
            if shot.attention:
                state.attention = AttentionMaps.zeros(shot.attention, shot.tokens)
    new = [state for state in (*states, *dependents) if state.shot.injected_prompts and not state.differences]
    pairs = {(state.shot.prompt.id, text.id): None for state in new for text in state.shot.injected_prompts}
    embeddings = [(encoded[main].embedding, encoded[other].embedding) for main, other in pairs]
    differences = dict(zip(pairs, compare_all(embeddings, model)))
    for state in new:
        prompt, injected = state.shot.prompt, state.shot.injected_prompts
        state.differences = [differences[prompt.id, text.id].as_dict() for text in injected]


def _make_run(
    state: ShotState, stage: Stage, contexts: ContextCache, frames: Mapping[int, EncodedFrames]
) -> DenoiseRun:
    from wancli.models.given_frames import NO_FRAMES
    from wancli.sampling import denoise

    assert state.solver_state is not None
    shot, solver_state = state.shot, state.solver_state.to(state.shot.model.device)
    effects: list[Effect] | None = [] if shot.measure else None
    given = frames[shot.index].frames.to(shot.model.device) if shot.pictures else NO_FRAMES
    maps = state.attention and state.attention.to(shot.model.device)
    residuals = {branch: kept.to(shot.model.device) for branch, kept in state.residuals.items()}
    return denoise.DenoiseRun(
        solver_state,
        shot.sigma_schedule,
        shot.solver,
        shot.table,
        contexts,
        stage,
        effects,
        given,
        maps,
        shot.reused,
        residuals,
    )


def _record_step(
    state: ShotState, run: DenoiseRun, result: StepResult | NotFinite, context: RenderContext
) -> None:
    """Record what a step has left."""
    if isinstance(result, NotFinite):
        failure = ErrorCapture()
        failure.record(result)
        state.fail(failure)
        return
    state.step, state.solver_state, state.attention = result.step, result.state, result.attention
    state.residuals = result.residuals
    state.reads |= result.cells_read
    state.first_step_after = state.first_step_after or manifest_body.seconds_since(context.started_at)
    if run.effects:
        state.effects += [asdict(effect) for effect in run.effects]
        run.effects.clear()


def finish_latent(
    state: ShotState,
    placement: Placement,
    encoded: Mapping[str, Encoded],
    frames: Mapping[int, EncodedFrames],
    loras: Loras,
    stage1: Sequence[Record],
) -> tuple[Tensor, ShotRecord]:
    """Put the finished latent durably on disk; return it and its record.

    Raises InjectionMissed if a rule did not reach the blocks it was planned for.
    """
    from wancli.sampling.denoise import check_hits

    shot = state.shot
    assert state.solver_state is not None
    check_hits(shot.table, frozenset(state.reads), shot.reused)
    z_CTYX = state.solver_state.x
    maps = attention_stage.write_maps(shot.attention_maps, state.attention, shot) if state.attention else None
    record = manifest_body.build_record(
        shot,
        placement,
        cached={id: result.hit for id, result in encoded.items()},
        pictures=picture_stage.picture_records(shot, frames),
        injected_pictures=picture_stage.injected_records(shot, frames),
        reads=state.reads,
        differences=state.differences,
        effects=state.effects,
        loras=loras,
        phases=[*(phase for phase in stage1 if shot.pictures or phase["name"] != "pictures"), *state.phases],
        first_step_after=state.first_step_after,
        latent=metrics.sketch_latent(z_CTYX.numpy()),
        attention=maps,
    )
    atomic.move_aside(shot.latents)  # another shot's, or with --force this one's
    tensor_file.save_latent(shot.latents, z_CTYX, record.as_dict())
    atomic.remove(shot.state)
    state.status, state.solver_state, state.attention = Status.FINISHED, None, None
    return z_CTYX, record
