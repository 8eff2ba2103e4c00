"""Stage 2: noise to latent, one yield per step.

Letters of shapes: C latent channels, T latent frames, Y X the latent grid, N E a prompt's rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wancli.errors import InjectionMissed, NotFinite
from wancli.injection.contexts import BlockContexts, ContextCache, Effect, Forward
from wancli.injection.effects import velocities
from wancli.injection.table import Branch, Table
from wancli.models.dit import WanModel
from wancli.sampling.solvers import SOLVERS, SigmaSchedule, State
from wancli.sampling.stages import Stage


def noise(shape_CTYX: tuple[int, ...], seed: int, device: str = "cpu") -> Tensor:
    """The starting latent, fp32. Drawn on the CPU a seed means the same on every machine."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape_CTYX, generator=generator, device=device, dtype=torch.float32)


@dataclass(frozen=True)
class Sampled:
    """What one step left: the solver's state before step `step`, and the cells the model read."""

    step: int
    state: State
    read: frozenset[tuple[int, Branch, int]]


@dataclass(frozen=True)
class Walk:
    """The steps of one stage of a shot: where it starts, and what its blocks read at each step.

    v = v_uncond + guidance·(v_cond - v_uncond), cond first; a step without an uncond branch takes
    v_cond as it is. `effects` asks for injections to be measured, and receives what is found.
    """

    state: State
    schedule: SigmaSchedule
    solver: str
    table: Table
    contexts: ContextCache
    stage: Stage
    effects: list[Effect] | None = None


def denoise(model: WanModel, walk: Walk, riders: int = 1) -> Iterator[Sampled]:
    """Walks the steps of one stage; yields after every step. After the last step of the schedule the
    state holds the finished latent.

    Raises NotFinite naming step, branch and block. `riders` as in `denoise_together`.
    """
    for (result,) in denoise_together(model, [walk], riders):
        if isinstance(result, NotFinite):
            raise result
        yield result


def denoise_together(
    model: WanModel, walks: Sequence[Walk], riders: int
) -> Iterator[list[Sampled | NotFinite]]:
    """Several walks of the same steps in lock-step, each as if alone; yields after every step how each is.

    `riders` forwards share a pass over the blocks: 1 where the weights are at hand, for sharing gains
    nothing then, and each rider keeps a residual stream; as many as fit where a pass fetches weights.
    A walk that met NaN or Inf is at NotFinite from then on. Raises ValueError for walks of other steps.
    """
    steps = walks[0].stage.steps
    if any(walk.stage.steps != steps for walk in walks):
        several = sorted({len(walk.stage.steps) for walk in walks})
        raise ValueError(f"walks of {several} steps cannot go in lock-step")
    now: list[Sampled | NotFinite] = [Sampled(steps.start, walk.state, frozenset()) for walk in walks]
    for i in steps:
        asked = [_asked(walk, at, i) for walk, at in zip(walks, now)]
        answers = iter(velocities(model, [forward for forwards in asked for forward in forwards], riders))
        now = [
            _stepped(model, walk, at, i, [(forward, next(answers)) for forward in forwards])
            for walk, at, forwards in zip(walks, now, asked)
        ]
        yield now


def _asked(walk: Walk, at: Sampled | NotFinite, i: int) -> list[Forward]:
    if isinstance(at, NotFinite):
        return []
    x_1CTYX, t = at.state.x[None], walk.schedule.timesteps[i]
    reads = [BlockContexts(walk.contexts, walk.table, i, branch) for branch in walk.table.branches_at(i)]
    return [Forward(x_1CTYX, t, contexts, walk.effects) for contexts in reads]


def _stepped(
    model: WanModel, walk: Walk, at: Sampled | NotFinite, i: int, answers: Sequence[tuple[Forward, Tensor]]
) -> Sampled | NotFinite:
    """Where the walk is after step i."""
    if isinstance(at, NotFinite):
        return at
    try:
        return _step(model, walk, at, i, answers)
    except NotFinite as error:  # raised, so that it carries the stack that --log-level trace shows
        return error


def _step(
    model: WanModel, walk: Walk, at: Sampled, i: int, answers: Sequence[tuple[Forward, Tensor]]
) -> Sampled:
    found = {forward.contexts.branch: v_1CTYX[0] for forward, v_1CTYX in answers}
    v_CTYX = found["cond"]
    if "uncond" in found:
        v_CTYX = found["uncond"] + walk.stage.guidance * (v_CTYX - found["uncond"])
    state = SOLVERS[walk.solver].step(walk.schedule.sigmas, i, at.state, v_CTYX)
    if not torch.isfinite(state.x).all():
        hint = "`wancli inspect --deep` looks for them in the weights; in fp16 they may be overflows."
        raise NotFinite(_blame(model, walk, at.state.x, i), hint=hint)
    cells = frozenset(cell for forward, _ in answers for cell in forward.contexts.cells_read)
    return Sampled(i + 1, state, cells)


def _blame(model: WanModel, walk: Walk, x_CTYX: Tensor, step: int) -> str:
    """Runs the bad step again, block by block, to say where the first NaN or Inf comes from."""
    for forward in _asked(walk, Sampled(step, State(x_CTYX), frozenset()), step):
        stream = model.residuals(forward.x_BCTYX, forward.t, forward.contexts)
        for block, x_BLD in enumerate(stream):
            if not torch.isfinite(x_BLD).all():
                return f"NaN or Inf at step {step}, {forward.contexts.branch} branch, first in block {block}"
    return f"NaN or Inf at step {step}, after the last block"


def check_hits(table: Table, read: frozenset[tuple[int, Branch, int]]) -> None:
    """Raises InjectionMissed when a cell that a rule changed was never read by its block."""
    for index, reached in enumerate(table.changed_cells):
        missed = [cell for cell in reached if cell not in read]
        if missed:
            raise InjectionMissed(
                f"inject.{index} reached {len(reached) - len(missed)} of {len(reached)} planned cells",
                hint="This render would not show the injection, so it is not kept.",
            )
