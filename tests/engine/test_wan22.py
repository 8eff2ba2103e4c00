"""Wan 2.2 from job to latents: A14B's two experts and TI2V-5B, against diffusers' WanPipeline."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from jobs import (
    CAT,
    FISH,
    KEPT,
    NETWORKS,
    TINY,
    TRANSFORMER,
    CommandResult,
    change_tensors,
    checkpoint,
    count_forwards,
    files_in,
    latents_of,
    manifest_of,
    rule,
    run_wancli,
    tiny_job,
    write_job,
)
from oracles import relative_error
from saved_pipelines import SavedPipeline, random_transformer, random_vae22
from torch import Tensor

from wancli.errors import CheckpointError, JobError
from wancli.job.loader import load
from wancli.models.dit import Request, WanModel
from wancli.models.vae22 import LATENT_MEAN, LATENT_STD
from wancli.models.variants import T2V, TI2V, TWO_EXPERTS
from wancli.plan import batching
from wancli.plan import planner as planning
from wancli.plan.planner import resolve_model
from wancli.plan.prefix_sharing import PrefixTree
from wancli.plan.shot import Shot
from wancli.sampling.solvers import build_sigma_schedule
from wancli.sampling.stages import Stage, split_stages
from wancli.video import mp4
from wancli.weights import loader
from wancli.weights.checkpoint import identify
from wancli.weights.loader import load_transformer, load_vae

STEPS, SHIFT, SEED = 6, 12.0, 11  # four steps of high noise, two of low
NEGATIVE = "crowded market, fog"
SAMPLER = {"steps": STEPS, "shift": SHIFT}


class Saved(SavedPipeline):
    def __init__(self, folder: Path, vae: AutoencoderKLWan, **settings: Any) -> None:
        super().__init__(folder, WanPipeline, vae, SHIFT, **settings)

    def latents(self, shape: tuple[int, ...], prompt: str = CAT, later: str = CAT, **call: Any) -> Tensor:
        """Their whole pipeline from our noise; after four steps it reads the prompt `later`."""

        def swap(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            return {"prompt_embeds": self.context(later)} if step == 3 else {}

        return super().latents(
            shape, SEED, prompt, NEGATIVE,
            height=64, width=64, num_frames=5, num_inference_steps=STEPS, callback_on_step_end=swap, **call,
        )  # fmt: skip


@pytest.fixture(scope="module")
def a14b(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    torch.manual_seed(0)
    experts = {"transformer": random_transformer(), "transformer_2": random_transformer()}
    return Saved(
        tmp_path_factory.mktemp("a14b"), AutoencoderKLWan(base_dim=4), boundary_ratio=0.875, **experts
    )


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    torch.manual_seed(0)
    return Saved(
        tmp_path_factory.mktemp("ti2v"),
        random_vae22(),
        transformer=random_transformer(48, 48),
        expand_timesteps=True,
    )


@pytest.fixture
def render(
    tmp_path: Path, warm: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., CommandResult]:
    monkeypatch.setenv("WANCLI_CACHE", str(warm))

    def rendered(saved: Saved, *options: str, folder: Path = tmp_path, **changes: Any) -> CommandResult:
        said = {"negative": NEGATIVE, "seed": SEED, "frames": 5, "sampler": SAMPLER, "video": KEPT} | changes
        return run_wancli(capsys, "render", "-q", *options, write_job(folder, tiny_job(saved.folder, **said)))

    return rendered


@pytest.fixture
def decide(tmp_path: Path, warm: Path) -> Callable[..., Shot]:
    def decided(folder: Path, **said: Any) -> Shot:
        job = {"model": str(folder), "prompt": CAT, **said}
        (shot,) = planning.build_plan(load(write_job(tmp_path, job)), warm / "hashes.json").shots
        return shot

    return decided


# ---- which steps are whose ----


@pytest.mark.parametrize(
    ("steps", "shift", "boundary", "high"), [(40, 12.0, 0.875, 26), (40, 5.0, 0.9, 15), (1, 12.0, 0.875, 1)]
)
def test_the_steps_of_the_official_defaults_are_shared_as_in_the_official_code(
    steps: int, shift: float, boundary: float, high: int
) -> None:
    found = split_stages(build_sigma_schedule("unipc", steps, shift).timesteps, boundary, 4.0, 3.0)
    assert found[0] == Stage("high", range(high), 4.0)
    assert found[1:] == ((Stage("low", range(high, steps), 3.0),) if high < steps else ())


def test_of_four_distilled_steps_each_expert_takes_two() -> None:
    found = split_stages(build_sigma_schedule("distill4", 4, 5.0).timesteps, 0.875, 1.0, 1.0)
    assert [stage.steps for stage in found] == [range(2), range(2, 4)]


def test_a_timestep_on_the_boundary_is_of_high_noise() -> None:
    assert [stage.steps for stage in split_stages([900.0, 875.0, 874.9], 0.875, 1.0, 1.0)] == [
        range(2),
        range(2, 3),
    ]


def test_one_network_takes_all_steps() -> None:
    assert split_stages([900.0, 100.0], None, 5.0, None) == (Stage("only", range(2), 5.0),)


# ---- what a job gets where it says nothing ----


def test_a14b_has_its_official_defaults(a14b: Saved, decide: Callable[..., Shot]) -> None:
    shot = decide(a14b.folder)
    assert (shot.width, shot.height, shot.frames, shot.fps) == (1280, 720, 81, 16)
    assert shot.latent_shape == (16, 21, 90, 160)
    assert (shot.steps, shot.shift) == (40, 12.0)
    assert shot.stages == (Stage("high", range(26), 4.0), Stage("low", range(26, 40), 3.0))


def test_ti2v_has_its_official_defaults(ti2v: Saved, decide: Callable[..., Shot]) -> None:
    shot = decide(ti2v.folder)
    assert (shot.width, shot.height, shot.frames, shot.fps) == (1280, 704, 121, 24)
    assert shot.latent_shape == (48, 31, 44, 80)
    assert shot.tokens == 27_280
    assert (shot.steps, shot.shift, shot.stages) == (50, 5.0, (Stage("only", range(50), 5.0),))
    with pytest.raises(JobError, match=r"80x64 is not made of multiples of 32; nearest is 64x64"):
        decide(ti2v.folder, size="80x64")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"guidance": 2.5}, [2.5, 2.5]),
        ({"guidance": {"high": 3, "low": 1}}, [3, 1]),
        ({"guidance": 1}, [1, 1]),
    ],
)
def test_guidance_is_one_number_for_both_experts_or_one_for_each(
    a14b: Saved, decide: Callable[..., Shot], said: dict[str, Any], expected: list[float]
) -> None:
    shot = decide(a14b.folder, sampler=said)
    assert [stage.guidance for stage in shot.stages] == expected
    assert (shot.negative is None) == (expected == [1, 1])


def test_both_guidances_change_the_key(a14b: Saved, decide: Callable[..., Shot]) -> None:
    pairs = [(4, 3), (3, 4), (4, 4), (3, 3)]
    shots = [decide(a14b.folder, sampler={"guidance": {"high": h, "low": low}}) for h, low in pairs]
    assert len({shot.latents_key for shot in shots}) == len(pairs)


def test_a_change_of_either_expert_changes_the_key(
    a14b: Saved, decide: Callable[..., Shot], tmp_path: Path
) -> None:
    folder = shutil.copytree(a14b.folder, tmp_path / "copy")
    found = [decide(folder).latents_key]
    for name in ("transformer", "transformer_2"):
        change_tensors(folder / name / TRANSFORMER, lambda tensors: tensors["proj_out.bias"].add_(1))
        found.append(decide(folder).latents_key)
    assert len(set(found)) == 3


def test_settings_of_experts_are_refused_if_there_is_one_network(
    ti2v: Saved, decide: Callable[..., Shot]
) -> None:
    for said, where in (
        ({"sampler": {"guidance": {"high": 4, "low": 3}}}, r":4: sampler.guidance"),
        ({"inject": [{"prompt": FISH, "expert": "low"}]}, r":6: inject.0.expert"),
        ({"sampler": {"boundary": 0.9}}, r":4: sampler.boundary"),
    ):
        with pytest.raises(JobError, match=f"{where}: the model has one network for all steps"):
            decide(ti2v.folder, **said)


# ---- the latents are those of diffusers ----


@pytest.mark.parametrize("low", [3.0, 1.0])
@torch.inference_mode()
def test_two_experts_give_the_latents_of_diffusers(
    a14b: Saved,
    render: Callable[..., CommandResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    low: float,
) -> None:
    calls = count_forwards(monkeypatch)
    said = render(a14b, sampler=SAMPLER | {"guidance": {"high": 4.0, "low": low}})
    assert said.code == 0, said.err
    expected = a14b.latents((16, 2, 8, 8), guidance_scale=4.0, guidance_scale_2=low)
    assert relative_error(latents_of(tmp_path), expected) < 1e-4
    assert len(calls) == 4 * 2 + 2 * (1 if low == 1 else 2)
    for other in (
        {"guidance_scale": low + 1, "guidance_scale_2": 4.0},
        {"guidance_scale": 4.0, "later": FISH},
    ):
        assert relative_error(a14b.latents((16, 2, 8, 8), **other), expected) > 1e-2
    assert manifest_of(tmp_path)["shot"]["stages"] == [
        {"expert": "high", "steps": [0, 3], "guidance": 4.0},
        {"expert": "low", "steps": [4, 5], "guidance": low},
    ]
    assert [p["name"] for p in manifest_of(tmp_path)["phases"]] == [
        "encode",
        *["load", "sample"] * 2,
        "decode",
    ]


@torch.inference_mode()
def test_the_boundary_of_a_job_gives_the_latents_of_diffusers_with_that_boundary(
    a14b: Saved, render: Callable[..., CommandResult], tmp_path: Path
) -> None:
    said = render(a14b, sampler=SAMPLER | {"boundary": 0.8})
    assert said.code == 0, said.err
    a14b.pipe.register_to_config(boundary_ratio=0.8)
    try:
        expected = a14b.latents((16, 2, 8, 8), guidance_scale=4.0, guidance_scale_2=3.0)
    finally:
        a14b.pipe.register_to_config(boundary_ratio=0.875)
    assert relative_error(latents_of(tmp_path), expected) < 1e-4
    record = manifest_of(tmp_path)["shot"]
    assert record["boundary"] == 0.8
    assert [stage["steps"] for stage in record["stages"]] == [[0, 4], [5, 5]]


def test_a_boundary_changes_the_key_and_which_steps_shots_share(
    a14b: Saved, decide: Callable[..., Shot]
) -> None:
    def shot(index: int, **sampler: Any) -> Shot:
        return replace(decide(a14b.folder, sampler=SAMPLER | {"guidance": 4.0} | sampler), index=index)

    plain, same, early, late = (
        shot(index, **said)
        for index, said in enumerate(({}, {"boundary": 0.875}, {"boundary": 0.8}, {"boundary": 1}))
    )
    assert plain.latents_key == same.latents_key
    assert len({shot.latents_key for shot in (same, early, late)}) == 3
    tree = PrefixTree()
    assert tree.add(plain) is None
    fork = tree.add(early)
    assert fork is not None
    assert fork.step == len(plain.stages[0].steps) == 4
    assert late.stages == (Stage("low", range(6), 4.0),)


@pytest.mark.parametrize(
    ("expert", "prompts"), [("low", (CAT, FISH)), ("high", (FISH, CAT)), ("both", (FISH, FISH))]
)
@torch.inference_mode()
def test_a_rule_for_one_expert_is_another_prompt_in_its_steps(
    a14b: Saved, render: Callable[..., CommandResult], tmp_path: Path, expert: str, prompts: tuple[str, str]
) -> None:
    replaced = rule(blocks="all", strength=1, blend="replace", expert=expert)
    assert render(a14b, inject=[replaced]).code == 0
    first, later = prompts
    expected = a14b.latents((16, 2, 8, 8), first, later, guidance_scale=4.0, guidance_scale_2=3.0)
    assert relative_error(latents_of(tmp_path), expected) < 1e-4
    steps = {"high": range(4), "low": range(4, 6), "both": range(6)}[expert]
    assert manifest_of(tmp_path)["injection"][0]["hits_by_step"] == {str(step): 3 for step in steps}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@torch.inference_mode()
def test_ti2v_gives_the_latents_and_frames_of_diffusers(
    ti2v: Saved, render: Callable[..., CommandResult], tmp_path: Path
) -> None:
    said = render(ti2v)
    assert said.code == 0, said.err
    ours, expected = latents_of(tmp_path), ti2v.latents((48, 2, 4, 4), guidance_scale=5.0)
    assert relative_error(ours, expected) < 1e-4
    assert relative_error(ti2v.latents((48, 2, 4, 4), FISH, FISH, guidance_scale=5.0), expected) > 1e-2
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (LATENT_MEAN, LATENT_STD))
    frames = ti2v.pipe.vae.decode((expected * std + mean)[None]).sample[0]
    again = torch.cat(list(load_vae(identify(ti2v.folder), "cpu").decode(ours)), dim=1)
    assert (again - frames).abs().max() < 1e-3
    shown = list(mp4.read_frames(tmp_path / "out" / "clip.mp4"))
    assert [(frame.width, frame.height) for frame in shown] == [(64, 64)] * 5
    assert manifest_of(tmp_path)["shot"]["fps"] == 24


# ---- one expert at a time ----


def watch_loading(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The experts in the order in which they are loaded; no two of them may be alive."""
    NETWORKS.clear()
    real = loader.load_transformer
    loaded: list[str] = []
    alive: weakref.WeakSet[WanModel] = weakref.WeakSet()

    def watched(*arguments: Any) -> WanModel:
        assert not alive
        network = real(*arguments)
        alive.add(network)
        loaded.append(arguments[2])
        return network

    monkeypatch.setattr(loader, "load_transformer", watched)
    return loaded


