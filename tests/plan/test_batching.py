"""Shots that share passes over the weights: which, how many, and that the latents stay the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import (
    FISH,
    KEPT,
    NETWORKS,
    CommandResult,
    count_forwards,
    files_in,
    latents_of,
    manifest_of,
    rule,
    run_wancli,
    tiny_job,
    write_job,
)
from safetensors.torch import save_file
from torch import Tensor

from wancli.engine.context import RenderContext
from wancli.engine.networks import Networks
from wancli.engine.preflight import preflight
from wancli.job.loader import load
from wancli.models.dit import Request, WanModel
from wancli.plan import batching, memory_estimate, memory_policy
from wancli.plan import planner as planning
from wancli.plan.shot import Shot
from wancli.progress import Progress
from wancli.resources import memory_model
from wancli.storage.cache import Store
from wancli.video import mp4

STREAMED = {"residency": "streamed"}
STEPS = 3
UNLIKE: list[dict[str, Any]] = [
    {"id": "a"},
    {"id": "b", "prompt": FISH, "frames": 5, "seed": 7, "sampler": {"guidance": 1, "solver": "dpm++"}},
    {"id": "c", "size": "96x64", "sampler": {"shift": 3}, "inject": [rule(blocks="0-2"), rule(blocks=3)]},
]


@pytest.fixture
def batch(render: Callable[..., CommandResult]) -> Callable[..., CommandResult]:
    """Render items that keep their latents, with streamed blocks."""

    def rendered(*options: str, **changes: Any) -> CommandResult:
        said = {"output": "out/{id}.mp4", "memory": STREAMED, "sampler": {"steps": STEPS}, "video": KEPT}
        return render(*options, **said | changes)

    return rendered


@pytest.fixture
def decide(tmp_path: Path, quick: Path, warm: Path) -> Callable[..., list[Shot]]:
    def decided(*items: dict[str, Any], **said: Any) -> list[Shot]:
        job = {"output": "{item}.mp4", "memory": STREAMED, "items": list(items)} | said
        path = write_job(tmp_path, tiny_job(quick, **job))
        return list(planning.build_plan(load(path), warm / "memo.json").shots)

    return decided


def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one whenever a pass over the blocks fetches its first weight."""
    NETWORKS.clear()  # those loaded from now on are watched
    real = Networks._patch_fetched
    found: list[str] = []

    def fetched(self: Networks, name: str, weight: Tensor) -> None:
        if name == "blocks.0.self_attn.q.weight":
            found.append(name)
        real(self, name, weight)

    monkeypatch.setattr(Networks, "_patch_fetched", fetched)
    return found


def differ(folder: Path, other: Path, names: str = "abc") -> list[str]:
    return [name for name in names if not torch.equal(latents_of(folder, name), latents_of(other, name))]


# ---- nobody can tell ----


