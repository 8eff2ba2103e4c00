"""`wancli probe` by velocities: denoise a shot without its injections, and at some noise levels change the
text or the picture that each block reads.

Letters of shapes: C latent channels, T Y X the latent grid, L video tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from wancli.engine.context import RenderContext
from wancli.engine.encode_stage import encode_prompts
from wancli.engine.networks import Networks, check_weights, prepare_device
from wancli.engine.picture_stage import EncodedFrames, encode_frames
from wancli.errors import NotFinite
from wancli.injection.block_map import BlockMap
from wancli.injection.contexts import ContextCache, TokenAreas
from wancli.injection.effects import relative_change
from wancli.injection.table import apply_rule
from wancli.models.dit import WanModel
from wancli.models.dit_layers import Mix
from wancli.models.given_frames import NO_FRAMES, GivenFrames
from wancli.models.text_context import Context
from wancli.plan import backends
from wancli.plan.shot import Shot
from wancli.probe import request, sensitivity
from wancli.probe.parts import find_parts
from wancli.probe.request import Measured, ProbeRequest
from wancli.probe.sensitivity import ProbedRow, ProbePoint
from wancli.progress import Phase
from wancli.resources.measure import oom_as_error
from wancli.sampling import denoise
from wancli.sampling.solvers import State
from wancli.sampling.stages import Stage
from wancli.text.encoder import Encoded

Points: TypeAlias = Sequence[ProbePoint]  # one for each subject of the probe


@dataclass(frozen=True)
class LevelValues:
    """The value of each range at one level, and how many blocks read what was injected."""

    values: list[float]
    hits: int
    parts: dict[str, list[float]] | None = None  # the values of each part of the video


def measure(probe: ProbeRequest, context: RenderContext) -> BlockMap:
    """Measure a map. Raises DoesNotFit if that needs more memory than the limit, NotFinite, and Stopped after
    a stop request; the values measured so far are lost then."""
    shot, depth = probe.plain_shot, probe.depth
    for device in {shot.model.device, shot.noise}:
        prepare_device(device)
    backends.check_backends(shot.model)
    check_weights(shot.model.checkpoint)
    store = context.store
    all_cached = all(text.file or (store and store.has(text.id)) for text in probe.encoded_shot.prompts)
    forwards_per_pass = request.max_forwards_per_pass(probe, encoded=all_cached)
    with oom_as_error("encode", f"shot {shot.id}"):
        encoded, _ = encode_prompts(shot.model, probe.encoded_shot.prompts, context)
    networks = Networks(shot.model)
    frames, errors, _ = encode_frames([probe.encoded_shot], networks, context)
    if failed := errors.get(shot.index):
        assert failed.error
        raise failed.error
    given, clip_NE = _to_device(shot, frames[shot.index]) if shot.pictures else (NO_FRAMES, {})
    levels: list[list[LevelValues]] = []
    seconds, passes = 0.0, _blocks_per_level(probe)
    sampling = shot.forwards_per_step * depth
    total = probe.levels[-1] * sampling + len(probe.levels) * passes
    # Autograd cannot use tensors made in inference mode.
    without_gradients = torch.no_grad() if probe.method == "gradient" else torch.inference_mode()
    with (
        oom_as_error("probe", f"shot {shot.id}"),
        without_gradients,
        context.progress.phase("probe", [shot.id], total) as bar,
    ):
        for step, points in _trace(probe, networks, encoded, given, clip_NE, forwards_per_pass):
            if context.stop.requested:
                raise context.stop.error("no map was written")
            if points is None:
                bar.advance(sampling, f"sampling step {step}")
                continue
            began = time.monotonic()
            levels.append(_measure_level(probe, points, step, forwards_per_pass, bar, context))
            seconds += time.monotonic() - began
    measured = {
        subject.attended: _join_levels(of_subject)
        for subject, of_subject in zip(probe.subjects, zip(*levels), strict=True)
    }
    return request.build_map(probe, measured, seconds, len(levels) * passes / depth)


def _join_levels(levels: Sequence[LevelValues]) -> Measured:
    rows = [level.values for level in levels]
    hits = sum(level.hits for level in levels)
    parts: dict[str, list[float]] | None = None
    if levels[0].parts:
        parts = {name: _mean_of([(level.parts or {})[name] for level in levels]) for name in levels[0].parts}
    return Measured(rows, _mean_of(rows), hits, parts)


def _mean_of(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows)]


def _blocks_per_level(probe: ProbeRequest) -> int:
    """Return how many blocks run for one level. A derivative runs each block twice, and backwards once."""
    if probe.method == "gradient":
        return 3 * probe.depth * len(probe.subjects)
    return probe.depth + len(probe.subjects) * sum(probe.depth - min(blocks) for blocks in probe.ranges)


def _to_device(shot: Shot, encoded: EncodedFrames) -> tuple[GivenFrames, dict[str, Tensor]]:
    """Copy the given frames and the CLIP rows of a shot to its device, as tensors that gradients may pass."""
    device = shot.model.device
    rows = {id: rows_NE.to(device, copy=True) for id, rows_NE in encoded.clip_NE.items()}
    return encoded.frames.to(device, copy=True), rows


def _trace(
    probe: ProbeRequest,
    networks: Networks,
    encoded: Mapping[str, Encoded],
    given: GivenFrames,
    clip_NE: Mapping[str, Tensor],
    forwards_per_pass: int,
) -> Iterator[tuple[int, Points | None]]:
    """Denoise the plain shot up to the last level. Yields (step, points) before a step that is a level, and
    (step, None) after each step."""
    shot = probe.plain_shot
    state = State(denoise.draw_noise(shot.latent_shape, shot.seed, shot.noise)).to(shot.model.device)
    for stage in (stage for stage in shot.stages if stage.steps.start <= probe.levels[-1]):
        state = yield from _trace_stage(
            probe, stage, state, networks, encoded, given, clip_NE, forwards_per_pass
        )


def _trace_stage(
    probe: ProbeRequest,
    stage: Stage,
    state: State,
    networks: Networks,
    encoded: Mapping[str, Encoded],
    given: GivenFrames,
    clip_NE: Mapping[str, Tensor],
    forwards_per_pass: int,
) -> Generator[tuple[int, Points | None], None, State]:
    """Denoise the steps of one network. Keeps no reference to it afterwards, so that the next one fits."""
    shot, last = probe.plain_shot, probe.levels[-1]
    loras = networks.loras(shot.loras)
    model = networks.transformer(stage.expert).requires_grad_(False)
    rows_NE = {id: prompt.embedding.rows_NE.to(shot.model.device) for id, prompt in encoded.items()}
    contexts = ContextCache(model, rows_NE, clip_NE)
    for step in range(stage.steps.start, min(stage.steps.stop, last + 1)):
        if networks.patches.apply_step(loras, step, stage.expert):
            contexts.clear()
        if step in probe.levels:
            yield step, _probe_points(probe, model, contexts, state, step, given)
        if step < last:
            single_step = replace(stage, steps=range(step, step + 1))
            run = denoise.DenoiseRun(
                state, shot.sigma_schedule, shot.solver, shot.table, contexts, single_step, given=given
            )
            (sampled,) = denoise.denoise(model, run, shot.forwards_per_step if forwards_per_pass > 1 else 1)
            state = sampled.state
            yield step, None
    return state


def _probe_points(
    probe: ProbeRequest,
    model: WanModel,
    contexts: ContextCache,
    state: State,
    step: int,
    given: GivenFrames,
) -> Points:
    """Return the point of each subject. They differ in what is injected."""
    table, areas = probe.shot.table, TokenAreas.of_latent(state.x)
    x_1CTYX, t = given.put_into(state.x)[None], probe.shot.sigma_schedule.timesteps[step]
    cell = table.base_cell("cond")
    plain = [contexts.mix(cell, areas)] * probe.depth
    points = []
    for subject in probe.subjects:
        base = table.image if subject.rule.image else table.base["cond"]
        assert base is not None
        injected = [contexts.mix(apply_rule(subject.rule, cell, base, 1.0), areas)] * probe.depth
        points.append(ProbePoint(model, x_1CTYX, t, plain, injected, given))
    return points


def _measure_level(
    probe: ProbeRequest,
    points: Points,
    step: int,
    forwards_per_pass: int,
    bar: Phase,
    context: RenderContext,
) -> list[LevelValues]:
    """Measure the value of each range at one level, of each subject. Raises NotFinite."""
    note = f"at step {step}"
    if probe.method == "gradient":
        found = [_estimate_changes(probe, point, step, bar, note, context) for point in points]
    else:
        found = _measure_changes(probe, points, forwards_per_pass, bar, note, context)
    if not all(math.isfinite(value) for level in found for value in level.values):
        raise NotFinite(f"NaN or Inf at step {step}, cond branch", where=f"shot {probe.shot.id}")
    return found


def _measure_changes(
    probe: ProbeRequest,
    points: Points,
    forwards_per_pass: int,
    bar: Phase,
    note: str,
    context: RenderContext,
) -> list[LevelValues]:
    """Measure ‖v' - v‖ / ‖v‖ for each range and subject, v' with the injected prompt or picture in the range,
    or without the prompt or the pictures of the shot.
    """
    rows: list[ProbedRow] = []
    for subject, point in zip(probe.subjects, points, strict=True):
        kept = [
            tuple(part for part in mix if isinstance(part[0], Context) and part[0].of != subject.attended)
            for mix in point.plain
        ]
        other: Sequence[Mix] = point.injected if probe.method == "inject" else kept
        rows += [ProbedRow(point.plain, other, blocks) for blocks in probe.ranges]
    passes = [probe.depth - min(blocks) for blocks in probe.ranges] * len(points) + [probe.depth]
    velocities: dict[int, Tensor] = {}
    for index, v_1CTYX in sensitivity.predict_velocities(points[0], rows, forwards_per_pass):
        velocities[index] = v_1CTYX
        bar.advance(passes[index], note)
        if context.stop.requested:
            raise context.stop.error("no map was written")
    plain_1CTYX = velocities.pop(len(rows))
    width, found = len(probe.ranges), []
    for start in range(0, len(rows), width):
        of_subject = range(start, start + width)
        values = [relative_change(velocities[index], plain_1CTYX) for index in of_subject]
        parts = {
            name: [
                relative_change(velocities[index][..., cells_TYX], plain_1CTYX[..., cells_TYX])
                for index in of_subject
            ]
            for name, cells_TYX in _find_parts(probe, plain_1CTYX.device).items()
        }
        found.append(LevelValues(values, sum(rows[index].hits for index in of_subject), parts or None))
    return found


def _find_parts(probe: ProbeRequest, device: torch.device) -> dict[str, Tensor]:
    """Return by name which cells belong to each part that the probe tells apart, [T, Y, X]."""
    if probe.by is None:
        return {}
    cells = find_parts(probe.by, probe.shot)
    return {name: torch.from_numpy(cells_TYX).to(device) for name, cells_TYX in cells.items()}


def _estimate_changes(
    probe: ProbeRequest, point: ProbePoint, step: int, bar: Phase, note: str, context: RenderContext
) -> LevelValues:
    """Estimate the first-order change for each range from one random projection; see `estimate_change`."""
    generator = torch.Generator().manual_seed(probe.shot.seed + step)
    toward_1CTYX = torch.randn(point.x_1CTYX.shape, generator=generator).to(point.x_1CTYX.device)
    derivatives: dict[int, Tensor] = {}
    for block, tensor in sensitivity.compute_derivatives(point, toward_1CTYX):
        derivatives[block] = tensor
        bar.advance(probe.depth if block == probe.depth else 2, note)
        if context.stop.requested:
            raise context.stop.error("no map was written")
    v_1CTYX = derivatives.pop(probe.depth)
    by_range = [torch.stack([derivatives[block] for block in blocks]).sum(0) for blocks in probe.ranges]
    values = [sensitivity.estimate_change(by_s_L, v_1CTYX) for by_s_L in by_range]
    return LevelValues(values, len(derivatives))
