"""Which forwards reuse a residual, against a simulation written from the rule, and what one gives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import wancli
from wancli.injection.contexts import ContextCache
from wancli.injection.exprs import Branch
from wancli.injection.table import Rule, Table
from wancli.models.dit import WanModel
from wancli.resources.memory_model import Residency
from wancli.sampling.denoise import DenoiseRun, StepResult, denoise, denoise_batch
from wancli.sampling.solvers import State, build_sigma_schedule
from wancli.sampling.stages import Stage, split_stages
from wancli.sampling.step_cache import CacheSettings, reuse_by_magnitude
from wancli.weights.checkpoint import identify
from wancli.weights.loader import LoadOptions, load_transformer

TABLES = json.loads((Path(wancli.__file__).parent / "assets" / "magcache.json").read_text())
PUBLISHED = {  # computed forwards of each branch at the published number of steps
    "Wan2.1-T2V-14B": 18,
    "Wan2.1-T2V-1.3B": 21,
    "Wan2.2-TI2V-5B": 25,
    "Wan2.2-T2V-A14B": 26,
}


def reused(
    name: str, branch: str, steps: int, stages: list[range], changed: set[int], **other: Any
) -> list[int]:
    settings = CacheSettings(
        "magcache", *(TABLES[name][k] for k in ("threshold", "skips", "retention")), name
    )
    found = reuse_by_magnitude(TABLES[name][branch], replace(settings, **other), steps, stages, changed)
    return list(found)


def simulate(
    ratios: list[float],
    threshold: float,
    skips: int,
    retention: float,
    steps: int,
    experts: list[int],
    changed: set[int],
) -> list[int]:
    """The rule of MagCache in one pass over all steps, with the number of steps of each expert."""
    source = len(ratios)
    left, first = experts[0], 0
    queue = experts[1:]
    error_of: list[float] = []
    ratio = 1.0
    skipped = []
    for i in range(steps):
        if i - first == left:
            first, left = i, queue.pop(0)
            error_of, ratio = [], 1.0
        allowed = i != first and i not in changed and (i - first) >= int(round(left * retention, 6))
        if allowed:
            ratio *= ratios[round(i * (source - 1) / (steps - 1))]
            error_of.append(abs(1 - ratio))
        if allowed and sum(error_of) < threshold and len(error_of) <= skips:
            skipped.append(i)
        else:
            error_of, ratio = [], 1.0
    return skipped


def experts_of(name: str, steps: int) -> list[range]:
    boundary, shift = {"Wan2.2-T2V-A14B": (0.875, 12.0), "Wan2.2-I2V-A14B": (0.9, 5.0)}.get(name, (None, 5.0))
    times = build_sigma_schedule("unipc", steps, shift).timesteps
    return [stage.steps for stage in split_stages(times, boundary, 4.0, boundary and 3.0)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_settings_compute_the_published_number_of_forwards(name: str) -> None:
    steps = len(TABLES[name]["cond"])
    for branch in ("cond", "uncond"):
        found = reused(name, branch, steps, experts_of(name, steps), set())
        assert steps - len(found) == PUBLISHED[name]


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("steps", [12, 20, 37, 50, 80])
@pytest.mark.parametrize("changed", [set(), {6, 15}])
def test_reused_steps_are_those_of_a_simulation(name: str, steps: int, changed: set[int]) -> None:
    stages, table = experts_of(name, steps), TABLES[name]
    for branch in ("cond", "uncond"):
        settings = (table["threshold"], table["skips"], table["retention"])
        lengths = [len(stage) for stage in stages]
        expected = simulate(table[branch], *settings, steps, lengths, changed)
        found = reused(name, branch, steps, stages, changed)
        assert found == expected
        assert not changed & set(found)


def test_threshold_and_skips_bound_the_reuse() -> None:
    stages = [range(50)]
    assert reused("Wan2.1-T2V-14B", "cond", 50, stages, set(), threshold=0.0) == []
    assert reused("Wan2.1-T2V-14B", "cond", 50, stages, set(), skips=0) == []
    assert min(reused("Wan2.1-T2V-14B", "cond", 50, stages, set(), retention=0.58)) == 29
    runs = reused("Wan2.1-T2V-14B", "cond", 50, stages, set(), threshold=99.0, skips=2)
    assert [step for step in range(10, 50) if step not in runs] == [*range(12, 50, 3)]


def build_model(folder: Path, residency: Residency = "resident") -> WanModel:
    return load_transformer(identify(folder), LoadOptions(residency=residency))


def make_runs(model: WanModel, *reused: frozenset[tuple[int, Branch]]) -> list[DenoiseRun]:
    """Runs of four steps with these reused forwards: plain, and with an injection."""
    torch.manual_seed(4)
    contexts = ContextCache(model, {name: torch.randn(n, 64) for name, n in (("a", 5), ("b", 9), ("c", 2))})
    mixed = Rule("c", ((2, 0.5), (3, 0.5)), ((0, 1.0), (1, 1.0)), ("cond",), "output-mix", 1.0)
    both: dict[Branch, str] = {"cond": "a", "uncond": "b"}
    levels, stage = build_sigma_schedule("euler", 4, 3.0), Stage("only", range(4), 3.0)
    return [
        DenoiseRun(
            State(torch.randn(16, 1, 4, 4 + 2 * i)),
            levels,
            "euler",
            Table([mixed] if i else [], both, 4, 4),
            contexts,
            stage,
            reused=one,
        )
        for i, one in enumerate(reused)
    ]


REUSED: frozenset[tuple[int, Branch]] = frozenset({(1, "cond"), (2, "cond"), (2, "uncond"), (3, "uncond")})


@torch.inference_mode()
def test_a_reused_forward_adds_the_last_residual_to_its_own_tokens(shallow: Path) -> None:
    model = build_model(shallow)
    (run,) = make_runs(model, REUSED)
    residuals: dict[str, torch.Tensor] = {}
    before = run.state
    for i, result in enumerate(denoise(model, run)):
        x, t = before.x[None], run.schedule.timesteps[i]
        v = {}
        for branch in run.table.branches_at(i):
            tokens = model.embed(x, t).x_BLD
            if (i, branch) not in REUSED:
                mix = run.contexts.mix(run.table.base_cell(branch), run.areas)
                *_, after = model.iterate_residuals(x, t, [mix] * 4)
                residuals[branch] = after.double() - tokens.double()
            state = model.embed(x, t)
            state.x_BLD = (tokens.double() + residuals[branch]).float()
            v[branch] = model.read_velocity(state)[0].double()
        guided = v["uncond"] + 3.0 * (v["cond"] - v["uncond"])
        sigmas = run.schedule.sigmas
        expected = before.x.double() + (sigmas[i + 1] - sigmas[i]) * guided
        torch.testing.assert_close(result.state.x.double(), expected, rtol=1e-5, atol=1e-5)
        assert set(result.residuals) == {branch for step, branch in REUSED if step == i + 1}
        before = result.state


@pytest.mark.parametrize("forwards", [1, 9])
@torch.inference_mode()
def test_cached_runs_of_a_batch_are_each_as_if_alone(forwards: int, shallow: Path) -> None:
    cached: list[frozenset[tuple[int, Branch]]] = [REUSED, frozenset({(1, "cond"), (3, "cond")}), frozenset()]
    model = build_model(shallow)
    alone = [list(denoise(model, run)) for run in make_runs(model, *cached)]
    streamed = build_model(shallow, "streamed")
    for step, results in enumerate(denoise_batch(streamed, make_runs(streamed, *cached), forwards)):
        for result, expected in zip(results, alone, strict=True):
            assert isinstance(result, StepResult)
            assert torch.equal(result.state.x, expected[step].state.x)
            assert result.cells_read == expected[step].cells_read
    assert {cell[:2] for result in alone[0] for cell in result.cells_read}.isdisjoint(REUSED)
