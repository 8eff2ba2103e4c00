"""Stage 2 through the command line: injection is proven, effects are measured, NaN is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import (
    CAT,
    FISH,
    KEPT,
    T5,
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

from wancli.errors import NotFinite
from wancli.injection.area import Area
from wancli.injection.contexts import ContextCache, Effect
from wancli.injection.exprs import Branch
from wancli.injection.table import Rule, Table
from wancli.injection.timeline import Segment, Timeline
from wancli.models.dit import Mix, Request, WanModel
from wancli.plan.warnings import CPU_SEEDS
from wancli.resources.memory_model import Residency
from wancli.sampling.denoise import (
    DenoiseRun,
    StepResult,
    check_hits,
    denoise,
    denoise_batch,
    draw_noise,
)
from wancli.sampling.solvers import State, build_sigma_schedule
from wancli.sampling.stages import Stage
from wancli.weights.checkpoint import identify
from wancli.weights.loader import LoadOptions, load_transformer

# ---- noise ----


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_a_cpu_draws_one_noise_for_seeds_with_the_same_low_32_bits(seed: int) -> None:
    noise = draw_noise((16, 3, 8, 8), seed)
    for other in (seed + CPU_SEEDS, seed + 2**62):
        assert torch.equal(draw_noise((16, 3, 8, 8), other), noise)
    assert not torch.equal(draw_noise((16, 3, 8, 8), seed + 1), noise)


# ---- injection is proven ----


@pytest.fixture
def render(render: Callable[..., CommandResult]) -> Callable[..., CommandResult]:
    """All 40 blocks."""
    return partial(render, model=str(TINY))


def test_the_hits_of_a_rule_are_those_of_its_table(
    render: Callable[..., CommandResult], tmp_path: Path
) -> None:
    rules = [rule(branch="both", steps="1-2"), rule(blocks=[3, "0-2"], blend="output-mix")]
    assert render(inject=rules, sampler={"steps": 3}).code == 0
    first, second = manifest_of(tmp_path)["injection"]
    late = {str(block): 4 for block in range(27, 40)}
    assert (first["planned"], first["hits"]) == (52, 52)
    assert first["hits_by_step"] == {"1": 26, "2": 26}
    assert first["hits_by_branch"] == {"cond": 26, "uncond": 26}
    assert first["hits_by_block"] == late
    assert (second["planned"], second["hits"]) == (12, 12)
    assert second["hits_by_branch"] == {"cond": 12}
    assert second["hits_by_block"] == {"0": 3, "1": 3, "2": 3, "3": 3}
    assert second["difference"]["a"]["text"] == CAT
    assert second["difference"]["b"]["text"] == FISH


def test_a_rule_that_a_block_ignored_fails_its_shot_and_no_other(
    render: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = WanModel.predict_velocities

    def deaf(self: WanModel, requests: Any, forwards: Any = None) -> list[torch.Tensor]:
        """Block 30 always reads the main prompt."""

        def heard(contexts: Any) -> list[Mix]:
            return [contexts.base if i == 30 else contexts[i] for i in range(len(contexts))]

        return real(self, [Request(r.x_BCTYX, r.t, heard(r.contexts)) for r in requests], forwards)

    monkeypatch.setattr(WanModel, "predict_velocities", deaf)
    items = [
        {"id": "lost", "inject": [rule()]},
        {"id": "early", "inject": [rule(blocks="early")]},
        {"id": "plain"},
    ]
    said = render("--json", output="out/{id}.mp4", items=items)
    assert said.code == 1
    assert said.err.splitlines() == [
        "wancli: shot lost: inject.0 reached 24 of 26 planned cells",
        "  This render would not show the injection, so it is not kept.",
    ]
    report = json.loads(said.out)
    assert [shot["status"] for shot in report["shots"]] == ["failed", "rendered", "rendered"]
    assert report["shots"][0]["error"]["code"] == "shot.injection_missed"
    assert [name for name in files_in(tmp_path) if "lost" in name] == []


def test_at_guidance_1_there_is_one_forward_a_step(
    render: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_forwards(monkeypatch)
    assert render(sampler={"steps": 3, "guidance": 1}, inject=[rule(branch="both")]).code == 0
    assert len(calls) == 3
    body = manifest_of(tmp_path)
    assert body["injection"][0]["hits_by_branch"] == {"cond": 39}
    assert [text["text"] for text in body["prompts"]] == [CAT, FISH]


def test_measuring_records_the_effect_on_injected_blocks_and_leaves_the_latent_alone(
    render: Callable[..., CommandResult], tmp_path: Path
) -> None:
    injected = {"inject": [rule(steps=1)], "video": KEPT}
    assert render(folder=tmp_path / "plain", **injected).code == 0
    assert render(folder=tmp_path / "measured", **injected, measure=True).code == 0
    assert render("--log-level", "verbose", folder=tmp_path / "verbose", **injected).code == 0
    assert manifest_of(tmp_path / "plain")["effects"] == []
    (effect,) = manifest_of(tmp_path / "measured")["effects"]
    assert (effect["step"], effect["branch"]) == (1, "cond")
    assert [int(block) for block in effect["blocks"]] == list(range(27, 40))
    assert all(value > 0 for value in effect["blocks"].values())
    assert effect["velocity"] > 0
    assert effect["changed_percent"].keys() == effect["blocks"].keys()
    assert manifest_of(tmp_path / "verbose")["effects"] == [effect]
    for name in ("measured", "verbose"):
        assert torch.equal(latents_of(tmp_path / name), latents_of(tmp_path / "plain"))


# ---- NaN ----


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.7.ffn.2.bias", "NaN or Inf at step 0, cond branch, first in block 7"),
        ("patch_embedding.weight", "NaN or Inf at step 0, cond branch, first in block 0"),
        ("head.head.bias", "NaN or Inf at step 0, after the last block"),
    ],
)
def test_nan_in_the_weights_is_named_and_nothing_is_written(
    render: Callable[..., CommandResult], tmp_path: Path, name: str, message: str
) -> None:
    model = checkpoint(tmp_path)
    change_tensors(model / TRANSFORMER, lambda tensors: tensors[name].view(-1)[:1].fill_(torch.nan))
    said = render(model=str(model))
    assert said.code == 1
    assert said.err.splitlines()[0] == f"wancli: shot 0000: {message}"
    assert files_in(tmp_path) == ["job.report.json"]


def test_nan_from_the_text_encoder_is_reported_and_never_cached(
    render: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint(tmp_path)
    change_tensors(model / T5, lambda tensors: tensors["norm.weight"].fill_(torch.nan))
    monkeypatch.setenv("WANCLI_CACHE", str(tmp_path / "cache"))
    said = render(model=str(model))
    assert said.code == 1
    assert "UMT5 gives NaN or Inf for 'A gray tabby cat" in said.err
    assert not list((tmp_path / "cache").rglob("*.entry"))
    assert [name for name in files_in(tmp_path) if name != "job.report.json"] == []


def test_measuring_a_finished_shot_keeps_its_video_and_adds_the_effects(
    render: Callable[..., CommandResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def states() -> list[str]:
        write_job(tmp_path, tiny_job(measure=True, **injected))
        told = [run_wancli(capsys, name, tmp_path / "job.yaml", "--json").out for name in ("plan", "status")]
        return [json.loads(text)["shots"][0]["state"] for text in told]

    injected = {"inject": [rule()]}
    assert render(**injected).code == 0
    video = tmp_path / "out" / "clip.mp4"
    before = video.read_bytes()
    assert manifest_of(tmp_path)["effects"] == []
    assert states() == ["to do", "to do"]
    assert render("--log-level", "verbose", **injected).code == 0
    assert states() == ["done", "done"]
    assert manifest_of(tmp_path)["effects"] != []
    assert video.read_bytes() == before
    assert render(**injected).code == 0  # and back again: nothing to do


def test_a_decoder_that_gives_nan_fails_the_shot_and_keeps_the_latent(
    render: Callable[..., CommandResult], tmp_path: Path
) -> None:
    model = checkpoint(tmp_path)
    change_tensors(
        model / "Wan2.1_VAE.pth", lambda tensors: tensors["decoder.head.2.bias"].fill_(float("nan"))
    )
    said = render(model=str(model))
    assert said.code == 1
    assert "NaN or Inf in the decoded frames" in said.err
    assert not list(tmp_path.glob("out/*.mp4"))
    assert list(tmp_path.glob("out/*.latents.safetensors"))


def test_measuring_a_disabled_injection_renders_nothing_again(
    render: Callable[..., CommandResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    off = {"inject": [rule(strength=0)]}
    assert render(**off).code == 0
    calls = count_forwards(monkeypatch)
    assert render("--log-level", "verbose", **off).code == 0
    assert calls == []


# ---- several runs in a batch ----


def build_model(folder: Path, residency: Residency = "resident") -> WanModel:
    return load_transformer(identify(folder), LoadOptions(residency=residency))


def official_run(
    name: str, case: dict[str, Any], contexts: ContextCache, noise_CTYX: torch.Tensor
) -> DenoiseRun:
    """A case of the official code, its prompts under their names in the reference."""
    rules = []
    if inject := case.get("inject"):
        (first, last), (start, end) = inject["blocks"], inject["steps"]
        blocks = tuple((block, inject["strength"]) for block in range(first, last + 1))
        steps = tuple((step, 1.0) for step in range(start, end))
        rules = [Rule("injection", blocks, steps, (inject["branch"],), inject["blend"], 1.0)]
    table = Table(rules, {"cond": "main", "uncond": "negative"}, 40, case["steps"])
    levels = build_sigma_schedule(case["solver"], case["steps"], case["shift"])
    stage = Stage("only", range(case["steps"]), case["cfg"])
    return DenoiseRun(State(noise_CTYX), levels, case["solver"], table, contexts, stage)


@torch.inference_mode()
def test_a_batch_of_official_cases_over_streamed_weights_gives_the_official_latents(
    reference: Any, numbers: Any
) -> None:
    model = build_model(TINY, "streamed")
    rows = {name: numbers[f"context.{name}"] for name in ("main", "negative", "injection")}
    contexts = ContextCache(model, rows)
    names = ("unipc_cfg6", "inject_cond_27_39", "inject_cond_steps")
    runs = [
        official_run(name, reference["cases"][name], contexts, numbers[f"{name}.noise"]) for name in names
    ]
    calls: list[int] = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    read: list[set[Any]] = [set() for _ in runs]
    for now in denoise_batch(model, runs, forwards_per_pass=6):
        for cells, at in zip(read, now):
            assert isinstance(at, StepResult)
            cells |= at.cells_read
    for name, run, at, cells in zip(names, runs, now, read):
        expected = numbers[f"{name}.latents"][-1]
        assert torch.linalg.vector_norm(at.state.x - expected) < 1e-4 * torch.linalg.vector_norm(expected)
        check_hits(run.table, frozenset(cells))
        assert len(cells) == 6 * 2 * 40
    assert len(calls) == 6 * 6


def random_runs(model: WanModel, effects: list[list[Effect] | None]) -> list[DenoiseRun]:
    """Three different runs of four steps: with and without guidance, sizes, solvers and injections."""
    torch.manual_seed(4)
    contexts = ContextCache(model, {name: torch.randn(n, 64) for name, n in (("a", 5), ("b", 9), ("c", 2))})
    mixed = Rule("c", ((2, 0.5), (3, 0.5)), ((0, 1.0), (2, 0.5)), ("cond", "uncond"), "output-mix", 1.0)
    early, left = Area(frames=(0, 0)), Area(region=(0, 0, 0.4, 1), feather=0.2)
    joined = Rule("b", ((1, 0.7),), ((1, 1.0),), ("cond",), "concat", 1.0, area=early)
    local = Rule("c", ((2, 0.5), (3, 0.5)), ((0, 1.0), (2, 0.5)), ("uncond",), "context-lerp", 1.0, area=left)
    both: dict[Branch, str] = {"cond": "a", "uncond": "b"}
    relay = Timeline((Segment((0, 0), "a", "", (1, 3)), Segment((1, 4), "a", "", (3, 5))), "relay")
    over_time = Table([joined], {"cond": "a"}, 4, 4, over_time=relay.cell)
    return [
        DenoiseRun(
            State(x),
            build_sigma_schedule(solver, 4, 3.0),
            solver,
            table,
            contexts,
            Stage("only", range(4), cfg),
            into,
        )
        for x, solver, table, cfg, into in (
            (torch.randn(16, 1, 4, 4), "unipc", Table([mixed, local], both, 4, 4), 5.0, effects[0]),
            (torch.randn(16, 2, 4, 6), "dpm++", over_time, 1.0, effects[1]),
            (torch.randn(16, 1, 2, 4), "euler", Table([], both, 4, 4), 3.0, effects[2]),
        )
    ]


@pytest.mark.parametrize("forwards", [1, 2, 9])
@torch.inference_mode()
def test_a_batch_gives_the_bits_hits_and_effects_of_each_run_alone(forwards: int, shallow: Path) -> None:
    alone: list[list[Effect] | None] = [[], [], None]
    together: list[list[Effect] | None] = [[], [], None]
    model = build_model(shallow)
    separately = [list(denoise(model, run)) for run in random_runs(model, alone)]
    model = build_model(shallow, "streamed")
    in_step = list(denoise_batch(model, random_runs(model, together), forwards))
    for run, expected in enumerate(separately):
        for step, before in enumerate(expected):
            at = in_step[step][run]
            assert isinstance(at, StepResult)
            assert (at.step, at.cells_read) == (before.step, before.cells_read)
            assert torch.equal(at.state.x, before.state.x)
    assert [len(effects or ()) for effects in alone] == [4, 1, 0]
    assert together == alone


@torch.inference_mode()
def test_a_run_that_meets_nan_ends_and_the_others_continue(shallow: Path) -> None:
    model = build_model(shallow)
    runs = random_runs(model, [None, None, None])
    expected = list(denoise(model, runs[0]))
    runs[1] = replace(runs[1], state=State(runs[1].state.x * torch.inf))
    for step, (first, second, third) in enumerate(denoise_batch(model, runs, 2)):
        assert isinstance(first, StepResult)
        assert torch.equal(first.state.x, expected[step].state.x)
        assert isinstance(second, NotFinite)
        assert "step 0, cond branch, first in block 0" in str(second)
        assert isinstance(third, StepResult)
    assert step == 3


def test_runs_of_different_lengths_are_refused(shallow: Path) -> None:
    model = build_model(shallow)
    runs = random_runs(model, [None, None, None])
    runs[2] = replace(
        runs[2], schedule=build_sigma_schedule("euler", 5, 3.0), stage=Stage("only", range(5), 3.0)
    )
    with pytest.raises(ValueError, match=r"\[4, 5\] steps"):
        next(denoise_batch(model, runs, 1))
