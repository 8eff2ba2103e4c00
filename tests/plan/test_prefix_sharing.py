"""Steps that shots share are taken once, and the latents stay the same."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
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

from wancli.cli import run
from wancli.job.loader import load
from wancli.models.dit import Request, WanModel
from wancli.plan import batching
from wancli.plan import planner as planning
from wancli.plan.prefix_sharing import Fork, PrefixTree
from wancli.plan.shot import Shot
from wancli.sampling.stages import Stage

STEPS = 6
LEFT = {"region": [0, 0, 0.4, 1], "feather": 0.2}
HALF: list[dict[str, Any]] = [
    {"id": "plain"},
    *(
        {"id": f"{blocks}-{strength}", "inject": [rule(blocks=blocks, strength=strength, steps="50-100%")]}
        for blocks, strength in (("early", 0.3), ("early", 0.6), ("early", 1.0), ("late", 0.6), ("late", 1.0))
    ),
    {"id": "both", "inject": [rule(blocks="all", branch="both", steps="50-100%", **LEFT)]},
    {
        "id": "tuned",
        "inject": [rule(words="fish", blocks="late", steps="50-100%")],
        "emphasis": [{"words": "cat", "weight": 1.5, "steps": "50-100%"}],
        "steer": [{"toward": ["warm light"], "strength": 0.5, "steps": "50-100%", **LEFT}],
    },
]
NAMES = [str(item["id"]) for item in HALF]

Decide = Callable[..., list[Shot]]
Render = Callable[..., CommandResult]


@pytest.fixture
def decide(tmp_path: Path, quick: Path, warm: Path) -> Decide:
    def decided(*items: dict[str, Any], **said: Any) -> list[Shot]:
        job = {"output": "{item}.mp4", "sampler": {"steps": 10}, "items": list(items)} | said
        path = write_job(tmp_path, tiny_job(quick, **job))
        return list(planning.build_plan(load(path), warm / "memo.json").shots)

    return decided


@pytest.fixture
def sweep(render: Render) -> Render:
    """Render items that keep their latents."""

    def rendered(*options: str, **changes: Any) -> CommandResult:
        said = {"output": "out/{id}.mp4", "sampler": {"steps": STEPS}, "video": KEPT, "items": HALF}
        return render(*options, **said | changes)

    return rendered


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, quick: Path, warm: Path) -> Path:
    """Where each of HALF was rendered by itself."""
    folder = tmp_path_factory.mktemp("alone")
    for item in HALF:
        said = {"output": "out/{id}.mp4", "sampler": {"steps": STEPS}, "video": KEPT}
        path = write_job(folder, tiny_job(quick, **said, **item))
        assert run(["render", "-q", str(path), "--cache-dir", str(warm)], NETWORKS) == 0
    return folder


def forks(shots: Sequence[Shot]) -> list[tuple[int, int] | None]:
    schedule = batching.build_schedule(shots)
    found = [schedule.placement(shot).fork for shot in shots]
    return [fork and (fork.parent, fork.step) for fork in found]


def differ(folder: Path, other: Path) -> list[str]:
    return [name for name in NAMES if not torch.equal(latents_of(folder, name), latents_of(other, name))]


# ---- which steps are shared ----


def test_shots_share_the_steps_before_anything_they_read_differs(decide: Decide) -> None:
    shots = decide(
        {},
        {"inject": [rule(blocks=0, steps="4-9")]},
        {"inject": [rule(blocks=0, steps="4-9"), rule(blocks=1, steps="7-9")]},
        {"inject": [rule(blocks=0, steps="2-9")]},
        {"inject": [rule(blocks=0, steps=9)]},
        {"seed": 1},
        {"seed": 1, "inject": [rule(blocks=0, steps="4-9")]},
    )
    assert forks(shots) == [None, (0, 4), (1, 7), (0, 2), (0, 9), None, (5, 4)]


def test_sharing_depends_on_what_steps_read_and_not_on_how_rules_are_written(decide: Decide) -> None:
    shots = decide(
        {"inject": [rule(blocks="early", steps="0-50%")]},
        {"inject": [rule(blocks=[0, 1], steps="0-4", branch="cond")]},
        {"inject": [rule(blocks=0, steps="0-4"), rule(blocks=1, steps="0-6")]},
        {"inject": [rule(blocks=[0, 1], steps="0-4"), rule(blocks=2, strength=0, steps="0-2")]},
    )
    assert forks(shots) == [None, (0, 10), (0, 5), (0, 10)]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"prompt": FISH},
        {"negative": "rain"},
        {"size": "64x96"},
        {"frames": 5},
        {"sampler": {"steps": 10, "solver": "euler"}},
        {"sampler": {"steps": 9}},
        {"sampler": {"steps": 10, "shift": 4}},
        {"sampler": {"steps": 10, "guidance": 4}},
        {"sampler": {"steps": 10, "guidance": 1}},
        {"inject": [rule(blocks=0)]},
        {"inject": [rule(blocks=0, steps=0, branch="uncond")]},
        {"measure": True},
        {"memory": {"dtype": "bf16"}},
    ],
    ids=str,
)
def test_shots_that_differ_from_the_first_step_on_share_nothing(
    decide: Decide, change: dict[str, Any]
) -> None:
    assert forks(decide({}, change)) == [None, None]


def test_shots_whose_latents_are_the_same_share_all_steps(decide: Decide) -> None:
    assert forks(decide({}, {"video": {"crf": 30}}, {"measure": True}, {"measure": True})) == [
        None,
        (0, 10),
        None,
        (2, 10),
    ]


def test_loras_of_later_steps_do_not_prevent_sharing(decide: Decide, tmp_path: Path) -> None:
    down, up = torch.randn(2, 48), torch.randn(48, 2)
    key = "diffusion_model.blocks.0.self_attn.q.lora_{}.weight"
    save_file({key.format("A"): down, key.format("B"): up}, tmp_path / "style.safetensors")
    lora = {"path": str(tmp_path / "style.safetensors")}
    shots = decide(
        {},
        {"loras": [lora | {"steps": "6-9"}]},
        {"loras": [lora | {"steps": "6-9", "strength": 0.5}]},
        {"loras": [lora | {"steps": "6-7"}]},
        {"loras": [lora]},
    )
    assert forks(shots) == [None, (0, 6), (0, 6), (1, 8), None]


def test_a_lora_of_the_second_expert_does_not_prevent_sharing_the_steps_of_the_first(decide: Decide) -> None:
    (plain,) = decide({})
    stages = (Stage("high", range(4), 4.0), Stage("low", range(4, 10), 3.0))

    def shot(index: int, expert: str | None, noise: str = "cpu") -> Any:
        use = SimpleNamespace(sha256="ab", strength=1, blocks=None, expert=expert, steps=None)
        said = {name: getattr(plain, name) for name in ("solver", "steps", "shift", "seed", "latent_shape")}
        told = {"loras": [use] if expert else [], "stages": stages, "table": plain.table}
        unset = {"measure": False, "attention": None, "pictures": None, "reused": frozenset()}
        return SimpleNamespace(**said, **told, **unset, index=index, noise=noise)

    tree = PrefixTree()
    found = [tree.add(shot(0, None)), tree.add(shot(1, "low")), tree.add(shot(2, "high"))]
    assert found == [None, Fork(0, 4), None]
    assert tree.add(shot(3, None, noise="cuda")) is None  # other numbers from the same seed


def test_a_state_passed_to_a_fork_is_saved_before_the_other_shot_continues(
    sweep: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[bool] = []
    state = tmp_path / "out" / "early-0.3.state.safetensors"
    count_forwards(monkeypatch, lambda _: there.append(state.exists()))
    assert sweep(items=HALF[:2], save_every=1).code == 0
    # 12 forwards of the first, the second forks after 6; and 6 of its own
    assert there == [False] * 6 + [True] * 12


def test_a_shot_in_progress_forks_later_or_not_at_all(decide: Decide) -> None:
    early, late = {"inject": [rule(blocks=0, steps="4-9")]}, {"inject": [rule(blocks=0, steps="8-9")]}
    first, second, third = decide({}, early, late)
    tree = PrefixTree()
    assert tree.add(first, start=6) is None  # what it read before is not there any more
    assert tree.add(second) is None
    assert tree.add(third) == Fork(0, 8)
    tree = PrefixTree()
    assert (tree.add(first), tree.add(second, start=5)) == (None, None)
    assert tree.add(third, start=3) == Fork(0, 8)


def test_the_plan_says_how_many_steps_are_shared(
    tmp_path: Path, quick: Path, warm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tiny_job(quick, output="{id}.mp4", items=HALF, sampler={"steps": 20})
    path = write_job(tmp_path, job)
    said = run_wancli(capsys, "plan", path, "--cache-dir", warm)
    assert "sampling 90 of 160 steps; 70 are shared\n" in said.out
    document = json.loads(run_wancli(capsys, "plan", path, "--cache-dir", warm, "--json").out)
    assert document["steps"] == {"all": 160, "shared": 70}
    assert document["shots"][1]["fork"] == {"of": 0, "step": 10}


# ---- nobody can tell ----


@pytest.mark.parametrize("said", [{}, {"batch": 3}, {"memory": {"residency": "streamed"}}], ids=str)
def test_variants_that_differ_in_the_second_half_have_the_latents_of_separate_renders(
    sweep: Render,
    alone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: dict[str, Any],
) -> None:
    calls = count_forwards(monkeypatch)
    rendered = sweep("--json", **said)
    assert rendered.code == 0, rendered.err
    assert len(calls) == 2 * (STEPS + (len(HALF) - 1) * STEPS // 2)
    assert differ(tmp_path, alone) == []
    for name in NAMES:
        one, other = (manifest_of(folder, name) for folder in (tmp_path, alone))
        assert (one["key"], one["injection"]) == (other["key"], other["injection"])
        trunk, *_ = (phase for phase in one["phases"] if phase["name"] == "sample")
        assert trunk["shots"] == len(HALF)
    assert len({tuple(latents_of(alone, name).flatten().tolist()) for name in NAMES}) == len(HALF)


def test_measured_variants_have_the_effects_of_separate_renders(
    sweep: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [
        {"id": "a", "inject": [rule(blocks="0-1")], "measure": True},
        {"id": "b", "inject": [rule(blocks="0-1"), rule(blocks=3, steps="3-5")], "measure": True},
    ]
    calls = count_forwards(monkeypatch)
    assert sweep(items=items).code == 0
    assert len(calls) == 3 * (STEPS + 3)
    assert sweep(items=items[1:], folder=tmp_path / "alone").code == 0
    assert manifest_of(tmp_path, "b")["effects"] == manifest_of(tmp_path / "alone", "b")["effects"]


def test_if_no_state_may_wait_every_shot_takes_all_its_steps(
    sweep: Render, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "MAX_WAITING_BYTES", 0)
    calls = count_forwards(monkeypatch)
    assert sweep().code == 0
    assert len(calls) == 2 * STEPS * len(HALF)
    assert differ(tmp_path, alone) == []


def test_nan_in_a_shared_step_fails_all_that_share_it(
    sweep: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = WanModel.predict_velocities, []

    def broken(
        self: WanModel, requests: Sequence[Request], forwards_per_pass: int | None = None
    ) -> list[Tensor]:
        calls.append(1)
        return [v * torch.nan if len(calls) == 2 else v for v in real(self, requests, forwards_per_pass)]

    monkeypatch.setattr(WanModel, "predict_velocities", broken)
    said = sweep(items=[*HALF[:3], {"id": "other", "seed": 5}])
    assert said.code == 1
    assert said.out.splitlines() == [f"{tmp_path}/out/other.mp4"]
    for name in NAMES[:3]:
        assert f"wancli: shot {name}: NaN or Inf at step 1, after the last block" in said.err
    assert len(calls) == 2 + STEPS


# ---- and nothing is lost ----


@pytest.mark.parametrize("forward", [2, 2 * 3, 2 * 4])
def test_stopped_variants_share_the_remaining_steps_and_repeat_nothing(
    sweep: Render, alone: Path, tmp_path: Path, forward: int
) -> None:
    total = 2 * (STEPS + (len(HALF) - 1) * STEPS // 2)

    def stop(call: int) -> None:
        if call == forward:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patched:
        count_forwards(patched, stop)
        assert sweep().code == 75
    saved = [name for name in files_in(tmp_path) if "state" in name]
    assert len(saved) == (1 if forward < 2 * 2 else len(HALF))
    with pytest.MonkeyPatch.context() as patched:
        calls = count_forwards(patched)
        assert sweep().code == 0
        assert len(calls) == total - (forward + 2)
    assert differ(tmp_path, alone) == []
    assert not [name for name in files_in(tmp_path) if "state" in name]
