"""`wancli probe` by velocities: denoise a shot without its injections, and at some noise levels change the
text that each block reads.

Letters of shapes: C latent channels, T Y X the latent grid, L video tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace

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
from wancli.injection.table import Text, apply_rule
from wancli.models.dit import WanModel
from wancli.models.dit_layers import Mix
from wancli.models.given_frames import NO_FRAMES, GivenFrames
from wancli.models.text_context import Context
from wancli.plan import backends
from wancli.plan.shot import Shot
from wancli.probe import request, sensitivity
from wancli.probe.request import ProbeRequest
from wancli.probe.sensitivity import ProbePoint
from wancli.progress import Phase
from wancli.resources.measure import oom_as_error
from wancli.sampling import denoise
from wancli.sampling.solvers import State
from wancli.sampling.stages import Stage
from wancli.text.encoder import Encoded


def measure(probe: ProbeRequest, context: RenderContext) -> BlockMap:
    """Measure a map. Raises DoesNotFit if that needs more memory than the limit, NotFinite, and Stopped after
    a stop request; the values measured so far are lost then."""
    shot, depth = probe.plain_shot, probe.depth
    for device in {shot.model.device, shot.noise}:
        prepare_device(device)
    backends.check_backends(shot.model)
    check_weights(shot.model.checkpoint)
    store = context.store
    all_cached = all(text.file or (store and store.has(text.id)) for text in probe.texts)
    forwards_per_pass = request.max_forwards_per_pass(probe, encoded=all_cached)
    with oom_as_error("encode", f"shot {shot.id}"):
        encoded, _ = encode_prompts(shot.model, probe.texts, context)
    networks = Networks(shot.model)
    frames, errors, _ = encode_frames([shot], networks, context)
    if failed := errors.get(shot.index):
        assert failed.error
        raise failed.error
    given, clip_NE = _to_device(shot, frames[shot.index]) if shot.pictures else (NO_FRAMES, {})
    rows: list[list[float]] = []
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
        for step, point in _trace(probe, networks, encoded, given, clip_NE, forwards_per_pass):
            if context.stop.requested:
                raise context.stop.error("no map was written")
            if point is None:
                bar.advance(sampling, f"sampling step {step}")
                continue
            began = time.monotonic()
            rows.append(_measure_level(probe, point, step, forwards_per_pass, bar, context))
            seconds += time.monotonic() - began
    mean = [sum(column) / len(rows) for column in zip(*rows)]
    return request.build_map(probe, rows, mean, seconds, len(rows) * passes / depth)


def _blocks_per_level(probe: ProbeRequest) -> int:
    """Return how many blocks run for one level. A derivative runs each block twice, and backwards once."""
    if probe.method == "gradient":
        return 3 * probe.depth
    return probe.depth + sum(probe.depth - min(blocks) for blocks in probe.ranges)


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
) -> Iterator[tuple[int, ProbePoint | None]]:
    """Denoise the plain shot up to the last level. Yields (step, point) before a step that is a level, and
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
) -> Generator[tuple[int, ProbePoint | None], None, State]:
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
            yield step, _probe_point(probe, model, contexts, state, step, given)
        if step < last:
            single_step = replace(stage, steps=range(step, step + 1))
            run = denoise.DenoiseRun(
                state, shot.sigma_schedule, shot.solver, shot.table, contexts, single_step, given=given
            )
            (sampled,) = denoise.denoise(model, run, shot.forwards_per_step if forwards_per_pass > 1 else 1)
            state = sampled.state
            yield step, None
    return state


def _probe_point(
    probe: ProbeRequest,
    model: WanModel,
    contexts: ContextCache,
    state: State,
    step: int,
    given: GivenFrames,
) -> ProbePoint:
    base, cell = Text(probe.shot.prompt.id), probe.shot.table.base_cell("cond")
    areas, cells = TokenAreas.of_latent(state.x), (cell, apply_rule(probe.rule, cell, base, 1.0))
    plain, injected = ([contexts.mix(one, areas)] * probe.depth for one in cells)
    x_CTYX, t = given.put_into(state.x), probe.shot.sigma_schedule.timesteps[step]
    return ProbePoint(model, x_CTYX[None], t, plain, injected, given)


def _measure_level(
    probe: ProbeRequest,
    point: ProbePoint,
    step: int,
    forwards_per_pass: int,
    bar: Phase,
    context: RenderContext,
) -> list[float]:
    """Measure the value of each range at one level. Raises NotFinite."""
    note = f"at step {step}"
    if probe.method == "gradient":
        values = _estimate_changes(probe, point, step, bar, note, context)
    else:
        values = _measure_changes(probe, point, forwards_per_pass, bar, note, context)
    if not all(map(math.isfinite, values)):
        raise NotFinite(f"NaN or Inf at step {step}, cond branch", where=f"shot {probe.shot.id}")
    return values


def _measure_changes(
    probe: ProbeRequest,
    point: ProbePoint,
    forwards_per_pass: int,
    bar: Phase,
    note: str,
    context: RenderContext,
) -> list[float]:
    """Measure ‖v' - v‖ / ‖v‖ for each range, v' with the injected prompt in the range, or with no text."""
    pictures = [
        tuple(
            (context, weight)
            for context, weight in mix
            if isinstance(context, Context) and context.of == "image"
        )
        for mix in point.plain
    ]
    other: Sequence[Mix] = point.injected if probe.method == "inject" else pictures
    rows = [
        [other[b] if b in blocks else point.plain[b] for b in range(probe.depth)] for blocks in probe.ranges
    ]
    passes = [probe.depth - min(blocks) for blocks in probe.ranges] + [probe.depth]
    velocities: dict[int, Tensor] = {}
    for index, v_1CTYX in sensitivity.predict_velocities(point, rows, forwards_per_pass):
        velocities[index] = v_1CTYX
        bar.advance(passes[index], note)
        if context.stop.requested:
            raise context.stop.error("no map was written")
    return [relative_change(velocities[index], velocities[len(rows)]) for index in range(len(rows))]


def _estimate_changes(
    probe: ProbeRequest, point: ProbePoint, step: int, bar: Phase, note: str, context: RenderContext
) -> list[float]:
    """Estimate the first-order change for each range from one random projection; see `estimate_change`."""
    generator = torch.Generator().manual_seed(probe.shot.seed + step)
    toward_1CTYX = torch.randn(point.x_1CTYX.shape, generator=generator).to(point.x_1CTYX.device)
    derivatives: dict[int, Tensor] = {}
    for block, tensor in sensitivity.compute_derivatives(point, toward_1CTYX):
        derivatives[block] = tensor
        bar.advance(probe.depth if block == probe.depth else 2, note)
        if context.stop.requested:
            raise context.stop.error("no map was written")
    by_range = [torch.stack([derivatives[block] for block in blocks]).sum(0) for blocks in probe.ranges]
    return [sensitivity.estimate_change(by_s_L, derivatives[probe.depth]) for by_s_L in by_range]
