"""Denoise a latent step by step: noise to latent, one yield per step.

Letters of shapes: C latent channels, T latent frames, Y X the latent grid, N E a prompt's rows, B L D the
residual of a forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from wancli.sampling.step_cache import NOTHING_REUSED

Residuals = Mapping[Branch, Tensor]  # [B, L, D], of the branches whose next forward reuses one


def draw_noise(shape_CTYX: tuple[int, ...], seed: int, device: str = "cpu") -> Tensor:
    """Draw the starting latent in fp32. On the CPU a seed gives the same latent on every machine."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape_CTYX, generator=generator, device=device, dtype=torch.float32)


@dataclass(frozen=True)
class StepResult:
    """The result of a step: the solver's state before step `step`, the cells that the model read, and the
    attention maps of all steps so far, and the residuals that step `step` reuses.
    """

    step: int
    state: State
    cells_read: frozenset[tuple[int, Branch, int]]
    attention: AttentionMaps | None = None
    residuals: Residuals = field(default_factory=dict)


@dataclass(frozen=True)
class DenoiseRun:
    """The inputs of denoising one stage of one shot: its state, its steps, and what its blocks read.

    v = v_uncond + guidance·(v_cond - v_uncond), cond first; a step without an uncond branch takes
    v_cond as it is. If `effects` is a list, injections are measured and their effects appended to it. The
    attention maps of the cond branch are added to `attention`, if there is some. It and the given frames are
    on the device of the state; given frames are the same in both branches. The forwards of `reused`, pairs of
    step and branch, run no block: they reuse the residual of the last forward of their branch. `residuals`
    are those that the first step reuses.
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
    reused: frozenset[tuple[int, Branch]] = NOTHING_REUSED
    residuals: Residuals = field(default_factory=dict)

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
        StepResult(steps.start, _put_given(run, run.state), frozenset(), run.attention, run.residuals)
        for run in runs
    ]
    for i in steps:
        forwards_per_run = [_build_forwards(run, result, i) for run, result in zip(runs, results)]
        batch = [forward for forwards in forwards_per_run for forward in forwards]
        velocities = iter(_predict_velocities(model, batch, forwards_per_pass))
        results = [
            _take_step(model, run, result, i, [(forward, next(velocities)) for forward in forwards])
            for run, result, forwards in zip(runs, results, forwards_per_run)
        ]
        yield results


def _build_forwards(run: DenoiseRun, result: StepResult | NotFinite, i: int) -> list[Forward]:
    if isinstance(result, NotFinite):
        return []
    x_1CTYX, t = result.state.x[None], run.schedule.timesteps[i]
    maps = result.attention.copy() if result.attention else None
    return [
        Forward(
            x_1CTYX,
            t,
            BlockContexts(run.contexts, run.table, run.areas, i, branch),
            run.given,
            kept=[] if (i + 1, branch) in run.reused else None,
            effects=run.effects,
            attention=maps if branch == "cond" else None,
            reused_BLD=result.residuals[branch] if (i, branch) in run.reused else None,
        )
        for branch in run.table.branches_at(i)
    ]


def _predict_velocities(model: WanModel, forwards: Sequence[Forward], forwards_per_pass: int) -> list[Tensor]:
    """Predict the velocity of each forward. Those that reuse a residual share no pass over blocks."""
    computed = [forward for forward in forwards if forward.reused_BLD is None]
    with record_attention(model, computed):
        velocities = iter(predict_velocities(model, computed, forwards_per_pass) if computed else ())
    return [
        next(velocities) if forward.reused_BLD is None else model.reuse_residual(forward, forward.reused_BLD)
        for forward in forwards
    ]


def _kept_residuals(forwards: Sequence[Forward]) -> Residuals:
    """Return the residuals that the next step reuses."""
    kept = {}
    for forward in forwards:
        if forward.kept is not None:
            own = forward.kept[0] if forward.reused_BLD is None else forward.reused_BLD
            kept[forward.contexts.branch] = own
    return kept


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
    return StepResult(i + 1, state, cells, maps, _kept_residuals([forward for forward, _ in outputs]))


def _locate_nonfinite(model: WanModel, run: DenoiseRun, x_CTYX: Tensor, step: int) -> str:
    """Run the failed step again, block by block, and describe where the first NaN or Inf appears."""
    computed = replace(run, reused=NOTHING_REUSED)
    for forward in _build_forwards(computed, StepResult(step, State(x_CTYX), frozenset()), step):
        residuals = model.iterate_residuals(forward.x_BCTYX, forward.t, forward.contexts, forward.given)
        for block, x_BLD in enumerate(residuals):
            if not torch.isfinite(x_BLD).all():
                return f"NaN or Inf at step {step}, {forward.contexts.branch} branch, first in block {block}"
    return f"NaN or Inf at step {step}, after the last block"


def check_hits(
    table: Table,
    cells_read: frozenset[tuple[int, Branch, int]],
    reused: frozenset[tuple[int, Branch]] = NOTHING_REUSED,
) -> None:
    """Raise InjectionMissed if a cell that a rule changed was never read by its block. In `reused` forwards
    no block reads.
    """
    for name, planned in zip(table.names, table.cells_without(reused), strict=True):
        missed = [cell for cell in planned if cell not in cells_read]
        if missed:
            raise InjectionMissed(
                f"{name} reached {len(planned) - len(missed)} of {len(planned)} planned cells",
                hint="This render would not show the injection, so it is not kept.",
            )
