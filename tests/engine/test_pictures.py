"""Videos from pictures, rendered from a job, against the official code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import KEPT, T5, TINY, CommandResult, latents_of, manifest_of, rule, run_wancli, tiny_job, write_job
from oracles import relative_error
from PIL import Image
from safetensors.torch import load_file

from wancli.engine import picture_stage
from wancli.errors import ErrorCapture, ShotError
from wancli.models import given_frames
from wancli.models.vae22 import WanVAE22
from wancli.report.html.rerun_job import build_job
from wancli.storage import manifest
from wancli.video import mp4
from wancli.weights.checkpoint import identify
from wancli.weights.loader import load_vae

FIXTURES = Path(__file__).parents[1] / "fixtures"
TI2V = FIXTURES / "wan22-ti2v-tiny"
PICTURE = FIXTURES / "pictures" / "input.png"
REFERENCE = json.loads((TI2V / "reference.json").read_text())
Render = Callable[..., CommandResult]


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official layout: the transformer and the VAE of the set, UMT5 of wan21-tiny."""
    folder = tmp_path_factory.mktemp("ti2v")
    for name in ("config.json", "diffusion_pytorch_model.safetensors", "Wan2.2_VAE.pth"):
        (folder / name).symlink_to(TI2V / name)
    (folder / T5).symlink_to(TINY / T5)
    shutil.copytree(TINY / "google", folder / "google")
    return folder


