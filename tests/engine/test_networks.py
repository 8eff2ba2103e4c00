"""Networks that stay in memory between renders: the same bytes, loaded once, never those of another job."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import CAT, TRANSFORMER, files_in, forbid_calls, manifest_of, rule, tiny_job, write_job
from safetensors.torch import load_file, save_file

from wancli.engine import batch
from wancli.engine.context import RenderContext
from wancli.engine.networks import ModelCache
from wancli.job import loader as jobfile
from wancli.job.cli_overrides import NO_OVERRIDES
from wancli.models.dit import WanModel
from wancli.plan import memory_estimate, memory_policy, planner
from wancli.plan.shot import Shot
from wancli.progress import Progress
from wancli.resources import machine
from wancli.storage.cache import Store
from wancli.text import encoder
from wancli.weights import loader

Render = Callable[..., list[str]]


@pytest.fixture
def rendered(tmp_path: Path, quick: Path, warm: Path) -> Render:
    """Render the tiny job in a folder of its own, with or without cached networks."""

    def render(name: str, kept: ModelCache | None, **changes: Any) -> list[str]:
        job = write_job(tmp_path / name, tiny_job(**{"model": quick} | changes))
        planned = planner.build_plan(jobfile.load(job, NO_OVERRIDES), warm / "hashes.json")
        tools = RenderContext(Store(warm / "embeddings"), Progress(), model_cache=kept)
        return [outcome.status for outcome in batch.render(planned, tools)]

    return render


@pytest.fixture
def style(tmp_path: Path, quick: Path) -> Path:
    """A LoRA that is strong enough to be seen."""
    weights, name = load_file(quick / TRANSFORMER), "blocks.1.self_attn.q"
    width = weights[f"{name}.weight"].shape[0]
    factors = {"lora_A": torch.full((2, width), 0.3), "lora_B": torch.full((width, 2), 0.3)}
    path = tmp_path / "style.safetensors"
    save_file({f"diffusion_model.{name}.{part}.weight": tensor for part, tensor in factors.items()}, path)
    return path


def video(tmp_path: Path, name: str) -> bytes:
    return (tmp_path / name / "out" / "clip.mp4").read_bytes()


def test_a_second_render_loads_nothing_and_makes_the_same_bytes(
    rendered: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ModelCache()
    changes = {"seed": 3, "inject": [rule(blocks="late")]}
    assert rendered("alone", None, **changes) == ["rendered"]
    assert rendered("first", kept) == ["rendered"]
    forbid_calls(monkeypatch, (loader, "load_transformer"), (loader, "load_vae"), (encoder, "load_encoder"))
    assert rendered("second", kept, **changes) == ["rendered"]
    assert video(tmp_path, "second") == video(tmp_path, "alone") != video(tmp_path, "first")
    loads = [
        phase["seconds"] for phase in manifest_of(tmp_path / "second")["phases"] if phase["name"] == "load"
    ]
    assert loads == [0.0]


def test_loras_are_applied_to_and_removed_from_cached_networks(
    rendered: Render, tmp_path: Path, style: Path
) -> None:
    kept = ModelCache()
    loras = [{"path": str(style), "strength": 3.0}]
    assert rendered("plain", None) == rendered("styled", None, loras=loras) == ["rendered"]
    for name, changes in {"1": {}, "2": {"loras": loras}, "3": {}, "4": {"loras": loras}}.items():
        assert rendered(name, kept, **changes) == ["rendered"]
    assert video(tmp_path, "1") == video(tmp_path, "3") == video(tmp_path, "plain")
    assert video(tmp_path, "2") == video(tmp_path, "4") == video(tmp_path, "styled")
    assert video(tmp_path, "plain") != video(tmp_path, "styled")


def test_another_model_replaces_the_cached_one(rendered: Render, tmp_path: Path, tiny: Path) -> None:
    kept = ModelCache()
    assert rendered("first", kept) == ["rendered"]
    planned = planner.build_plan(
        jobfile.load(tmp_path / "first" / "job.yaml", NO_OVERRIDES), tmp_path / "hashes.json"
    )
    here = kept.get(planned.shots[0].model, lazy=True)
    network = weakref.ref(here.transformer("only"))
    del here
    assert rendered("other", kept, model=str(tiny)) == ["rendered"]
    gc.collect()
    assert network() is None
    assert rendered("alone", None, model=str(tiny)) == ["rendered"]
    assert video(tmp_path, "other") == video(tmp_path, "alone")


@pytest.mark.parametrize("fits", [True, False])
def test_cached_networks_are_released_if_the_text_encoder_does_not_fit_beside_them(
    rendered: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    kept = ModelCache()
    assert rendered("first", kept) == ["rendered"]
    loaded: list[object] = []
    real = loader.load_transformer
    monkeypatch.setattr(loader, "load_transformer", lambda *a: loaded.append(a) or real(*a))
    monkeypatch.setattr(memory_policy, "encoder_fits_alongside", lambda _: fits)
    assert rendered("second", kept, prompt=f"{CAT} Nobody asked for this, {fits}.") == ["rendered"]
    assert len(loaded) == (0 if fits else 1)
    assert rendered("third", kept, seed=9) == ["rendered"]  # all its prompts are in the cache
    assert len(loaded) == (0 if fits else 1)
    assert "clip.mp4" in files_in(tmp_path / "third")


def test_memory_of_cached_networks_does_not_count_as_taken_by_others(
    rendered: Render, tmp_path: Path, warm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is what is free and what the process has: a model is never refused for being loaded."""
    assert rendered("first", ModelCache()) == ["rendered"]
    monkeypatch.setattr(machine, "available_memory", lambda: 0)

    def planned(process_memory: int) -> Shot:
        monkeypatch.setattr(machine, "process_memory", lambda: process_memory)
        job = jobfile.load(tmp_path / "first" / "job.yaml", NO_OVERRIDES)
        return planner.build_plan(job, warm / "hashes.json").shots[0]

    shot = planned(2**40)
    encoded, _, decode = phases = memory_estimate.predict_phases(shot)
    memory_policy.require(planned(memory_estimate.peak_of(shot.model, phases)))
    together = memory_estimate.process_bytes(shot.model) + encoded.total + decode.model
    for limit, expected in ((together, True), (together - 1, False)):
        limited = replace(shot, model=replace(shot.model, memory_limit=limit))
        assert memory_policy.encoder_fits_alongside(limited) == expected


def test_time_to_the_first_step_counts_from_the_command_and_not_from_the_process(
    tmp_path: Path, quick: Path, warm: Path
) -> None:
    job = write_job(tmp_path, tiny_job(model=quick))
    planned = planner.build_plan(jobfile.load(job, NO_OVERRIDES), warm / "hashes.json")
    began = time.time() + 1000
    list(batch.render(planned, RenderContext(Store(warm / "embeddings"), Progress(), started_at=began)))
    assert -1000 < manifest_of(tmp_path)["first_step_after"] < -900


def test_networks_are_loaded_again_after_the_cache_is_cleared(rendered: Render, tmp_path: Path) -> None:
    kept = ModelCache()
    assert rendered("first", kept) == ["rendered"]
    kept.clear()
    gc.collect()
    assert not [one for one in gc.get_objects() if type(one) is WanModel]
    assert rendered("second", kept) == ["rendered"]
    assert video(tmp_path, "first") == video(tmp_path, "second")
