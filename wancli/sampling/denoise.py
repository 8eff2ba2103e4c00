"""Denoise a latent step by step: noise to latent, one yield per step.

Letters of shapes: C latent channels, T latent frames, Y X the latent grid, N E a prompt's rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from wancli.errors import InjectionMissed, NotFinite
from wancli.injection.attention_maps import AttentionMaps
from wancli.injection.contexts import BlockContexts, ContextCache, Effect, Forward, TokenAreas
from wancli.injection.effects import predict_velocities
from wancli.injection.exprs import Branch
from wancli.injection.record_attention import record_attention
from wancli.injection.table import Table
from wancli.models.dit import WanModel
from wancli.models.given_frames import NO_FRAMES, GivenFrames
from wancli.sampling.solvers import SOLVERS, SigmaSchedule, State
from wancli.sampling.stages import Stage


def draw_noise(shape_CTYX: tuple[int, ...], seed: int, device: str = "cpu") -> Tensor:
    """Draw the starting latent in fp32. On the CPU a seed gives the same latent on every machine."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape_CTYX, generator=generator, device=device, dtype=torch.float32)


@dataclass(frozen=True)
class StepResult:
    """The result of a step: the solver's state before step `step`, the cells that the model read, and the
    attention maps of all steps so far.
    """

    step: int
    state: State
    cells_read: frozenset[tuple[int, Branch, int]]
    attention: AttentionMaps | None = None


@dataclass(frozen=True)
class DenoiseRun:
    """The inputs of denoising one stage of one shot: its state, its steps, and what its blocks read.

    v = v_uncond + guidance·(v_cond - v_uncond), cond first; a step without an uncond branch takes
    v_cond as it is. If `effects` is a list, injections are measured and their effects appended to it. The
    attention maps of the cond branch are added to `attention`, if there is some. It and the given frames are
    on the device of the state; given frames are the same in both branches.
    """

    state: State
    schedule: SigmaSchedule
    solver: str
    table: Table
    contexts: ContextCache
    stage: Stage
    effects: list[Effect] | None = None
    given: GivenFrames = NO_FRAMES
    attention: AttentionMaps | None = None

    @cached_property
    def areas(self) -> TokenAreas:
        """The areas of the table's rules, as weights of the tokens of this latent."""
        return TokenAreas.of_latent(self.state.x)


def denoise(model: WanModel, run: DenoiseRun, forwards_per_pass: int = 1) -> Iterator[StepResult]:
    """Denoise one stage of one run alone, as the probe does, and yield after every step.

    After the last step of the schedule the state holds the finished latent. `forwards_per_pass` is that of
    `denoise_batch`. Raises NotFinite, which names step, branch and block.
    """
    for (result,) in denoise_batch(model, [run], forwards_per_pass):
        if isinstance(result, NotFinite):
            raise result
        yield result


def denoise_batch(
    model: WanModel, runs: Sequence[DenoiseRun], forwards_per_pass: int
) -> Iterator[list[StepResult | NotFinite]]:
    """Denoise a batch of runs with the same steps, each as if alone; yield all results after every step.

    `forwards_per_pass` forwards share a pass over the blocks. Use 1 if weights are in memory: sharing gains
    nothing then, and each forward keeps a residual stream. Use as many as fit if a pass fetches weights.
    A run that met NaN or Inf yields NotFinite from then on. Raises ValueError if the steps of runs differ.
    """
    steps = runs[0].stage.steps
    if any(run.stage.steps != steps for run in runs):
        step_counts = sorted({len(run.stage.steps) for run in runs})
        raise ValueError(f"runs of {step_counts} steps cannot be batched")
    results: list[StepResult | NotFinite] = [
        StepResult(steps.start, _put_given(run, run.state), frozenset(), run.attention) for run in runs
    ]
    for i in steps:
        forwards_per_run = [_build_forwards(run, result, i) for run, result in zip(runs, results)]
        batch = [forward for forwards in forwards_per_run for forward in forwards]
        with record_attention(model, batch):
            velocities = iter(predict_velocities(model, batch, forwards_per_pass))
        results = [
            _take_step(model, run, result, i, [(forward, next(velocities)) for forward in forwards])
            for run, result, forwards in zip(runs, results, forwards_per_run)
        ]
        yield results