@pytest.fixture
def render(ti2v: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Render:
    def rendered(*options: object, **keys: Any) -> CommandResult:
        job = tiny_job(ti2v, image=str(PICTURE), video=KEPT, frames=5) | {"size": {"area": 4096}} | keys
        path = write_job(tmp_path, job)
        return run_wancli(capsys, "render", path, "--cache-dir", tmp_path / "cache", *options)

    return rendered


def case_keys(name: str) -> dict[str, Any]:
    case, prompts = REFERENCE["cases"][name], REFERENCE["prompts"]
    sampler = {key: case[key] for key in ("solver", "steps", "shift")} | {"guidance": case["cfg"]}
    return {
        "prompt": prompts["main"], "negative": prompts["negative"], "sampler": sampler, "seed": case["seed"],
        "frames": case["frames"], "size": {"area": case["max_area"]}, "text": {"max_tokens": 512},
    }  # fmt: skip


@pytest.mark.parametrize("name", ["image_unipc_cfg5", "image_dpmpp_cfg5", "image_unipc_cfg1"])
def test_a_job_with_a_picture_gives_the_latents_of_the_official_code(
    name: str, render: Render, tmp_path: Path
) -> None:
    said = render(**case_keys(name))
    assert said.code == 0, said.err
    case = REFERENCE["cases"][name]
    expected = load_file(TI2V / "reference.safetensors")[f"{name}.latents"][-1]
    assert relative_error(latents_of(tmp_path), expected) < 5e-5
    record = manifest_of(tmp_path)
    assert (record["shot"]["width"], record["shot"]["height"]) == (case["width"], case["height"])
    (picture,) = record["pictures"]
    assert (picture["role"], picture["width"], picture["height"]) == ("first", 157, 111)
    assert (picture["preprocess"], picture["fit"], picture["cached"]) == ("official", "crop", False)
    assert [phase["name"] for phase in record["phases"]][:2] == ["encode", "pictures"]


def test_a_picture_is_encoded_once_ever_and_a_hit_loads_no_vae(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = given_frames.encode_picture

    def counted(vae: WanVAE22, picture_CYX: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return real(vae, picture_CYX)

    monkeypatch.setattr(given_frames, "encode_picture", counted)
    copy = tmp_path / "copy.bmp"
    Image.open(PICTURE).save(copy)
    items = [{"id": "a"}, {"id": "b", "seed": 5}, {"id": "c", "image": str(copy), "prompt": "A fish"}]
    assert render(items=items, output="out/{id}.mp4").code == 0
    assert len(calls) == 1
    assert [manifest_of(tmp_path, id)["pictures"][0]["cached"] for id in "abc"] == [False, True, True]
    assert render(output="out/{id}.mp4", items=[{"id": "d", "seed": 6}]).code == 0
    assert len(calls) == 1
    assert manifest_of(tmp_path, "d")["pictures"][0]["cached"] is True
    assert (
        render(
            output="out/{id}.mp4", items=[{"id": "e", "image": {"first": str(PICTURE), "fit": "pad"}}]
        ).code
        == 0
    )
    assert len(calls) == 2


def test_plan_and_cache_name_pictures(
    render: Render, ti2v: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert render(**OF_CHAIN).code == 0
    cache = ["--cache-dir", tmp_path / "cache"]
    said = run_wancli(capsys, "plan", tmp_path / "job.yaml", "-v", *cache)
    assert "image  input.png, 157x111, crop as official" in said.out
    assert "image  frame 4 of shot a, 64x64, crop as official" in said.out
    shots = json.loads(run_wancli(capsys, "plan", tmp_path / "job.yaml", "--json", *cache).out)["shots"]
    assert [shot["pictures"][0].get("shot") for shot in shots] == ["b", None, "a"]
    texts = [row["text"] for row in json.loads(run_wancli(capsys, "cache", "ls", "--json", *cache).out)]
    assert {"input.png at 64x64", "frame 4 of shot a at 64x64"} <= {*texts}
    assert not any("damaged" in text for text in texts)


def test_a_picture_that_changes_between_plan_and_render_fails_its_shot(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine.png"
    shutil.copy(PICTURE, mine)
    real = picture_stage.encode_frames

    def changed(*arguments: Any) -> Any:
        Image.fromarray(np.zeros((111, 157, 3), np.uint8)).save(mine)
        return real(*arguments)

    monkeypatch.setattr("wancli.engine.pipeline.encode_frames", changed)
    said = render(
        image=str(mine), items=[{"id": "a"}, {"id": "b", "image": str(PICTURE)}], output="out/{id}.mp4"
    )
    assert said.code == 4, said.err
    assert "mine.png: the picture has changed since it was planned" in said.err
    assert manifest_of(tmp_path, "b")["pictures"]
    assert not (tmp_path / "out/a.mp4").exists()


def test_another_picture_is_named_as_the_difference_of_an_output(render: Render, tmp_path: Path) -> None:
    assert render().code == 0
    said = render(image={"first": str(PICTURE), "preprocess": "comfy"})
    assert said.code == 2
    assert "made with another image" in said.err
    assert render().code == 0  # the same again is done


def test_a_rerun_of_a_manifest_has_the_same_key(
    render: Render, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert render(image={"first": str(PICTURE), "alpha": "white"}).code == 0
    record = manifest.read(tmp_path / "out/clip.manifest.json")
    assert record
    path = write_job(tmp_path, build_job(record, "again.mp4"), "again.yaml")
    said = run_wancli(capsys, "plan", path, "--json", "--cache-dir", tmp_path / "cache")
    assert json.loads(said.out)["shots"][0]["key"] == record.key


def test_without_a_picture_the_same_model_makes_a_video_from_text(render: Render, tmp_path: Path) -> None:
    assert render(image=None, size="64x64").code == 0
    assert manifest_of(tmp_path)["pictures"] == []


# ---- chains ----

CHAIN = [
    {"id": "c", "image": {"shot": "b"}, "seed": 3},
    {"id": "a", "image": str(PICTURE)},
    {"id": "b", "image": {"shot": "a", "frame": "last"}, "seed": 2},
]
OF_CHAIN: dict[str, Any] = {"image": None, "output": "out/{id}.mp4", "items": CHAIN}


def decoded(path: Path) -> np.ndarray:
    return np.array([np.frombuffer(frame.rgb, np.uint8) for frame in mp4.read_frames(path)])


def test_a_chain_begins_with_the_exact_last_frame_and_is_joined_without_it(
    render: Render, ti2v: Path, tmp_path: Path
) -> None:
    said = render(**OF_CHAIN, join="out/all.mp4", video=KEPT | {"crf": 4})
    assert said.code == 0, said.err
    assert [Path(line).stem for line in said.out.split()] == ["a", "b", "c"]
    kept = np.asarray(Image.open(tmp_path / "out/a.frame4.png"))
    *_, last = load_vae(identify(ti2v), "cpu").decode(latents_of(tmp_path, "a"))
    assert (kept == np.asarray(mp4.to_rgb24(last))[-1]).all()
    record = manifest_of(tmp_path, "b")["pictures"][0]
    assert record["link"] == {"shot": "a", "frame": 4}
    joined = decoded(tmp_path / "out/all.mp4")
    assert len(joined) == 5 + 4 + 4
    parts = [decoded(tmp_path / f"out/{id}.mp4") for id in "abc"]
    expected = np.concatenate([parts[0], parts[1][1:], parts[2][1:]])
    assert np.abs(joined.astype(int) - expected).mean() < 8
    before = (tmp_path / "out/all.mp4").stat().st_mtime_ns
    assert render(**OF_CHAIN, join="out/all.mp4", video=KEPT | {"crf": 4}).code == 0  # all is done
    assert (tmp_path / "out/all.mp4").stat().st_mtime_ns == before
    same = render(image=str(tmp_path / "out/a.frame4.png"), seed=2, output="out/alone.mp4", size="64x64")
    assert same.code == 0
    assert torch.equal(latents_of(tmp_path, "alone"), latents_of(tmp_path, "b"))


def test_a_failed_link_fails_what_hangs_on_it_and_the_same_command_goes_on_from_there(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = picture_stage.encode_frames

    def broken(shots: Any, *rest: Any) -> Any:
        frames, errors, record = real(shots, *rest)
        for shot in shots:
            if shot.id == "b":
                errors[shot.index] = ErrorCapture()
                errors[shot.index].record(ShotError("is broken", where="shot b"))
        return frames, errors, record

    with monkeypatch.context() as patch:
        patch.setattr("wancli.engine.pipeline.encode_frames", broken)
        said = render(**OF_CHAIN, join="out/all.mp4")
    assert said.code == 1
    assert [Path(line).stem for line in said.out.split()] == ["a"]
    assert "shot c: shot b, which it continues, failed" in said.err
    assert "all.mp4 is not written" in said.err
    said = render(**OF_CHAIN, join="out/all.mp4")
    assert said.code == 0, said.err
    assert [Path(line).stem for line in said.out.split()] == ["b", "c"] or "a" in said.out
    assert (tmp_path / "out/all.mp4").exists()


def test_a_kept_frame_that_is_missing_or_of_another_video_fails_the_shot(
    render: Render, tmp_path: Path
) -> None:
    first, second = CHAIN[1], CHAIN[2]
    assert (
        render(
            **OF_CHAIN | {"items": [first, second]},
        ).code
        == 0
    )
    kept = tmp_path / "out/a.frame4.png"
    for number, damage in enumerate(
        (kept.unlink, lambda: kept.write_bytes(b"no"), lambda: shutil.copy(PICTURE, kept))
    ):
        damage()
        items = [first, {**second, "id": "other", "seed": 9}]
        said = render("--cache-dir", tmp_path / f"cache{number}", **OF_CHAIN | {"items": items})
        assert said.code == 4, said.err
        assert "out/a.frame4.png: " in said.err
        assert "Render shot a again" in said.err


def test_the_workers_of_ray_refuse_a_chain_before_they_start(render: Render) -> None:
    said = render("--engine", "ray", **OF_CHAIN)
    assert said.code == 2
    assert "continues another one" in said.err


def test_a_probe_of_a_shot_with_a_picture_is_refused(
    render: Render, ti2v: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tiny_job(ti2v, image=str(PICTURE), size="64x64", inject=[rule()])
    said = run_wancli(capsys, "probe", write_job(tmp_path, job), "--cache-dir", tmp_path / "cache")
    assert said.code == 2
    assert "begins with a picture; a probe measures videos from text" in said.err
