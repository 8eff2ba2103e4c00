"""What a plan decides about a step cache: forced steps, refusals, keys, memory and time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import SPIECE, T5, TINY, TRANSFORMER, VAE, rule, run_wancli, tiny_job, write_job
from weight_files import save_tensors

from wancli.job.loader import load
from wancli.plan import memory_estimate, throughput
from wancli.plan.planner import build_plan
from wancli.plan.shot import Shot

TABLE = {"table": "Wan2.1-T2V-1.3B"}
STEPS = {"sampler": {"steps": 20}}
SHAPES = (("A", (4, 48)), ("B", (48, 4)))

Decide = Callable[..., Shot]


@pytest.fixture
def decide(tmp_path: Path, quick: Path, warm: Path) -> Decide:
    def decided(**changes: Any) -> Shot:
        path = write_job(tmp_path, tiny_job(**{"model": quick} | STEPS | changes))
        return build_plan(load(path), warm / "memo.json").shots[0]

    return decided


def computed(shot: Shot, branch: Any) -> list[int]:
    return [step for step in range(shot.steps) if (step, branch) not in shot.reused]


def test_a_window_begins_and_ends_with_computed_steps_of_both_branches(decide: Decide) -> None:
    plain = decide(cache=TABLE)
    assert computed(plain, "cond")[:5] == [0, 1, 2, 3, 8] or plain.reused
    for first, after in ((6, 10), (7, 15), (9, 13)):
        assert plain.reused >= {(first, "cond")} or plain.reused >= {(after, "cond")}
        shot = decide(cache=TABLE, inject=[rule(blocks=[1], steps=f"{first}-{after - 1}")])
        for branch in ("cond", "uncond"):
            assert {first, after} <= {*computed(shot, branch)}
    every = decide(cache=TABLE, inject=[rule(blocks=[1], step_strength=[i / 20 for i in range(1, 21)])])
    assert not every.reused  # each step reads otherwise than the one before


EXPERTS = {
    "high_noise": str(TINY / TRANSFORMER),
    "low_noise": str(TINY / TRANSFORMER),
    "text_encoder": str(TINY / T5),
    "tokenizer": str(SPIECE),
    "vae": str(TINY / VAE),
    "heads": 2,
}


@pytest.mark.parametrize(("guidance", "branches"), [((4, 3), 2), ((1, 3), 2), ((4, 1), 2), ((1, 1), 1)])
def test_an_expert_and_guidance_begin_with_a_computed_step(
    decide: Decide, guidance: tuple[int, int], branches: int
) -> None:
    """The other expert has other residuals, and a branch that begins has none."""
    sampler = {"steps": 40, "guidance": dict(zip(("high", "low"), guidance))}
    shot = decide(model=EXPERTS, sampler=sampler, cache={"table": "Wan2.2-T2V-A14B"})
    high, low = (stage.steps for stage in shot.stages)
    assert len(shot.table.branches) == branches
    assert {step for step, _ in shot.reused} & {*high}
    for step, branch in shot.reused:
        assert branch in shot.table.branches_at(step)
        assert step > low.start or step < high.stop
        assert (step - 1, branch) in shot.reused or branch in shot.table.branches_at(step - 1)
    assert not any(step == low.start for step, _ in shot.reused)
    only = decide(model=EXPERTS, sampler=sampler, cache={"table": "Wan2.2-T2V-A14B", "expert": "low"})
    assert {step for step, _ in only.reused} == {step for step, _ in shot.reused if step in low}


def test_a_lora_begins_and_ends_with_a_computed_step(decide: Decide, tmp_path: Path) -> None:
    pair = {f"blocks.0.self_attn.q.lora_{name}.weight": torch.ones(shape) for name, shape in SHAPES}
    path = save_tensors(tmp_path / "style.safetensors", pair)
    shot = decide(cache=TABLE, loras=[{"path": str(path), "steps": "6-9"}])
    assert shot.reused
    for branch in ("cond", "uncond"):
        assert {6, 10} <= {*computed(shot, branch)}


def test_only_reused_forwards_change_a_key(decide: Decide) -> None:
    plain = decide()
    assert decide(cache="none").key == plain.key
    assert decide(cache=TABLE | {"skips": 0}).key == plain.key
    cached = decide(cache=TABLE)
    assert cached.key != plain.key
    assert decide(cache=TABLE | {"threshold": 0.12}).key == cached.key  # what the table has anyway
    assert decide(cache=TABLE | {"skips": 1}).key not in (plain.key, cached.key)


def test_a_residual_of_each_branch_is_counted_and_the_forwards_are_not(decide: Decide) -> None:
    plain, cached = decide(), decide(cache=TABLE)
    before, after = (memory_estimate.predict_alone(shot).buffer for shot in (plain, cached))
    width = plain.model.checkpoint.transformer_config.dim
    assert after - before == 2 * plain.tokens * width * 4
    share = 1 - len(cached.reused) / (2 * cached.steps)
    flops = [throughput.sampling_flops(shot) for shot in (plain, cached)]
    assert flops[1] / flops[0] == pytest.approx(share, abs=0.1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cache": "magcache"}, "job.yaml:{}: cache: no table of"),
        ({"cache": {"table": "Wan3"}}, "cache.table: Wan3 is not a table"),
        ({"cache": TABLE | {"expert": "low"}}, "cache.expert: no step is of the expert 'low'"),
        ({"cache": TABLE, "sampler": {"steps": 11}}, "with unipc and 11 steps every step matters"),
        ({"cache": TABLE, "sampler": {"solver": "distill4"}}, "with distill4 and 4 steps every step matters"),
        (
            {"cache": TABLE, "measure": True, "inject": [rule(blocks=[1])]},
            "measure: effects are measured in blocks",
        ),
        (
            {"cache": TABLE, "attention": {"words": ["cat"]}},
            "attention: attention maps are measured in blocks",
        ),
        ({"cache": "fast"}, "'fast' is not one of 'none', 'magcache'"),
        ({"cache": {"skip": 3}}, "unknown key; did you mean 'skips'?"),
    ],
)
def test_a_cache_is_refused_by_name(
    changes: dict[str, Any],
    said: str,
    tmp_path: Path,
    known: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = write_job(tmp_path, tiny_job(**{"model": known} | STEPS | changes))
    ended = run_wancli(capsys, "plan", job)
    assert ended.code == 2
    assert said.partition("{}")[2 if "{}" in said else 0].lstrip(": ") in ended.err


def test_force_takes_a_cache_of_few_steps(decide: Decide) -> None:
    shot = decide(cache=TABLE | {"force": True}, sampler={"steps": 8})
    assert shot.reused


def test_measuring_the_steps_before_the_first_reuse_is_no_conflict(decide: Decide) -> None:
    assert decide(cache=TABLE, attention={"words": ["cat"], "steps": "0-2"}).reused


def test_the_plan_draws_the_steps_of_each_branch(
    tmp_path: Path, known: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = write_job(tmp_path, tiny_job(known, sampler={"steps": 50}, cache=TABLE))
    shown = run_wancli(capsys, "plan", job, "-v").out
    assert "cache: 21 of 50 forwards, 2.4x: magcache, threshold 0.12, skips 4" in shown
    strip = "██████████····█····█····█····█····█···█··█··█·█·██"
    assert f"            cond  {strip}\n          uncond  {strip}\n" in shown
    (shot,) = json.loads(run_wancli(capsys, "plan", job, "--json").out)["shots"]
    assert [50 - len(steps) for steps in shot["cache"]["reused"].values()] == [21, 21]
