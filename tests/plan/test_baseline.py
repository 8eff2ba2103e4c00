"""What a job says about comparing its shots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import rule, tiny_job, write_job
from safetensors.torch import save_file

from wancli.errors import JobError
from wancli.job.loader import load
from wancli.plan.planner import build_plan
from wancli.plan.render_plan import Comparison

BIAS = "blocks.0.self_attn.q"
ITEMS = [{"id": "a", "inject": [rule()]}, {"id": "b"}, {"id": "c", "inject": [rule(blocks="early")]}]


def decided(folder: Path, **changes: Any) -> Comparison | None:
    job = tiny_job(**{"output": "out/{id}.mp4", "items": ITEMS} | changes)
    return build_plan(load(write_job(folder, job)), folder / "memo.json").comparison


def test_nothing_is_compared_unless_asked(tmp_path: Path) -> None:
    assert decided(tmp_path) is None
    assert decided(tmp_path, compare=False) is None


def test_the_baseline_is_the_shot_without_injection(tmp_path: Path) -> None:
    assert decided(tmp_path, compare=True) == Comparison(
        dict.fromkeys("abc", "b"), "b", sheet=True, video=True
    )


def test_a_plain_shot_that_is_missing_is_added(tmp_path: Path) -> None:
    found = decided(tmp_path, compare=True, items=[ITEMS[0], ITEMS[2]])
    assert found == Comparison(dict.fromkeys(["a", "c", "plain"], "plain"), "plain", True, True, ("plain",))


def test_without_it_a_shot_is_compared_with_nothing_and_the_plan_warns(tmp_path: Path) -> None:
    job = tiny_job(output="out/{id}.mp4", items=[ITEMS[0], ITEMS[2]], compare={"add_baseline": False})
    plan = build_plan(load(write_job(tmp_path, job)), tmp_path / "memo.json")
    assert plan.comparison == Comparison(dict.fromkeys("ac"), "a", sheet=True, video=True)
    assert plan.warnings == (
        "shots a, c: no figures, because no compared shot differs in the injection alone; "
        "compare: {baseline: ID} compares all with one shot",
    )


def test_a_shot_with_a_lora_is_no_baseline_where_there_is_another(tmp_path: Path, quick: Path) -> None:
    save_file({f"diffusion_model.{BIAS}.diff_b": torch.ones(48)}, tmp_path / "style.safetensors")
    lora = {"id": "styled", "loras": [{"path": str(tmp_path / "style.safetensors")}]}
    found = decided(tmp_path, model=str(quick), compare=True, items=[lora, {"id": "plain"}])
    assert found
    assert found.default_baseline == "plain"


def test_baseline_sheet_and_video_are_what_the_job_says(tmp_path: Path) -> None:
    found = decided(tmp_path, compare={"baseline": "c", "sheet": False})
    assert found == Comparison(dict.fromkeys("abc", "c"), "c", sheet=False, video=True)


def test_a_shot_is_beside_the_one_that_differs_in_the_injection_alone(tmp_path: Path) -> None:
    sweep = {"seed": [7, 8], "inject.0.strength": [0, 0.5, 1.0]}
    swept = {"inject": [rule()], "matrix": sweep, "items": [{}], "output": "out/{seed}-{strength}.mp4"}
    found = decided(tmp_path, compare=True, **swept)
    assert found
    assert found.default_baseline == "seed7-strength0"
    job = load(write_job(tmp_path, tiny_job(compare=True, **swept)))
    assert build_plan(job, tmp_path / "memo.json").warnings == ()  # its injections of strength 0 are meant
    assert {id: found.baselines[id] for id in found.baselines} == {
        f"seed{seed}-strength{strength}": f"seed{seed}-strength0"
        for seed in (7, 8)
        for strength in ("0", "0.5", "1")
    }
    one = decided(tmp_path, compare={"baseline": "seed8-strength1"}, **swept)
    assert one
    assert {*one.baselines.values()} == {"seed8-strength1"}


def test_a_baseline_is_coded_as_what_is_beside_it(tmp_path: Path) -> None:
    sweep = {"video.crf": [16, 40], "inject.0.strength": [0, 1.0]}
    output = "out/{crf}-{strength}.mp4"
    found = decided(tmp_path, compare=True, inject=[rule()], matrix=sweep, items=[{}], output=output)
    assert found
    assert found.baselines["crf40-strength1"] == found.baselines["crf40-strength0"] == "crf40-strength0"


def test_shots_are_never_compared_with_another_seed(tmp_path: Path) -> None:
    items = [{"id": "a"}, {"id": "b", "seed": 8}, {"id": "c", "seed": 9, "inject": [rule()]}]
    found = decided(tmp_path, compare=True, items=items)
    assert found
    assert found.baselines == {"a": None, "b": None, "c": "c-plain", "c-plain": "c-plain"}


def test_the_lora_of_all_shots_is_no_injection(tmp_path: Path, quick: Path) -> None:
    save_file({f"diffusion_model.{BIAS}.diff_b": torch.ones(48)}, tmp_path / "style.safetensors")
    loras = [{"path": str(tmp_path / "style.safetensors")}]
    items = [{"id": "a", "inject": [rule(blocks="early")]}]
    job = tiny_job(model=str(quick), output="out/{id}.mp4", items=items, loras=loras, compare=True)
    plan = build_plan(load(write_job(tmp_path, job)), tmp_path / "memo.json")
    assert plan.comparison
    assert plan.comparison.baselines == {"a": "plain", "plain": "plain"}
    assert [len(shot.loras) for shot in plan.shots] == [1, 1]


def test_an_item_may_stay_out(tmp_path: Path) -> None:
    found = decided(tmp_path, compare=True, items=[ITEMS[0], ITEMS[1] | {"compare": False}, ITEMS[2]])
    assert found == Comparison(dict.fromkeys("ac"), "a", sheet=True, video=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"compare": {"baseline": "d"}},
            r"job.yaml:\d+: compare.baseline: no shot that is compared has the id",
        ),
        (
            {"compare": {"baseline": "d", "add_baseline": "no"}},
            r"compare.add_baseline: expected true or false, got 'no'",
        ),
        ({"compare": {"baselin": "a"}}, r"compare.baselin: unknown key; did you mean 'baseline'"),
        ({"compare": {"baseline": 7}}, r"compare.baseline: expected text, got 7; put it in quotes"),
        ({"compare": "yes"}, r"compare: expected true or false, got 'yes'"),
        (
            {"items": [{"id": "a", "compare": True}, {"id": "b", "compare": {"video": False}}]},
            r"items.1.compare: shots a and b want other comparisons",
        ),
    ],
    ids=["unknown id", "no truth value", "unknown key", "number", "text", "two minds"],
)
def test_what_cannot_be_is_said_with_its_line(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(JobError, match=message):
        decided(tmp_path, **changes)


def test_comparing_changes_no_key_of_a_shot(tmp_path: Path) -> None:
    keys = [
        [shot.key for shot in build_plan(load(write_job(tmp_path, job)), tmp_path / "memo.json").shots]
        for job in (tiny_job(), tiny_job(compare=True))
    ]
    assert keys[0] == keys[1]


def test_cached_shots_are_compared_with_the_one_that_computes_every_step(tmp_path: Path, quick: Path) -> None:
    table = {"table": "Wan2.1-T2V-1.3B"}
    cached = [{"id": name, "cache": table | {"skips": n}} for name, n in (("two", 2), ("four", 4))]
    said: dict[str, Any] = {"model": str(quick), "sampler": {"steps": 20}, "compare": True}
    found = decided(tmp_path, **said, items=[*cached, {"id": "whole"}])
    assert found
    assert found.baselines == dict.fromkeys(("two", "four", "whole"), "whole")
    injected = {"inject": [rule(blocks=[1], steps="8-11")]}
    found = decided(tmp_path, **said, cache=table, items=[{"id": "fish"} | injected, {"id": "plain"}])
    assert found
    assert found.baselines == dict.fromkeys(("fish", "plain"), "plain")  # the same cache, other forced steps