ITEMS = [
    {"id": "a"},
    {"id": "b", "seed": 5, "inject": [rule(blocks="late", expert="low")]},
    {"id": "c", "frames": 1},
]


@pytest.fixture(scope="module")
def alone(a14b: Saved, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The latents of ITEMS, each rendered by itself."""
    from wancli.cli import run

    folder = tmp_path_factory.mktemp("alone")
    for item in ITEMS:
        said = {"negative": NEGATIVE, "seed": SEED, "frames": 5, "sampler": SAMPLER, "video": KEPT} | item
        path = write_job(folder, tiny_job(a14b.folder, output="out/{id}.mp4", **said))
        assert run(["render", "-q", str(path)]) == 0
    return {item["id"]: latents_of(folder, item["id"]) for item in ITEMS}


@pytest.mark.parametrize(
    ("waiting", "order"),
    [(batching.MAX_WAITING_BYTES, ["high", "low"]), (0, ["high", "low"] * 3), (70_000, ["high", "low"] * 2)],
)
def test_a_batch_takes_its_high_noise_steps_before_the_expert_is_changed(
    a14b: Saved,
    render: Callable[..., CommandResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    alone: dict[str, Tensor],
    waiting: int,
    order: list[str],
) -> None:
    monkeypatch.setattr(batching, "MAX_WAITING_BYTES", waiting)
    loaded = watch_loading(monkeypatch)
    assert render(a14b, output="out/{id}.mp4", items=ITEMS).code == 0
    assert loaded == order
    for name, expected in alone.items():
        assert torch.equal(latents_of(tmp_path, name), expected)


@pytest.mark.parametrize("residency", ["resident", "streamed"])
def test_shots_that_differ_for_the_low_noise_expert_share_all_steps_of_the_other(
    a14b: Saved, render: Callable[..., CommandResult], tmp_path: Path, residency: str
) -> None:
    items = [
        {"id": "a"},
        {"id": "b", "inject": [rule(blocks="late", expert="low")]},
        {"id": "c", "sampler": SAMPLER | {"guidance": {"high": 4.0, "low": 1.0}}},
        {"id": "d", "inject": [rule(blocks="late", steps=5)]},
    ]
    rendered = partial(render, a14b, output="out/{id}.mp4", memory={"residency": residency})
    with pytest.MonkeyPatch.context() as patched:
        calls = count_forwards(patched)
        assert rendered(items=items).code == 0
    assert len(calls) == 2 * 4 + 2 * 2 + 2 * 2 + 2 + 2
    for item in items:
        assert rendered(items=[item], folder=tmp_path / "alone").code == 0
        name = str(item["id"])
        found, whole = manifest_of(tmp_path, name), manifest_of(tmp_path / "alone", name)
        assert torch.equal(latents_of(tmp_path, name), latents_of(tmp_path / "alone", name))
        assert found["injection"] == whole["injection"]


def test_a_block_map_has_levels_of_both_experts(
    a14b: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = watch_loading(monkeypatch)
    said = {"negative": NEGATIVE, "frames": 5, "sampler": SAMPLER, "inject": [rule(blocks="all")]}
    path = write_job(tmp_path, tiny_job(a14b.folder, **said))
    probed = run_wancli(capsys, "probe", path, "--levels", "3", "--json", "-q")
    assert probed.code == 0, probed.err
    assert loaded == ["high", "low"]
    assert len(json.loads(probed.out)["values"]) == 3


def test_a_shot_that_fails_in_its_high_noise_steps_stops_no_other(
    a14b: Saved,
    render: Callable[..., CommandResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    alone: dict[str, Tensor],
) -> None:
    real = WanModel.predict_velocities
    calls: list[int] = []

    def broken(
        self: WanModel, requests: Sequence[Request], forwards_per_pass: int | None = None
    ) -> list[Tensor]:
        found = []
        for velocity in real(self, requests, forwards_per_pass):
            calls.append(1)
            found.append(velocity * (torch.nan if len(calls) == 9 else 1))
        return found

    monkeypatch.setattr(WanModel, "predict_velocities", broken)
    said = render(a14b, output="out/{id}.mp4", items=ITEMS)
    assert said.code == 1
    assert said.err.splitlines()[0] == "wancli: shot b: NaN or Inf at step 0, after the last block"
    for name in "ac":
        assert torch.equal(latents_of(tmp_path, name), alone[name])
    assert not list(tmp_path.glob("out/b.*"))


def test_a_shot_whose_latent_exists_is_only_decoded(
    a14b: Saved, render: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered = partial(render, a14b, output="out/{id}.mp4")
    assert rendered(items=ITEMS[:1]).code == 0
    loaded = watch_loading(monkeypatch)
    again = {"video": KEPT | {"crf": 30}}
    assert rendered("--force", items=ITEMS[:1], **again).code == 0
    assert loaded == []  # only the video differs
    for name in ("a.mp4", "a.manifest.json"):
        (tmp_path / "out" / name).unlink()
    calls = count_forwards(monkeypatch)
    assert rendered(items=ITEMS, **again).code == 0
    assert len(calls) == 2 * 2 * STEPS
    assert loaded == ["high", "low"]


def killed_between_experts(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Ctrl-C while the low-noise expert is loaded."""
    NETWORKS.clear()
    real = loader.load_transformer

    def killed(*arguments: Any) -> WanModel:
        if arguments[2] == "low":
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(loader, "load_transformer", killed)
    return monkeypatch


@pytest.mark.parametrize("residency", ["resident", "streamed"])
def test_a_batch_killed_between_its_experts_resumes_with_the_second(
    a14b: Saved,
    render: Callable[..., CommandResult],
    tmp_path: Path,
    alone: dict[str, Tensor],
    residency: str,
) -> None:
    items = [item | {"measure": item["id"] == "b"} for item in ITEMS]
    rendered = partial(render, a14b, output="out/{id}.mp4", items=items, memory={"residency": residency})
    with pytest.MonkeyPatch.context() as patched:
        killed_between_experts(patched)
        assert rendered().code == 130
    assert files_in(tmp_path) == [f"{name}.state.safetensors" for name in "abc"]
    with pytest.MonkeyPatch.context() as patched:
        loaded, calls = watch_loading(patched), count_forwards(patched)
        said = rendered()
    assert said.code == 0, said.err
    assert loaded == ["low"]
    assert len(calls) == 3 * 2 * 2 + 2  # and two more that measure b
    for name, expected in alone.items():
        assert torch.equal(latents_of(tmp_path, name), expected)
    assert not list(tmp_path.glob("out/*.state*"))
    assert rendered(folder=tmp_path / "whole").code == 0
    for name in "abc":
        found, whole = manifest_of(tmp_path, name), manifest_of(tmp_path / "whole", name)
        for key in ("key", "shot", "injection", "effects"):
            assert found[key] == whole[key], key
        names = [[phase["name"] for phase in body["phases"]] for body in (found, whole)]
        assert names[0] == names[1] == ["encode", *["load", "sample"] * 2, "decode"]


def test_the_state_of_another_job_or_a_damaged_one_is_moved_aside(
    a14b: Saved, render: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered = partial(render, a14b, output="out/{id}.mp4", items=ITEMS[:2])
    with pytest.MonkeyPatch.context() as patched:
        killed_between_experts(patched)
        assert rendered().code == 130
    state = tmp_path / "out" / "a.state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    calls = count_forwards(monkeypatch)
    assert rendered(prompt=FISH).code == 0
    assert len(calls) == 2 * 2 * STEPS
    assert [name for name in files_in(tmp_path) if "state" in name] == [
        "a.state.old-1.safetensors",
        "b.state.old-1.safetensors",
    ]


def test_streamed_experts_are_read_once_a_step_for_a_whole_batch(
    a14b: Saved, render: Callable[..., CommandResult], tmp_path: Path, alone: dict[str, Tensor]
) -> None:
    passes: list[int] = []
    with pytest.MonkeyPatch.context() as patched:
        real = WanModel._forward_group

        def counted(self: WanModel, *arguments: Any) -> list[Tensor]:
            passes.append(len(arguments[0]))
            return real(self, *arguments)

        patched.setattr(WanModel, "_forward_group", counted)
        said = render(a14b, output="out/{id}.mp4", items=ITEMS, memory={"residency": "streamed"})
    assert said.code == 0, said.err
    assert passes == [6] * STEPS
    for name, expected in alone.items():
        assert torch.equal(latents_of(tmp_path, name), expected)
    memory_of = {name: manifest_of(tmp_path, name)["predicted"][1] for name in "abc"}
    assert memory_of["a"] == memory_of["b"] == memory_of["c"]


def test_states_that_wait_for_the_other_expert_count_in_the_prediction(
    a14b: Saved, tmp_path: Path, warm: Path
) -> None:
    items = [{"id": "a"}, {"id": "b"}, {"id": "c", "frames": 1}]
    job = tiny_job(a14b.folder, output="{id}.mp4", items=items, frames=5)
    together = planning.build_plan(load(write_job(tmp_path, job)), warm / "memo.json")
    job["items"] = items[:1]
    single = planning.build_plan(load(write_job(tmp_path, job)), warm / "memo.json")
    state = 4 * 4 * 16 * 8 * 8  # x, two x0 and the last x, per latent frame
    alone = single.schedule.phases(single.shots[0])[1]
    first, _, last = (together.schedule.phases(shot)[1] for shot in together.shots)
    assert first.buffer - alone.buffer == (2 + 1) * state
    assert last.activation < alone.activation


# ---- checkpoints ----


def test_official_folders_of_two_experts_are_read(tmp_path: Path) -> None:
    root = checkpoint(tmp_path)
    assert identify(root).variant == T2V
    for name in ("low_noise_model", "high_noise_model"):
        (root / name).mkdir()
        for file in (TRANSFORMER, "config.json"):
            shutil.copy(root / file, root / name)
    (root / TRANSFORMER).unlink()
    change_tensors(
        root / "high_noise_model" / TRANSFORMER, lambda tensors: tensors["head.head.bias"].fill_(7)
    )
    found = identify(root)
    assert (found.variant, found.root) == (TWO_EXPERTS, root)
    high, low = (load_transformer(found, expert=expert) for expert in ("high", "low"))
    assert (high.get_parameter("head.head.bias") == 7).all()
    one = load_transformer(identify(TINY)).state_dict()
    assert all(torch.equal(one[name], value) for name, value in low.state_dict().items())


def test_experts_of_different_sizes_are_refused(tmp_path: Path, a14b: Saved) -> None:
    root = shutil.copytree(a14b.folder, tmp_path / "copy")

    def shorten(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("blocks.2.")]:
            del tensors[name]

    change_tensors(root / "transformer" / TRANSFORMER, shorten)
    (root / "transformer" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"transformer"):
        identify(root)


def test_a_vae_of_the_other_generation_is_refused(tmp_path: Path, ti2v: Saved, a14b: Saved) -> None:
    assert identify(ti2v.folder).variant == TI2V
    root = shutil.copytree(ti2v.folder, tmp_path / "copy")
    shutil.rmtree(root / "vae")
    shutil.copytree(a14b.folder / "vae", root / "vae")
    with pytest.raises(CheckpointError, match=r"a VAE of 16 latent channels; the transformer makes 48"):
        resolve_model(root, "cpu", "fp32", tmp_path / "memo")
