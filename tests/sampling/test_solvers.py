from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from wancli.sampling.solvers import SOLVERS, State, build_sigma_schedule

# wan-official timesteps, from runs of FlowUniPCMultistepScheduler
UNIPC_20_5 = [
    999,
    989,
    978,
    965,
    952,
    937,
    920,
    902,
    882,
    859,
    833,
    803,
    768,
    728,
    681,
    624,
    555,
    468,
    356,
    208,
]
UNIPC_4_5 = [999, 937, 833, 624]


def solve(solver: str, steps: int, shift: float, velocity: Any, x: torch.Tensor) -> torch.Tensor:
    plan = build_sigma_schedule(solver, steps, shift)
    state = State(x)
    for i in range(steps):
        state = SOLVERS[solver].step(plan.sigmas, i, state, velocity(state.x, plan.sigmas[i]))
    return state.x


@pytest.mark.parametrize(("steps", "shift", "expected"), [(20, 5.0, UNIPC_20_5), (4, 5.0, UNIPC_4_5)])
def test_unipc_walks_the_official_timesteps(steps: int, shift: float, expected: list[int]) -> None:
    assert list(build_sigma_schedule("unipc", steps, shift).timesteps) == expected


def test_every_case_of_the_official_code_has_our_schedule(reference: Any, numbers: Any) -> None:
    for name, case in reference["cases"].items():
        ours = build_sigma_schedule(case["solver"], case["steps"], case["shift"])
        assert list(ours.sigmas) == numbers[f"{name}.sigmas"].tolist()
        assert list(ours.timesteps) == numbers[f"{name}.timesteps"].tolist()


def test_the_distilled_schedule_has_float_timesteps_and_starts_at_one() -> None:
    distilled = build_sigma_schedule("distill4", 4, 5.0)
    assert distilled.timesteps == pytest.approx((1000, 937.5, 833.3333, 625))
    assert distilled.sigmas == pytest.approx((1, 0.9375, 0.8333333, 0.625, 0))


@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 20])
def test_a_model_that_knows_x0_is_solved_exactly(solver: str, steps: int) -> None:
    x0, x = torch.randn(2, 8), torch.randn(2, 8)
    answer = solve(solver, steps, 3.0, lambda x, sigma: (x - x0) / sigma, x)
    torch.testing.assert_close(answer, x0, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_the_second_order_solvers_beat_euler_on_a_curved_path(solver: str) -> None:
    """Data N(0, s²) makes the velocity linear in x; the exact flow scales x by the ratio of deviations."""
    s = 0.3

    def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
        variance = (1 - sigma) ** 2 * s**2 + sigma**2
        return x * (sigma - (1 - sigma) * s**2) / variance

    def error(solver: str) -> float:
        first = build_sigma_schedule(solver, 64, 3.0).sigmas[0]
        x = torch.ones(1, dtype=torch.float64)
        exact = s / math.sqrt((1 - first) ** 2 * s**2 + first**2)
        return abs(solve(solver, 64, 3.0, velocity, x).item() / exact - 1)

    assert error(solver) < error("euler") / 5


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_steps_agree_with_diffusers_on_the_same_sigmas(solver: str, steps: int) -> None:
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    kind = UniPCMultistepScheduler if solver == "unipc" else DPMSolverMultistepScheduler
    theirs = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    theirs.set_timesteps(steps)
    ours = build_sigma_schedule(solver, steps, 5.0)
    theirs.sigmas = torch.tensor(ours.sigmas)
    theirs.timesteps = torch.arange(steps, 0, -1)  # only told apart, never used in the arithmetic

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, 2, 3, 3, generator=generator)
    state, reference = State(x), x
    for i in range(steps):
        v = torch.randn(x.shape, generator=generator)
        reference = theirs.step(v, theirs.timesteps[i], reference, return_dict=False)[0]
        state = SOLVERS[solver].step(ours.sigmas, i, state, v)
    torch.testing.assert_close(state.x, reference, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_a_state_saved_midway_leads_to_the_same_bytes(solver: str) -> None:
    plan = build_sigma_schedule(solver, 4, 5.0)
    step = SOLVERS[solver].step
    velocities = torch.randn(4, 3)
    whole = State(torch.randn(3))
    states = [whole]
    for i in range(4):
        whole = step(plan.sigmas, i, whole, velocities[i])
        states.append(whole)
    resumed = State(states[2].x.clone(), tuple(m.clone() for m in states[2].history), states[2].last)
    for i in (2, 3):
        resumed = step(plan.sigmas, i, resumed, velocities[i])
    assert torch.equal(resumed.x, whole.x)
