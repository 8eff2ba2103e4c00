"""`wancli probe` by velocities: a shot is sampled without its injections, and at some noise levels on its way
each block's text is changed.

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
from wancli.engine.encode_stage import embed
from wancli.engine.networks import Networks, check_device, check_weights
from wancli.errors import NotFinite
from wancli.injection.block_map import Map
from wancli.injection.contexts import Contexts
from wancli.injection.effects import relative
from wancli.injection.table import Cell, Text
from wancli.models.dit import WanModel
from wancli.models.dit_layers import Mix
from wancli.plan import backends
from wancli.probe import request, sensitivity
from wancli.probe.request import Survey
from wancli.probe.sensitivity import Place
from wancli.progress import Phase
from wancli.resources.measure import fitting
from wancli.sampling import denoise
from wancli.sampling.solvers import State
from wancli.sampling.stages import Stage
from wancli.text.encoder import Encoded


def measure(asked: Survey, tools: RenderContext) -> Map:
    """The map. Raises DoesNotFit where it needs more memory than there is, NotFinite, and Stopped where
    somebody asked for an end: what was measured is lost then."""
    shot, depth = asked.plain, asked.depth
    for device in {shot.model.device, shot.noise}:
        check_device(device)
    backends.check(shot.model)
    check_weights(shot.model.checkpoint)
    store = tools.store
    known = all(text.file or (store and store.path(text.id).exists()) for text in asked.texts)
    riders = request.riders(asked, encoded=known)
    with fitting("encode", f"shot {shot.id}"):
        encoded, _ = embed(shot.model, asked.texts, tools)
    rows: list[list[float]] = []
    seconds, passes = 0.0, _passes(asked)
    sampling = shot.riders * depth
    total = asked.levels[-1] * sampling + len(asked.levels) * passes
    # Tensors made in inference mode cannot take part in a derivative.
    without_gradients = torch.no_grad() if asked.method == "gradient" else torch.inference_mode()
    with (
        fitting("probe", f"shot {shot.id}"),
        without_gradients,
        tools.progress.phase("probe", [shot.id], total) as bar,
    ):
        for step, place in _way(asked, encoded, riders):
            if tools.stop.requested:
                raise tools.stop.error("nothing of the map is kept")
            if place is None:
                bar.advance(sampling, f"sampling step {step}")
                continue
            began = time.monotonic()
            rows.append(_values(asked, place, step, riders, bar, tools))
            seconds += time.monotonic() - began
    mean = [sum(column) / len(rows) for column in zip(*rows)]
    return request.found_map(asked, rows, mean, seconds, len(rows) * passes / depth)


def _passes(asked: Survey) -> int:
    """How many blocks run for one level. For a derivative those that run again, and those on the way back."""
    if asked.method == "gradient":
        return 3 * asked.depth
    return asked.depth + sum(asked.depth - min(blocks) for blocks in asked.ranges)


def _way(asked: Survey, encoded: Mapping[str, Encoded], riders: int) -> Iterator[tuple[int, Place | None]]:
    """The plain shot up to the last level: (step, where it is) before a step that is a level, and
    (step, None) after each step."""
    shot = asked.plain
    networks = Networks(shot.model)
    state = State(denoise.noise(shot.latent_shape, shot.seed, shot.noise)).to(shot.model.device)
    for stage in (stage for stage in shot.stages if stage.steps.start <= asked.levels[-1]):
        state = yield from _along(asked, stage, state, networks, encoded, riders)


def _along(
    asked: Survey,
    stage: Stage,
    state: State,
    networks: Networks,
    encoded: Mapping[str, Encoded],
    riders: int,
) -> Generator[tuple[int, Place | None], None, State]:
    """The steps of one network, which nothing names when they are over: another one takes its place."""
    shot, last = asked.plain, asked.levels[-1]
    loras = networks.loras(shot.loras)
    model = networks.transformer(stage.expert).requires_grad_(False)
    rows_NE = {id: one.embedding.rows_NE.to(shot.model.device) for id, one in encoded.items()}
    contexts = Contexts(model, rows_NE)
    for step in range(stage.steps.start, min(stage.steps.stop, last + 1)):
        if networks.patches.at(loras, step, stage.expert):
            contexts.forget()
        if step in asked.levels:
            yield step, _place(asked, model, contexts, state, step)
        if step < last:
            one = replace(stage, steps=range(step, step + 1))
            walk = denoise.Walk(state, shot.schedule, shot.solver, shot.table, contexts, one)
            (at,) = denoise.denoise(model, walk, shot.riders if riders > 1 else 1)
            state = at.state
            yield step, None
    return state


def _place(asked: Survey, model: WanModel, contexts: Contexts, state: State, step: int) -> Place:
    base = Text(asked.shot.prompt.id)
    cell: Cell = ((base, 1.0),)
    plain, injected = (
        [contexts.mix(one)] * asked.depth for one in (cell, asked.shot.rules[0].applied(cell, base, 1.0))
    )
    return Place(model, state.x[None], asked.shot.schedule.timesteps[step], plain, injected)


def _values(
    asked: Survey, place: Place, step: int, riders: int, bar: Phase, tools: RenderContext
) -> list[float]:
    """A value for each range at a level."""
    note = f"at step {step}"
    if asked.method == "gradient":
        values = _derived(asked, place, step, bar, note, tools)
    else:
        values = _changed(asked, place, riders, bar, note, tools)
    if not all(map(math.isfinite, values)):
        raise NotFinite(f"NaN or Inf at step {step}, cond branch", where=f"shot {asked.shot.id}")
    return values


def _changed(
    asked: Survey, place: Place, riders: int, bar: Phase, note: str, tools: RenderContext
) -> list[float]:
    """‖v' - v‖ / ‖v‖, v' being the velocity where a range reads the injected prompt, or nothing."""
    other: Sequence[Mix] = place.injected if asked.method == "inject" else [()] * asked.depth
    rows = [
        [other[b] if b in blocks else place.plain[b] for b in range(asked.depth)] for blocks in asked.ranges
    ]
    passes = [asked.depth - min(blocks) for blocks in asked.ranges] + [asked.depth]
    found: dict[int, Tensor] = {}
    for index, v_1CTYX in sensitivity.velocities(place, rows, riders):
        found[index] = v_1CTYX
        bar.advance(passes[index], note)
        if tools.stop.requested:
            raise tools.stop.error("nothing of the map is kept")
    return [relative(found[index], found[len(rows)]) for index in range(len(rows))]


def _derived(
    asked: Survey, place: Place, step: int, bar: Phase, note: str, tools: RenderContext
) -> list[float]:
    """How far the velocity moves by first order, from one random projection; see `size_of_change`."""
    generator = torch.Generator().manual_seed(asked.shot.seed + step)
    toward_1CTYX = torch.randn(place.x_1CTYX.shape, generator=generator).to(place.x_1CTYX.device)
    found: dict[int, Tensor] = {}
    for block, tensor in sensitivity.derivatives(place, toward_1CTYX):
        found[block] = tensor
        bar.advance(asked.depth if block == asked.depth else 2, note)
        if tools.stop.requested:
            raise tools.stop.error("nothing of the map is kept")
    of_ranges = [torch.stack([found[block] for block in blocks]).sum(0) for blocks in asked.ranges]
    return [sensitivity.size_of_change(by_s_L, found[asked.depth]) for by_s_L in of_ranges]
