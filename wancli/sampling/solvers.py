"""Schedules and solvers of the flow ODE. State is data: save it, load it, fork it.

x_σ = (1-σ)·x0 + σ·noise, the model gives v = noise - x0, so x0 = x - σ·v. With α = 1-σ and
λ = ln α - ln σ. A solver is a function `(sigmas, i, state, v) -> state` from σ_i to σ_{i+1};
all it remembers is in `State`. Scalars are float64 made from fp32 sigmas, tensors stay fp32.

UniPC: Zhao et al. 2023, arXiv 2302.04867 (order 2, bh2, predicting x0). DPM++ 2M: Lu et al.
2022, arXiv 2211.01095. The four-step schedule of distilled models is Euler's own.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SigmaSchedule:
    """N timesteps as the model receives them, and N+1 noise levels, the last one 0."""

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.timesteps)


@dataclass(frozen=True)
class State:
    """The latent at σ_i and what the solver remembers of the steps before it."""

    x: Tensor
    history: tuple[Tensor, ...] = ()  # x0 predictions of earlier steps, oldest first, at most 2
    last: Tensor | None = None  # UniPC: the corrected latent at σ_{i-1}

    def to(self, device: str) -> State:
        """The same state on another device."""
        history = tuple(m.to(device) for m in self.history)
        return State(self.x.to(device), history, None if self.last is None else self.last.to(device))


Step = Callable[[Sequence[float], int, State, "Tensor"], State]


@dataclass(frozen=True)
class Solver:
    """One row of the table below: the first σ, the format of t, and the settings it is made for."""

    step: Step
    sigma_max: float
    integer_timesteps: bool
    steps: int | None = None  # the only step count it is made for
    shift: float | None = None  # overrides the model's default
    guidance: float | None = None  # likewise


def shift_sigma(sigma: float, shift: float) -> float:
    """Move noise levels towards 1: S·σ / (1 + (S-1)·σ)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


@cache
def build_sigma_schedule(solver: str, steps: int, shift: float) -> SigmaSchedule:
    """Build the official noise levels: evenly spaced from the solver's first one to 0, then shifted."""
    solver_spec = SOLVERS[solver]
    sigmas = [shift_sigma(solver_spec.sigma_max * (1 - i / steps), shift) for i in range(steps)]
    times = (
        [float(int(1000 * s)) for s in sigmas]
        if solver_spec.integer_timesteps
        else _round_to_fp32(1000 * s for s in sigmas)
    )
    return SigmaSchedule(tuple(times), (*_round_to_fp32(sigmas), 0.0))


def _round_to_fp32(values: Iterable[float]) -> list[float]:
    return list(array("f", values))


def euler(sigmas: Sequence[float], i: int, state: State, v: Tensor) -> State:
    """Take Euler's step. It needs no history; the prediction of x0 is for previews of a saved state."""
    return State(state.x + (sigmas[i + 1] - sigmas[i]) * v, (state.x - sigmas[i] * v,))


def dpmpp(sigmas: Sequence[float], i: int, state: State, v: Tensor) -> State:
    """DPM++ 2M; first and last step are of order 1."""
    m0 = state.x - sigmas[i] * v
    order = 2 if 0 < i < len(sigmas) - 2 else 1
    x = _solve_constant_x0(sigmas[i], sigmas[i + 1], state.x, m0)
    if order == 2:
        h, ratio = _h(sigmas[i], sigmas[i + 1]), _h(sigmas[i - 1], sigmas[i]) / _h(sigmas[i], sigmas[i + 1])
        x = x - (1 - sigmas[i + 1]) * math.expm1(-h) * 0.5 / ratio * (m0 - state.history[-1])
    return State(x, (m0,))


def unipc(sigmas: Sequence[float], i: int, state: State, v: Tensor) -> State:
    """Correct the latent at σ_i with the model's new velocity, then predict the latent at σ_{i+1}.

    v was evaluated on the uncorrected latent; x0 is computed from that latent, too (as official).
    """
    m = state.x - sigmas[i] * v
    x = _correct(sigmas, i, state, m) if i else state.x
    history = (*state.history[-1:], m)
    return State(_predict(sigmas, i, x, history), history, x)


def _order(sigmas: Sequence[float], i: int) -> int:
    """Return the order of step i: the first and the last are of order 1."""
    return min(2, i + 1, len(sigmas) - 1 - i)


def _predict(sigmas: Sequence[float], i: int, x: Tensor, history: tuple[Tensor, ...]) -> Tensor:
    s, t = sigmas[i], sigmas[i + 1]
    base = _solve_constant_x0(s, t, x, history[-1])
    if _order(sigmas, i) == 1:
        return base
    h = _h(s, t)
    ratio = -_h(sigmas[i - 1], s) / h
    return base - 0.5 * (1 - t) * math.expm1(-h) / ratio * (history[-2] - history[-1])


def _correct(sigmas: Sequence[float], i: int, state: State, m: Tensor) -> Tensor:
    assert state.last is not None
    s, t, m0 = sigmas[i - 1], sigmas[i], state.history[-1]
    h, phi = _h(s, t), math.expm1(-_h(s, t))
    base = _solve_constant_x0(s, t, state.last, m0)
    if _order(sigmas, i - 1) == 1:
        return base - (1 - t) * phi * 0.5 * (m - m0)
    ratio = -_h(sigmas[i - 2], s) / h
    p1 = phi / -h - 1
    b1, b2 = p1 / phi, 2 * (p1 / -h - 0.5) / phi
    rho1 = (b1 - b2) / (1 - ratio)
    d1 = (state.history[-2] - m0) / ratio
    return base - (1 - t) * phi * (rho1 * d1 + (b1 - rho1) * (m - m0))


def _solve_constant_x0(s: float, t: float, x: Tensor, m0: Tensor) -> Tensor:
    """Return the exact solution from σ=s to σ=t if x0 does not change."""
    return t / s * x - (1 - t) * math.expm1(-_h(s, t)) * m0


def _h(s: float, t: float) -> float:
    return _lambda(t) - _lambda(s)


def _lambda(sigma: float) -> float:
    if sigma == 0:
        return math.inf
    return -math.inf if sigma == 1 else math.log(1 - sigma) - math.log(sigma)


_SIGMA_MAX = array("f", [1 - 1 / 1000])[0]  # official keeps it as fp32

SOLVERS = {
    "unipc": Solver(unipc, _SIGMA_MAX, integer_timesteps=True),
    "dpm++": Solver(dpmpp, 1.0, integer_timesteps=True),
    "euler": Solver(euler, 1.0, integer_timesteps=False),
    "distill4": Solver(euler, 1.0, integer_timesteps=False, steps=4, shift=5.0, guidance=1.0),
}
