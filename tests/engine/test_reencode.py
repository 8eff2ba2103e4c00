"""Encode a video once more from its latent, and look at a shot that is half done."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import (
    KEPT,
    CommandResult,
    count_forwards,
    files_in,
    forbid_calls,
    latents_of,
    manifest_of,
    run_wancli,
)

from wancli.sampling import state_file
from wancli.sampling.denoise import draw_noise
from wancli.sampling.solvers import build_sigma_schedule
from wancli.storage.manifest import is_done
from wancli.video import mp4

Render = Callable[..., CommandResult]
LOW_CRF: dict[str, Any] = {"video": KEPT | {"crf": 10}}


def test_a_change_of_video_alone_decodes_the_kept_latent(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert render(folder=tmp_path / "fresh", **LOW_CRF).code == 0
    assert render(video=KEPT).code == 0
    before, latent = (tmp_path / "out/clip.mp4").read_bytes(), latents_of(tmp_path)
    forbid_calls(monkeypatch)
    refused = render(**LOW_CRF)
    assert refused.code == 2
    assert "already exists: made with video.crf 16, now 10\n" in refused.err
    way_out = "--force moves it aside and decodes its latent again, without sampling; or change `output`."
    assert way_out in refused.err
    again = render("--force", video={"crf": 10})  # the latent of a finished shot stays, as --force keeps all
    assert again.code == 0, again.err
    assert (tmp_path / "out/clip.mp4").read_bytes() == (tmp_path / "fresh/out/clip.mp4").read_bytes()
    assert (tmp_path / "out/clip.old-1.mp4").read_bytes() == before
    assert manifest_of(tmp_path)["key"] == manifest_of(tmp_path / "fresh")["key"]
    assert torch.equal(latents_of(tmp_path), latent)
    assert render(**LOW_CRF).code == 0


def test_the_same_shot_is_sampled_again_if_that_is_asked(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert render(video=KEPT).code == 0
    calls = count_forwards(monkeypatch)
    assert render("--force", video=KEPT).code == 0
    assert calls
    assert "clip.latents.old-1.safetensors" in files_in(tmp_path)


def test_decode_takes_other_settings_of_the_video(
    render: Render, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert render(video=KEPT).code == 0
    assert render(folder=tmp_path / "fresh", **LOW_CRF).code == 0
    latent, other = tmp_path / "out/clip.latents.safetensors", tmp_path / "b.mp4"

    def decode(*options: object) -> CommandResult:
        return run_wancli(capsys, "decode", latent, "-q", *options)

    assert decode("--set", "video.crf=10", "-o", other).code == 0
    assert other.read_bytes() == (tmp_path / "fresh/out/clip.mp4").read_bytes()
    assert is_done(other, manifest_of(tmp_path / "fresh")["key"])
    for option, message in (
        ("video.crf=99", "--set video.crf: should be less than or equal to 51, got 99"),
        ("video.codec=prores", "--set video.codec: 'prores' "),
        ("seed=3", "--set seed: does not change how a latent is decoded"),
    ):
        refused = decode("--set", option, "-o", tmp_path / "c.mp4")
        assert (refused.code, message in refused.err) == (2, True), refused.err
    assert decode("-o", tmp_path / "c.mov").err.startswith("wancli: -o: 'c.mov' does not end in .mp4\n")


@pytest.mark.parametrize("solver", ["euler", "unipc", "dpm++"])
def test_a_preview_decodes_the_clean_latent_that_the_state_predicts(
    render: Render,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    solver: str,
) -> None:
    with monkeypatch.context() as patch:
        count_forwards(patch, lambda n: signal.raise_signal(signal.SIGTERM) if n == 0 else None)
        stopped = render(sampler={"steps": 4, "solver": solver}, frames=5)
    assert stopped.code == 75
    state = tmp_path / "out/clip.state.safetensors"
    saved = state_file.load_state(state).state
    if solver == "euler":  # v from the two latents of the first step
        first, second, *_ = build_sigma_schedule("euler", 4, 5.0).sigmas
        noise_CTYX = draw_noise(tuple(saved.x.shape), 0)
        v_CTYX = (saved.x - noise_CTYX) / (second - first)
        torch.testing.assert_close(saved.history[-1], noise_CTYX - first * v_CTYX, rtol=1e-4, atol=1e-4)
    for name in ("clip.preview-1.mp4", "other.mp4"):
        options = [] if name.startswith("clip") else ["-o", tmp_path / "out/other.mp4"]
        result = run_wancli(capsys, "decode", state, "--preview", "-q", *options)
        assert (result.code, result.out) == (0, f"{tmp_path}/out/{name}\n"), result.err
        assert mp4.count_frames(tmp_path / "out" / name) == 5
    assert run_wancli(capsys, "decode", state, "--preview", "-q").code == 2
    assert "not a finished latent" in run_wancli(capsys, "decode", state, "-q").err
    assert render(sampler={"steps": 4, "solver": solver}, frames=5).code == 0
