"""Shots with a step cache through the command line: resumed, sharing steps, with injections."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import (
    KEPT,
    SPIECE,
    T5,
    TINY,
    VAE,
    CommandResult,
    files_in,
    latents_of,
    manifest_of,
    rule,
    write_job,
)

from wancli.engine.output_diff import describe_record
from wancli.job.loader import load
from wancli.models.dit import WanModel
from wancli.plan.planner import build_plan
from wancli.report.html.rerun_job import build_job
from wancli.sampling import state_file
from wancli.storage import manifest
from wancli.weights.checkpoint import identify

NAME = "Wan2.1-T2V-1.3B"
STEPS = 12
CACHED = {"cache": {"table": NAME}, "sampler": {"steps": STEPS}, "video": KEPT}

Render = Callable[..., CommandResult]


def test_a_stop_in_every_step_ends_with_the_same_bytes(render: Render, tmp_path: Path) -> None:
    said = CACHED | {"inject": [rule(blocks=[1], steps="5-8")]}
    assert render(folder=tmp_path / "whole", **said).code == 0
    steps: list[int] = []
    while "clip.latents.safetensors" not in files_in(tmp_path):
        assert stop_in_first_forward(render, **said).code == 75
        if (state := tmp_path / "out" / "clip.state.safetensors").exists():
            steps.append(len(state_file.load_state(state).residuals))
    assert len(steps) == STEPS - 1
    assert {*steps} == {0, 2}  # a state before a computed step has no residual
    assert render(**said).code == 0
    assert torch.equal(latents_of(tmp_path), latents_of(tmp_path / "whole"))
    found, whole = (manifest_of(folder) for folder in (tmp_path, tmp_path / "whole"))
    assert found["injection"] == whole["injection"]
    assert found["shot"]["cache"] == whole["shot"]["cache"]
    (entry,) = found["injection"]
    assert entry["planned"] == entry["hits"] == len(entry["hits_by_step"])


def stop_in_first_forward(render: Render, **said: Any) -> CommandResult:
    """Render until a signal comes in the first forward, which may run no block."""
    real, calls = WanModel.embed, []

    def embed(self: WanModel, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        return real(self, *arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(WanModel, "embed", embed)
        return render(**said)


def test_a_state_without_its_residual_starts_again(render: Render, tmp_path: Path) -> None:
    state = tmp_path / "out" / "clip.state.safetensors"
    for _ in range(3):
        assert stop_in_first_forward(render, **CACHED).code == 75
    loaded = state_file.load_state(state)
    assert loaded.residuals.keys() == {"cond", "uncond"}
    state_file.save_state(state, loaded.state, loaded.record)
    ended = render(**CACHED)
    assert ended.code == 0
    assert render(folder=tmp_path / "whole", **CACHED).code == 0
    assert torch.equal(latents_of(tmp_path), latents_of(tmp_path / "whole"))
    assert [*(tmp_path / "out").glob("clip.state*")]  # moved aside


def test_shots_share_steps_and_fork_with_residuals(render: Render, tmp_path: Path) -> None:
    items = [
        {"id": "late", "inject": [rule(blocks=[1], steps="5-8")]},
        {"id": "plain"},
        {"id": "other", "cache": {"table": NAME, "skips": 2}},
        {"id": "none", "cache": "none"},
    ]
    assert render(output="out/{id}.mp4", items=items, **CACHED).code == 0
    for item in items:
        alone = tmp_path / "alone" / str(item["id"])
        assert render(folder=alone, output="out/{id}.mp4", items=[item], **CACHED).code == 0
        assert torch.equal(latents_of(tmp_path, item["id"]), latents_of(alone, item["id"]))


def test_a_window_is_read_from_its_first_step_on(render: Render, tmp_path: Path) -> None:
    inject = [rule(blocks=[1], steps="5-7", branch="both")]
    assert render(**CACHED | {"inject": inject}).code == 0
    (entry,) = manifest_of(tmp_path)["injection"]
    assert entry["hits_by_step"]["5"] == 2
    reused = manifest_of(tmp_path)["shot"]["cache"]["reused"]
    for branch in ("cond", "uncond"):
        assert {5, 8}.isdisjoint(reused[branch])


def test_a_rerun_of_a_record_has_its_key_and_another_cache_is_named(
    render: Render, tmp_path: Path, quick: Path, warm: Path
) -> None:
    assert render(**CACHED | {"cache": {"table": NAME, "skips": 2}}).code == 0
    record = manifest.read(tmp_path / "out" / "clip.manifest.json")
    assert record is not None
    again = write_job(tmp_path, build_job(record, "again.mp4"), "again.yaml")
    (shot,) = build_plan(load(again), warm / "memo.json").shots
    assert shot.key == record.key
    assert describe_record(record, shot) == ""
    assert describe_record(record, replace(shot, cache=None)) == "made with another cache"


def test_two_experts_with_a_cache_batch_to_the_same_bytes(
    render: Render, tmp_path: Path, quick: Path
) -> None:
    (network,) = identify(quick).transformer_files
    experts = {"high_noise": str(network), "low_noise": str(network), "heads": 2}
    others = {"text_encoder": str(TINY / T5), "tokenizer": str(SPIECE), "vae": str(TINY / VAE)}
    sampler = {"steps": 12, "guidance": {"high": 4, "low": 1}, "boundary": 0.8}
    said = CACHED | {"model": experts | others, "sampler": sampler, "cache": {"table": "Wan2.2-T2V-A14B"}}
    items = [{"id": "a", "seed": 5}, {"id": "b", "inject": [rule(blocks=[3], steps="3-6")]}]
    streamed = said | {"items": items, "output": "out/{id}.mp4", "memory": {"residency": "streamed"}}
    assert render(**streamed).code == 0
    for item in items:
        alone = tmp_path / item["id"]
        one = said | {"items": [item], "output": "out/{id}.mp4"}
        assert render(folder=alone, **one).code == 0
        assert torch.equal(latents_of(tmp_path, item["id"]), latents_of(alone, item["id"]))
