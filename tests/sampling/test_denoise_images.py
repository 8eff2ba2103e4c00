"""Every case of the official code that makes a video from pictures: noise to latent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from image_cases import FIXTURES, Case, all_cases, load, numbers
from oracles import relative_error

from wancli.injection.contexts import ContextCache
from wancli.injection.exprs import Branch
from wancli.injection.table import Rule, Table
from wancli.models.config import Expert, VAE22Config, VAEConfig
from wancli.models.given_frames import NO_FRAMES, GivenFrames, encode_channels, encode_picture
from wancli.models.vae import VAE, WanVAE
from wancli.models.vae22 import WanVAE22
from wancli.sampling.denoise import DenoiseRun, StepResult, check_hits, denoise, draw_noise
from wancli.sampling.solvers import State, build_sigma_schedule
from wancli.sampling.stages import split_stages

BASE: dict[Branch, str] = {"cond": "main", "uncond": "negative"}


@pytest.fixture(scope="module")
def vae() -> VAE:
    network = WanVAE(VAEConfig(dim=4))
    network.load_state_dict(torch.load(FIXTURES / "wan21-tiny/Wan2.1_VAE.pth", weights_only=True))
    return network.requires_grad_(False)


@pytest.fixture(scope="module")
def vae22() -> VAE:
    network = WanVAE22(VAE22Config(dim=4, dec_dim=4))
    network.load_state_dict(torch.load(FIXTURES / "wan22-ti2v-tiny/Wan2.2_VAE.pth", weights_only=True))
    return network.requires_grad_(False)


def give(case: Case, vae: VAE, vae22: VAE) -> GivenFrames:
    """From the pictures at the size of the video, with our own encoders."""
    if case.set != "wan22-ti2v-tiny":
        return GivenFrames(encode_channels(vae, case.pictures, case.settings["frames"]))
    return GivenFrames(first_CTYX=encode_picture(vae22, case.pictures[0])) if case.pictures else NO_FRAMES


def rules_of(settings: dict[str, Any]) -> list[Rule]:
    if "inject" not in settings:
        return []
    inject = settings["inject"]
    (first, last), (start, end) = inject["blocks"], inject["steps"]
    blocks = tuple((block, inject["strength"]) for block in range(first, last + 1))
    steps = tuple((step, 1.0) for step in range(start, end))
    return [Rule("injection", blocks, steps, (inject["branch"],), inject["blend"], 1.0)]


def folder_of(case: Case, expert: Expert) -> Path:
    folders = {"only": ".", "high": "high_noise_model", "low": "low_noise_model"}
    return FIXTURES / case.set / folders[expert]


@pytest.mark.parametrize("case", all_cases(), ids=str)
@torch.inference_mode()
def test_latents_are_those_of_the_official_code(case: Case, vae: VAE, vae22: VAE) -> None:
    settings, reference = case.settings, numbers(case.set)
    schedule = build_sigma_schedule(settings["solver"], settings["steps"], settings["shift"])
    assert list(schedule.timesteps) == case["timesteps"].tolist()
    high = settings.get("cfg_high", settings.get("cfg"))
    stages = split_stages(schedule.timesteps, settings.get("boundary"), high, settings.get("cfg_low"))
    if "experts" in settings:
        assert [stage.expert for stage in stages for _ in stage.steps] == settings["experts"]
    unguided = [step for stage in stages if stage.guidance == 1 for step in stage.steps]
    image = "picture" if case.clip else None
    table = Table(rules_of(settings), BASE, 40, settings["steps"], unguided, image)
    rows = {name: reference[f"context.{name}"] for name in ("main", "negative", "injection")}
    pictures = {"picture": case.clip_rows} if case.clip else {}
    given, cells = give(case, vae, vae22), set()
    noise_CTYX = draw_noise(tuple(case["noise"].shape), settings["seed"])
    assert torch.equal(noise_CTYX, case["noise"])
    state, after = State(noise_CTYX), []
    for stage in stages:
        model = load(folder_of(case, stage.expert))
        contexts = ContextCache(model, rows, pictures)
        run = DenoiseRun(state, schedule, settings["solver"], table, contexts, stage, given=given)
        for result in denoise(model, run):
            state, cells = result.state, cells | result.cells_read
            after.append(state.x)
    check_hits(table, frozenset(cells))
    expected = case["latents"]
    assert len(expected) in (1, len(after))
    for x_CTYX, theirs_CTYX in zip(after[-len(expected) :], expected):
        assert relative_error(x_CTYX, theirs_CTYX) < 5e-5
    if given.first_CTYX is not None:
        assert torch.equal(state.x[:, :1], given.first_CTYX)


@torch.inference_mode()
def test_a_run_with_a_given_first_frame_continues_from_any_step_with_the_same_bits(vae22: VAE) -> None:
    (case,) = (c for c in all_cases() if (c.set, c.name) == ("wan22-ti2v-tiny", "image_unipc_cfg1"))
    model = load(folder_of(case, "only"))
    schedule = build_sigma_schedule("unipc", 4, 5.0)
    (stage,) = split_stages(schedule.timesteps, None, 1.0, None)
    table = Table([], {"cond": "main"}, 40, 4, range(4))
    contexts = ContextCache(model, {"main": numbers(case.set)["context.main"]})
    given = give(case, vae22, vae22)

    def run(state: State, steps: range) -> list[StepResult]:
        part = type(stage)(stage.expert, steps, stage.guidance)
        return list(denoise(model, DenoiseRun(state, schedule, "unipc", table, contexts, part, given=given)))

    whole = run(State(case["noise"]), range(4))
    assert torch.equal(run(whole[1].state, range(2, 4))[-1].state.x, whole[-1].state.x)


@torch.inference_mode()
def test_an_injected_picture_reaches_the_blocks_of_its_rule(vae: VAE, vae22: VAE) -> None:
    (case,) = (c for c in all_cases() if (c.set, c.name) == ("wan21-i2v-tiny", "unipc_cfg1"))
    model, given = load(folder_of(case, "only")), give(case, vae, vae22)
    schedule = build_sigma_schedule("unipc", 2, 5.0)
    (stage,) = split_stages(schedule.timesteps, None, 1.0, None)
    clip_NE = case.clip_rows
    pictures = {"picture": clip_NE, "same": clip_NE.clone(), "other": clip_NE.flip(0)}

    def run(rules: list[Rule]) -> torch.Tensor:
        table = Table(rules, {"cond": "main"}, 40, 2, range(2), "picture")
        contexts = ContextCache(model, {"main": numbers(case.set)["context.main"]}, pictures)
        run = DenoiseRun(State(case["noise"]), schedule, "unipc", table, contexts, stage, given=given)
        results = list(denoise(model, run))
        check_hits(table, frozenset().union(*(result.cells_read for result in results)))
        return results[-1].state.x

    def rule(picture: str, strength: float, gain: float = 1.0) -> list[Rule]:
        blocks = tuple((block, strength) for block in range(14))
        return [Rule(picture, blocks, ((0, 1.0), (1, 1.0)), ("cond",), "context-lerp", gain, image=True)]

    plain = run([])
    assert relative_error(run(rule("same", 0.6)), plain) < 1e-5
    weak, strong = run(rule("other", 0.2)), run(rule("other", 0.6))
    assert relative_error(strong, plain) > 1.5 * relative_error(weak, plain) > 1e-4
    # gain g at strength s is strength g*s: both extrapolate on the line from one picture to the other
    assert relative_error(run(rule("other", 0.2, gain=3.0)), strong) < 1e-5
