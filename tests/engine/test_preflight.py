"""What a render does with an output whose manifest tells nothing, and with a kept latent that is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import KEPT, CommandResult, forbid_calls, run_wancli

from wancli.models.dit import WanModel

Render = Callable[..., CommandResult]
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut": lambda data: data[:40],
    "doubled": lambda data: data + data,
    "zeros": lambda data: bytes(len(data)),
}


def state_of(folder: Path, warm: Path, capsys: pytest.CaptureFixture[str]) -> str:
    result = run_wancli(capsys, "status", folder / "job.yaml", "--json", "--cache-dir", warm)
    (shot,) = json.loads(result.out)["shots"]
    return str(shot["state"])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_video_whose_manifest_is_damaged_is_made_anew_if_it_names_this_very_shot(
    damage: str, render: Render, tmp_path: Path, warm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert render().code == 0
    video, record = tmp_path / "out/clip.mp4", tmp_path / "out/clip.manifest.json"
    whole = video.read_bytes()
    record.write_bytes(DAMAGES[damage](record.read_bytes()))
    assert state_of(tmp_path, warm, capsys) == "to do"
    result = run_wancli(capsys, "render", tmp_path / "job.yaml", "--progress", "plain")
    assert result.code == 0
    assert (
        "the manifest is damaged, or of another version; by the comment in the video it is this" in result.err
    )
    assert (video.read_bytes(), video.with_name("clip.damaged-1.mp4").read_bytes()) == (whole, whole)
    assert video.with_name("clip.manifest.damaged-1.json").exists()


def test_with_its_latent_it_is_only_decoded_again(
    render: Render, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert render(video=KEPT).code == 0
    (tmp_path / "out/clip.manifest.json").write_bytes(b"")
    forbid_calls(monkeypatch, (WanModel, "predict_velocities"))
    result = run_wancli(capsys, "render", tmp_path / "job.yaml", "--progress", "plain")
    assert result.code == 0
    assert "by its latent it is this shot; moved to clip.damaged-1.mp4" in result.err


def test_a_video_that_nothing_proves_stays_and_nobody_is_said_to_have_made_it(
    render: Render, tmp_path: Path, warm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert render(seed=1).code == 0
    (tmp_path / "out/clip.manifest.json").write_bytes(b"")
    result = render(seed=2)
    assert result.code == 2
    assert "already exists: the manifest is damaged" in result.err
    assert "Nothing proves that this job made it: --force moves it aside" in result.err
    assert state_of(tmp_path, warm, capsys) == "in the way"


def test_a_kept_latent_that_is_damaged_is_told_when_the_shot_is_done(
    render: Render, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert render(video=KEPT).code == 0
    latent = tmp_path / "out/clip.latents.safetensors"
    for data in (latent.read_bytes()[:-1], b"", latent.read_bytes()[:-1] + b"\7"):
        latent.write_bytes(data)
        result = run_wancli(capsys, "render", tmp_path / "job.yaml", "--progress", "plain")
        assert result.code == 0
        (warning,) = [line for line in result.err.splitlines() if line.startswith("warning: ")]
        assert str(latent) in warning
        assert "the video of shot 0000 is whole; --force renders both again" in warning


def test_check_names_the_keys_that_differ(
    render: Render, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert render(video=KEPT, seed=1).code == 0
    job = tmp_path / "job.yaml"
    result = run_wancli(capsys, "check", job, "--set", "seed=5")
    assert result.code == 4
    lines = [line for line in result.out.splitlines() if "another job, version or model: " in line]
    assert len(lines) == 2  # the manifest and the latent
    assert all(line.endswith("made with seed 1, now 5") for line in lines)