def test_unlike_shots_on_one_pass_have_the_latents_of_shots_alone(
    batch: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = passes(monkeypatch)
    result = batch("--json", folder=tmp_path / "together", items=UNLIKE)
    assert result.code == 0, result.err
    assert len(read) == STEPS + 1  # the first tells how different the injected prompts are
    report = json.loads(result.out)
    for shot in report["shots"]:
        assert shot["shot"]["sharing"] == 3
        (sampled,) = (phase for phase in shot["phases"] if phase["name"] == "sample")
        assert sampled["shots"] == 3
    (seconds,) = (phase["seconds"] for phase in report["memory"] if phase["name"] == "sample")
    assert seconds == sampled["seconds"]  # and not three times that
    read.clear()
    assert batch(folder=tmp_path / "alone", items=UNLIKE, batch=1).code == 0
    assert len(read) == 3 * STEPS + 1
    assert manifest_of(tmp_path / "alone", "b")["shot"]["sharing"] == 1
    assert batch(folder=tmp_path / "resident", items=UNLIKE, memory={"residency": "resident"}).code == 0
    assert differ(tmp_path / "together", tmp_path / "alone") == []
    assert differ(tmp_path / "together", tmp_path / "resident") == []
    for name in "abc":
        one, other = (manifest_of(tmp_path / folder, name) for folder in ("together", "alone"))
        assert (one["key"], one["injection"]) == (other["key"], other["injection"])


def test_a_shot_that_meets_nan_fails_alone(
    batch: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert batch(folder=tmp_path / "alone", items=UNLIKE, batch=1).code == 0
    real, seen = WanModel.predict_velocities, [0]

    def broken(
        self: WanModel, requests: Sequence[Request], forwards_per_pass: int | None = None
    ) -> list[Tensor]:
        seen[0] += len(requests)
        found = real(self, requests, forwards_per_pass)
        return [
            v * torch.nan if len(requests) == 5 and i == 2 and seen[0] == 10 else v
            for i, v in enumerate(found)
        ]

    monkeypatch.setattr(WanModel, "predict_velocities", broken)
    result = batch(folder=tmp_path / "together", items=UNLIKE)
    assert result.code == 1
    assert result.err.startswith("wancli: shot b: NaN or Inf at step 1, after the last block\n")
    assert result.err.count("wancli:") == 1
    assert result.out.splitlines() == [str(tmp_path / f"together/out/{name}.mp4") for name in "ac"]
    assert differ(tmp_path / "together", tmp_path / "alone", "ac") == []
    assert not list(tmp_path.glob("together/out/b.*"))


def test_measured_shots_join_a_batch_and_have_the_same_effects(
    batch: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [item | {"measure": True} for item in UNLIKE[:2]] + [UNLIKE[2] | {"measure": True}]
    read = passes(monkeypatch)
    assert batch(folder=tmp_path / "together", items=items).code == 0
    assert len(read) == STEPS + 1
    assert batch(folder=tmp_path / "alone", items=items, batch=1).code == 0
    effects = [manifest_of(tmp_path / folder, "c")["effects"] for folder in ("together", "alone")]
    assert effects[0] == effects[1]
    assert len(effects[0]) == STEPS
    assert differ(tmp_path / "together", tmp_path / "alone") == []


def test_shots_with_the_same_loras_share_a_pass_and_other_shots_do_not(
    batch: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    down, up = 0.3 * torch.randn(2, 48), 0.3 * torch.randn(48, 2)
    key = "diffusion_model.blocks.{}.self_attn.q.lora_{}.weight"
    factors = {key.format(b, side): x for b in range(4) for side, x in (("A", down), ("B", up))}
    save_file({name: tensor.clone() for name, tensor in factors.items()}, tmp_path / "style.safetensors")
    changing = {"path": str(tmp_path / "style.safetensors"), "steps": "1-2"}
    items = [
        {"id": "a", "loras": [changing]},
        {"id": "b"},
        {"id": "c", "loras": [dict(changing)], "seed": 3},
        {"id": "d", "seed": 3},
    ]
    read = passes(monkeypatch)
    result = batch(folder=tmp_path / "together", items=items)
    assert result.code == 0, result.err
    assert len(read) == 2 * STEPS - 1  # the first step is without LoRAs in all of them
    assert [Path(line).stem for line in result.out.splitlines()] == ["a", "c", "b", "d"]
    assert batch(folder=tmp_path / "alone", items=items, batch=1).code == 0
    assert differ(tmp_path / "together", tmp_path / "alone", "abcd") == []
    assert len({latents_of(tmp_path / "alone", name).sum().item() for name in "abcd"}) == 4


def test_a_batch_has_one_bar_that_names_its_shots(
    tmp_path: Path, quick: Path, warm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [{"id": name, "seed": ord(name)} for name in "abc"]
    job = tiny_job(quick, output="out/{id}.mp4", memory=STREAMED, items=items)
    path = write_job(tmp_path, job)
    result = run_wancli(capsys, "plan", path, "-v", "--cache-dir", warm)
    assert "up to 3 shots share each pass over the weights" in result.out
    assert "one of 3 shots on each pass over the weights" in result.out
    result = run_wancli(capsys, "render", path, "--progress", "plain", "--cache-dir", warm)
    sampling = [line for line in result.err.splitlines() if line.startswith("[1-3/3] sample ")]
    assert sampling[0] == "[1-3/3] sample 3 shots, a to c: started, 2 steps"
    assert len(sampling) == 2


# ---- nothing is lost ----


def test_all_latents_of_a_batch_are_on_disk_before_one_is_decoded(
    batch: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = mp4.write_mp4

    def write(*arguments: Any, **options: Any) -> None:
        assert {f"{name}.latents.safetensors" for name in "abc"} <= set(files_in(tmp_path))
        real(*arguments, **options)

    monkeypatch.setattr(mp4, "write_mp4", write)
    assert batch(items=UNLIKE).code == 0


def test_shots_with_a_latent_are_published_first_and_the_rest_share_passes(
    batch: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert batch(items=UNLIKE[1:2]).code == 0
    (tmp_path / "out/b.mp4").unlink()
    calls = count_forwards(monkeypatch)
    result = batch(items=UNLIKE)
    assert [Path(line).stem for line in result.out.splitlines()] == ["b", "a", "c"]
    assert len(calls) == 2 * 2 * STEPS
    assert manifest_of(tmp_path, "c")["shot"]["sharing"] == 2


# ---- which, and how many ----


def batch_sizes(shots: Sequence[Shot]) -> list[int]:
    schedule = batching.build_schedule(shots)
    return [schedule.placement(shot).batch_size for shot in shots]


def test_the_memory_limit_is_read_once_and_a_render_executes_the_schedule_of_the_plan(
    tmp_path: Path, quick: Path, warm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    free = memory_policy.read_free_memory("cpu")
    monkeypatch.setattr(memory_policy, "read_free_memory", lambda device: [reads.append(device), free][1])
    items = [{"seed": seed} for seed in range(3)] + [{"size": "96x64"}]
    job = tiny_job(quick, output=f"{tmp_path}/{{item}}.mp4", memory=STREAMED, items=items)
    plan = planning.build_plan(load(write_job(tmp_path, job)), warm / "memo.json")
    context = RenderContext(Store(warm / "embeddings"), Progress())
    assert preflight(plan, context).schedule is plan.schedule
    assert reads == ["cpu"]
    assert {shot.model.memory_limit for shot in plan.shots} == {free}
    plan.shots[1].output.write_bytes(b"of another program")
    schedule = preflight(plan, context).schedule
    assert [shot.index for shot in schedule.shots] == [0, 2, 3]
    assert [schedule.placement(shot).batch_size for shot in schedule.shots] == [3] * 3
    assert reads == ["cpu"]


def test_shots_with_the_same_steps_weights_and_batch_share_passes(decide: Callable[..., list[Shot]]) -> None:
    shots = decide(
        {"seed": 1},
        {"prompt": FISH, "size": "64x96", "frames": 5, "inject": [rule(blocks=1)]},
        {"sampler": {"solver": "euler", "shift": 2, "guidance": 1}, "negative": "rain"},
        {"sampler": {"steps": 4}},
        {"batch": 2},
        {"batch": 1},
    )
    assert batch_sizes(shots) == [3, 3, 3, 1, 1, 1]


def test_without_batch_at_most_eight_shots_share_a_pass_and_none_if_weights_are_resident(
    decide: Callable[..., list[Shot]],
) -> None:
    seeds = [{"seed": seed} for seed in range(19)]
    assert batch_sizes(decide(*seeds)) == [8] * 16 + [3] * 3
    assert set(batch_sizes(decide(*seeds, memory={"residency": "resident"}))) == {1}
    resident = decide(*seeds, memory={"residency": "resident"}, batch=4)
    assert batch_sizes(resident) == [4] * 16 + [3] * 3


def test_on_a_gpu_shots_share_passes_only_as_the_job_says(decide: Callable[..., list[Shot]]) -> None:
    def groups(**said: Any) -> list[int]:
        shots = decide(*({"seed": seed} for seed in range(4)), **said)
        there = [replace(shot, model=replace(shot.model, device="cuda")) for shot in shots]
        return [len(batch) for round_ in batching.build_schedule(there).rounds for batch in round_]

    assert groups() == [1] * 4
    assert groups(batch=2) == [2, 2]


def test_a_worker_claims_eight_shots_at_once_or_as_many_as_the_job_says(
    decide: Callable[..., list[Shot]],
) -> None:
    late = [{"inject": [rule(blocks=0, strength=n / 10, steps="1-1")]} for n in range(1, 11)]

    def sizes(**said: Any) -> list[int]:
        return [sum(map(len, round_)) for round_ in batching.build_schedule(decide(*late, **said)).rounds]

    assert sizes(memory={"residency": "resident"}) == [8, 2]
    assert sizes(batch=10) == [10]


def test_the_memory_of_a_batch_is_the_weights_once_and_every_forward(
    decide: Callable[..., list[Shot]],
) -> None:
    config = decide({})[0].model.checkpoint.transformer_config
    one, *_ = same = decide({}, {"seed": 1}, {"seed": 2})
    rows = sum(text.rows for text in one.prompts)
    expected = memory_model.sample_coefficients(config, element_bytes=4, blocks_in_memory=2).phase(
        one.latent_shape, text_rows=rows, forwards_per_pass=6, shots=3
    )
    assert batching.predict_batch(same) == expected == batching.build_schedule(same).phases(same[2])[1]
    small, large = decide({"sampler": {"guidance": 1}}, {"size": "128x128", "negative": "rain"})
    alone = [
        memory_model.sample_coefficients(config, element_bytes=4, blocks_in_memory=2).phase(
            shot.latent_shape, text_rows=0, forwards_per_pass=forwards
        )
        for shot, forwards in ((small, 1), (large, 2))
    ]
    stream = small.tokens * 4 * (config.dim + config.head_dim)
    assert batching.predict_batch([small, large]).activation == alone[1].activation + stream


def test_as_many_shots_share_a_pass_as_fit_into_memory(
    decide: Callable[..., list[Shot]], render: Callable[..., CommandResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [{"seed": seed, "id": f"{seed}", "frames": 4001} for seed in range(5)]
    three = batching.predict_batch(decide(*items)[:3]).total
    process = memory_estimate.process_bytes(decide({})[0].model)
    monkeypatch.setattr(memory_policy, "read_free_memory", lambda _: process + three)
    assert batch_sizes(decide(*items)) == [3] * 3 + [2] * 2
    result = render(items=items, output="{id}.mp4", memory=STREAMED, batch=5)
    assert result.code == 5
    assert result.err.startswith("wancli: shot 0, one of 5 by `batch`: sample needs ")


@pytest.mark.parametrize(
    ("said", "problem"), [(0, "0"), ("many", "'many'"), (True, "True"), (1.5, "1.5")], ids=str
)
def test_a_batch_is_a_number_or_auto(render: Callable[..., CommandResult], said: Any, problem: str) -> None:
    result = render(batch=said)
    assert result.code == 2
    assert "batch" in result.err
    assert problem in result.err or str(said).lower() in result.err