def _build_forwards(run: DenoiseRun, result: StepResult | NotFinite, i: int) -> list[Forward]:
    if isinstance(result, NotFinite):
        return []
    x_1CTYX, t = result.state.x[None], run.schedule.timesteps[i]
    branches = run.table.branches_at(i)
    reads = [BlockContexts(run.contexts, run.table, run.areas, i, branch) for branch in branches]
    maps = result.attention.copy() if result.attention else None
    return [
        Forward(x_1CTYX, t, contexts, run.given, run.effects, maps if contexts.branch == "cond" else None)
        for contexts in reads
    ]


def _put_given(run: DenoiseRun, state: State) -> State:
    """Return the state with the given first frames in its latent. What the history of the solver holds there
    does not matter: a solver computes each element from itself.
    """
    return replace(state, x=run.given.put_into(state.x))


def _take_step(
    model: WanModel,
    run: DenoiseRun,
    result: StepResult | NotFinite,
    i: int,
    outputs: Sequence[tuple[Forward, Tensor]],
) -> StepResult | NotFinite:
    """Return the result of a run after step i."""
    if isinstance(result, NotFinite):
        return result
    try:
        return _solve_step(model, run, result, i, outputs)
    except NotFinite as error:  # raised, so that it carries the stack that --log-level trace shows
        return error


def _solve_step(
    model: WanModel, run: DenoiseRun, result: StepResult, i: int, outputs: Sequence[tuple[Forward, Tensor]]
) -> StepResult:
    by_branch = {forward.contexts.branch: v_1CTYX[0] for forward, v_1CTYX in outputs}
    v_CTYX = by_branch["cond"]
    if "uncond" in by_branch:
        v_CTYX = by_branch["uncond"] + run.stage.guidance * (v_CTYX - by_branch["uncond"])
    state = _put_given(run, SOLVERS[run.solver].step(run.schedule.sigmas, i, result.state, v_CTYX))
    if not torch.isfinite(state.x).all():
        hint = "`wancli inspect --deep` looks for them in the weights; in fp16 they may be overflows."
        raise NotFinite(_locate_nonfinite(model, run, result.state.x, i), hint=hint)
    cells = frozenset(cell for forward, _ in outputs for cell in forward.contexts.cells_read)
    maps = next(forward.attention for forward, _ in outputs if forward.contexts.branch == "cond")
    return StepResult(i + 1, state, cells, maps)


def _locate_nonfinite(model: WanModel, run: DenoiseRun, x_CTYX: Tensor, step: int) -> str:
    """Run the failed step again, block by block, and describe where the first NaN or Inf appears."""
    for forward in _build_forwards(run, StepResult(step, State(x_CTYX), frozenset()), step):
        residuals = model.iterate_residuals(forward.x_BCTYX, forward.t, forward.contexts, forward.given)
        for block, x_BLD in enumerate(residuals):
            if not torch.isfinite(x_BLD).all():
                return f"NaN or Inf at step {step}, {forward.contexts.branch} branch, first in block {block}"
    return f"NaN or Inf at step {step}, after the last block"


def check_hits(table: Table, cells_read: frozenset[tuple[int, Branch, int]]) -> None:
    """Raise InjectionMissed if a cell that a rule changed was never read by its block."""
    for name, planned in zip(table.names, table.changed_cells, strict=True):
        missed = [cell for cell in planned if cell not in cells_read]
        if missed:
            raise InjectionMissed(
                f"{name} reached {len(planned) - len(missed)} of {len(planned)} planned cells",
                hint="This render would not show the injection, so it is not kept.",
            )
