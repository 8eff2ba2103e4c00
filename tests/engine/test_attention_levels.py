"""`wancli attention`: maps of finished videos and latents, at noise levels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from jobs import KEPT, CommandResult, files_in, rule, run_wancli

from wancli.storage import attention_file

Render = Callable[..., CommandResult]
SAID = {"sampler": {"steps": 4, "solver": "euler"}, "frames": 5}  # which begins at noise level 1
FIRST_STEP = {"words": ["cat"], "blocks": ["all", "late"], "steps": [0]}


def test_pure_noise_has_the_maps_of_the_first_step(
    render: Render, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert render(attention=FIRST_STEP, video=KEPT, **SAID).code == 0
    rendered = attention_file.read(tmp_path / "out/clip.attention.npz")
    for source in ("clip.mp4", "clip.latents.safetensors"):
        words = ("--word", "cat", "--blocks", "all", "--blocks", "late")
        options = ("--sigmas", "1,0.3", "--force", "--progress", "none")
        said = run_wancli(capsys, "attention", tmp_path / "out" / source, *words, *options)
        assert said.code == 0, said.err
        npz, video = map(Path, said.out.split())
        assert (npz.name, video.name) == ("clip.levels.attention.npz", "clip.levels.attention.mp4")
        found = attention_file.read(npz)
        assert (found.blocks, found.steps) == (("all", "late"), ("sigma 1", "sigma 0.3"))
        np.testing.assert_allclose(found.maps_WGSTYX[:, :, 0], rendered.maps_WGSTYX[:, :, 0], rtol=1e-4)
        assert np.abs(found.maps_WGSTYX[:, :, 1] / found.maps_WGSTYX[:, :, 0] - 1).max() > 0.02


def test_a_video_without_its_latent_is_encoded(
    render: Render, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert render(inject=[rule(blocks="late")], **SAID).code == 0
    assert "clip.latents.safetensors" not in files_in(tmp_path)
    said = run_wancli(
        capsys, "attention", tmp_path / "out/clip.mp4", "--word", "dog", "--prompt", "A dog", "--json"
    )
    assert said.code == 0, said.err
    document = json.loads(said.out)
    assert [group["label"] for group in document["steps"]] == ["sigma 0.9", "sigma 0.6", "sigma 0.3"]
    found = attention_file.read(Path(document["outputs"][0]))
    assert found.maps_WGSTYX.shape == (1, 1, 3, 2, 4, 4)
    assert (found.maps_WGSTYX > 0).all()
    assert found.about["prompt"] == "A dog"


def test_what_cannot_be_mapped_is_refused_before_a_model_is_loaded(
    render: Render, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert render(**SAID).code == 0
    clip = tmp_path / "out/clip.mp4"
    alone = tmp_path / "alone.mp4"
    alone.write_bytes(clip.read_bytes())
    (tmp_path / "out/taken.npz").write_bytes(b"mine")
    for source, options, code, problem in (
        (clip, ("--word", "dog"), 2, "attention.words.0: the prompt has no 'dog'"),
        (clip, ("--word", "cat", "--blocks", "9"), 2, "9 is past the last block (3)"),
        (clip, ("--word", "cat", "--sigmas", "1.5"), 2, "'1.5' is not a list of noise levels"),
        (clip, ("--word", "cat", "-o", tmp_path / "out/taken.npz"), 2, "already exists"),
        (clip, ("--word", "cat", "-o", tmp_path / "out/maps.zip"), 2, "does not end in .npz"),
        (alone, ("--word", "cat"), 2, "has no manifest beside it"),
        (tmp_path / "none.mp4", ("--word", "cat"), 2, "no such file"),
    ):
        said = run_wancli(capsys, "attention", source, *options)
        assert (said.code, problem in said.err) == (code, True), said.err
    assert (tmp_path / "out/taken.npz").read_bytes() == b"mine"
