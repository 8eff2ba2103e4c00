"""How long a job will take: what renders left behind, which of it is taken, and what is said without any."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import manifests
import pytest
from image_cases import FIXTURES, assemble
from jobs import NETWORKS, CommandResult, rule, run_wancli, tiny_job, write_job

from wancli.job.loader import load
from wancli.plan import throughput
from wancli.plan.planner import build_plan
from wancli.plan.shot import Shot
from wancli.plan.throughput import Rate
from wancli.report import plan_tables


@pytest.fixture
def shot(tmp_path: Path) -> Shot:
    return build_plan(load(write_job(tmp_path, tiny_job())), tmp_path / "memo.json").shots[0]


def rate_of(shot: Shot, phase: str, per_second: float, **changes: int | str) -> Rate:
    facts = asdict(throughput.shot_workloads(shot)[phase])
    facts.pop("amount")
    return replace(Rate(**facts, per_second=per_second, date="2026-11-22"), **changes)


def test_the_nearest_in_width_and_tokens_is_taken_and_other_machines_are_not(shot: Shot) -> None:
    wanted = throughput.shot_workloads(shot)["sample"]
    near = rate_of(shot, "sample", 1e9, width=2 * wanted.width)
    far = rate_of(shot, "sample", 2e9, tokens=9 * wanted.tokens)
    others = [
        rate_of(shot, "sample", 3e9, device="another"),
        rate_of(shot, "sample", 3e9, dtype="bf16"),
        rate_of(shot, "sample", 3e9, residency="streamed"),
        rate_of(shot, "decode", 3e9),
    ]
    assert throughput.nearest_rate([far, *others, near], wanted) == near
    assert throughput.predict_seconds(wanted, [far, near]) == wanted.amount / 1e9
    assert throughput.nearest_rate(others, wanted) is None
    assert throughput.predict_seconds(wanted, others) is None


def test_a_batch_encodes_each_prompt_and_loads_each_model_once(shot: Shot) -> None:
    known = [rate_of(shot, phase, 1e6) for phase in throughput.PHASES]
    does = throughput.shot_workloads(shot)
    missing = frozenset(text.id for text in shot.prompts)
    one, two = (throughput.predict_phase_seconds([shot] * n, missing, known, {}) for n in (1, 2))
    assert one == {name: pytest.approx(does[name].amount / 1e6) for name in throughput.PHASES}
    assert (two["encode"], two["load"]) == (one["encode"], one["load"])
    assert two["sample"] == pytest.approx(2 * one["sample"])
    assert throughput.predict_phase_seconds([shot], frozenset(), known, {})["encode"] == 0
    assert throughput.predict_phase_seconds([shot], missing, known[1:], {})["encode"] is None


def test_a_memory_that_is_damaged_is_empty_and_written_anew(shot: Shot, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "rates.json"
    path.parent.mkdir()
    good = rate_of(shot, "sample", 1e9)
    wrong = ({"width": 0}, {"device": []}, {"per_second": math.inf}, {"tokens": "9"}, {"date": {}})
    entries = [json.dumps([asdict(good) | change]) for change in wrong]
    for damage in ("", "{", "{}", "[1]", '[{"device": 1}]', *entries):
        path.write_text(damage)
        assert throughput.read_rates(path) == (), damage
        throughput.remember_rates(path, [good])
        assert throughput.read_rates(path) == (good,), damage
    throughput.remember_rates(path, [replace(good, per_second=2e9), replace(good, tokens=7)])
    assert throughput.read_rates(path) == (good, replace(good, per_second=2e9), replace(good, tokens=7))


def test_of_several_renders_the_median_is_expected_between_the_fastest_and_the_slowest(
    shot: Shot, tmp_path: Path
) -> None:
    path = tmp_path / "rates.json"
    for per_second in (9e9, 1e9, 2e9, 3e9, 4e9, 8e9):
        throughput.remember_rates(path, [rate_of(shot, "sample", per_second)])
    known = throughput.read_rates(path)
    assert [rate.per_second for rate in known] == [1e9, 2e9, 3e9, 4e9, 8e9]
    wanted = throughput.shot_workloads(shot)["sample"]
    assert throughput.predict_seconds(wanted, known) == wanted.amount / 3e9
    for fastest, per_second in ((True, 8e9), (False, 1e9)):
        (rate,) = throughput.extreme_rates(known, fastest=fastest)
        assert rate.per_second == per_second
    assert plan_tables.format_range(40, 35, 140) == "35.0 s to 2 min 20 s"
    assert plan_tables.format_range(40, 39, 41) == "about 40.0 s"


def test_the_first_render_measures_what_the_next_plan_says(
    render: Callable[..., CommandResult],
    tmp_path: Path,
    warm: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (warm / "rates.json").unlink(missing_ok=True)
    NETWORKS.clear()  # loading is measured, too
    changes = {"output": "out/{seed}.mp4", "id": "one"}
    before = render("--json", **changes)
    assert next(p for p in json.loads(before.out)["memory"] if p["name"] == "sample")["expected"] is None
    job = tmp_path / "job.yaml"
    took = {p["name"]: p["seconds"] for p in json.loads(before.out)["memory"]}
    job.write_text(job.read_text() + "seed: 2\n")
    assert run_wancli(capsys, "plan", job).out.splitlines()[-1].startswith("sampling at ")
    said = json.loads(run_wancli(capsys, "plan", job, "--json").out)["time"]
    for name in ("load", "sample", "decode"):
        assert said["phases"][name] == pytest.approx(took[name], rel=0.01, abs=1e-3)
    assert said["seconds"] == pytest.approx(sum(said["phases"].values()))
    assert not said["rough"]
    large = ["--set", "size=256x256", "--set", "frames=33"]
    assert json.loads(run_wancli(capsys, "plan", job, "--json", *large).out)["time"]["rough"]
    assert "; a rough guess, from shots of another size" in run_wancli(capsys, "plan", job, *large).out
    after = json.loads(render("--json", seed=2, **changes).out)
    assert next(p for p in after["memory"] if p["name"] == "sample")["expected"] == pytest.approx(
        took["sample"], rel=0.01, abs=1e-3
    )


def test_what_several_shots_took_together_is_not_the_time_of_each(shot: Shot) -> None:
    """Two shots with a prompt each: 6 s of encoding, and 4 s of sampling on shared passes."""
    both = [replace(shot, prompt=replace(shot.prompt, id=id), negative=None) for id in ("one", "two")]
    phases = [
        manifests.phase(name, id=name, seconds=seconds, shots=shots)
        for name, seconds, shots in (("encode", 6, 1), ("load", 2, 1), ("sample", 4, 2), ("decode", 1, 1))
    ]
    count = len(shot.prompt.tokens.ids)
    records = [
        manifests.record(phases=phases, prompts=[manifests.prompt(one.prompt.id, "", tokens=count)])
        for one in both
    ]
    known = throughput.measured_rates(list(zip(both, records, strict=True)))
    again = throughput.predict_phase_seconds(both, frozenset({"one", "two"}), known, {})
    assert again == pytest.approx({"encode": 6, "load": 2, "sample": 4, "decode": 2, "pictures": 0})


def test_the_first_picture_that_is_encoded_measures_what_the_next_one_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = FIXTURES / "pictures"
    keys = {"frames": 5, "output": "out/{id}.mp4", "size": {"area": 4096}, "sampler": {"steps": 1}}
    items = [{"id": "a", "image": str(pictures / "input.png")}]
    items += [{"id": "b", "image": str(pictures / "input.png"), "seed": 2}]
    model = assemble("wan21-i2v-tiny", tmp_path / "model")
    cache = ("--cache-dir", tmp_path / "cache")
    job = write_job(tmp_path, tiny_job(model, items=items, **keys))
    said = run_wancli(capsys, "render", job, "--json", *cache)
    assert said.code == 0, said.err
    first, second = (json.loads((tmp_path / f"out/{id}.manifest.json").read_text()) for id in "ab")
    (took,) = [phase["seconds"] for phase in first["phases"] if phase["name"] == "pictures"]
    (row,) = [row for row in json.loads(said.out)["memory"] if row["name"] == "pictures"]
    assert row["expected"] is None
    assert [record["pictures"][0]["cached"] for record in (first, second)] == [False, True]
    assert (
        json.loads(run_wancli(capsys, "plan", job, "--json", *cache).out)["time"]["phases"]["pictures"] == 0
    )
    other = [{"id": "c", "image": str(pictures / "last.png")}]
    job = write_job(tmp_path, tiny_job(model, items=other, **keys))
    time = json.loads(run_wancli(capsys, "plan", job, "--json", *cache).out)["time"]
    assert time["phases"]["pictures"] == pytest.approx(took, rel=0.01, abs=1e-3)


def test_a_report_expects_no_time_of_shots_that_were_done_before(
    render: Callable[..., CommandResult], warm: Path
) -> None:
    (warm / "rates.json").unlink(missing_ok=True)
    changes = {"output": "out/{id}.mp4", "items": [{"id": "a"}, {"id": "b", "seed": 3}]}
    one = json.loads(render("--items", "0", "--json", **changes).out)
    both = json.loads(render("--json", **changes).out)
    assert [shot["status"] for shot in both["shots"]] == ["already done", "rendered"]
    (took,) = [phase["seconds"] for phase in one["memory"] if phase["name"] == "sample"]
    (expected,) = [phase["expected"] for phase in both["memory"] if phase["name"] == "sample"]
    assert expected == pytest.approx(took)


def test_without_any_render_the_plan_says_that_the_first_will_measure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run_wancli(capsys, "plan", write_job(tmp_path, tiny_job())).out
    assert "time: measured by the first render here (unknown: encode, load, sample, decode)" in out


def test_a_context_costs_by_the_share_of_the_tokens_that_read_it(tmp_path: Path) -> None:
    def plan(right: float) -> Shot:
        inject = [rule(blend="output-mix", strength=0.5, region=[0, 0, right, 1])]
        return build_plan(load(write_job(tmp_path, tiny_job(inject=inject))), tmp_path / "memo.json").shots[0]

    whole, half, quarter = map(plan, (1.0, 0.5, 0.25))
    fish = whole.injected_prompts[0]
    # 4 d for each token and row, in 13 blocks at 2 steps
    one = 4 * whole.model.checkpoint.transformer_config.dim * whole.tokens * fish.rows * 13 * 2
    counted = [throughput.sampling_flops(shot) for shot in (whole, half, quarter)]
    assert [a - b for a, b in pairwise(counted)] == [one // 2, one // 4]
