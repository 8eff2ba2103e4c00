"""Jobs of many pictures from end to end: sweeps over pictures, `--set`, pictures from several folders."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_cases import LAST, PICTURE, assemble
from jobs import CommandResult, manifest_of, run_wancli, tiny_job, write_job
from PIL import Image

from wancli.engine import picture_stage
from wancli.models.clip import CLIPVision

QUICK = {"size": {"area": 2048}, "frames": 5, "sampler": {"steps": 1, "guidance": 1}}
Render = Callable[..., CommandResult]


@pytest.fixture
def render(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Render:
    """Renders with Wan 2.1 I2V in a folder that has `night/cat.png`, and `noon/` with another cat.png."""
    model = assemble("wan21-i2v-tiny", tmp_path / "model")
    for name, picture in (("night/cat.png", PICTURE), ("noon/cat.png", LAST), ("noon/dog.png", PICTURE)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(picture, tmp_path / name)
    monkeypatch.setenv("WANCLI_CACHE", str(tmp_path / "cache"))

    def rendered(*options: object, **keys: Any) -> CommandResult:
        job = tiny_job(model, output="out/{image}-{id}.mp4") | QUICK | keys
        return run_wancli(capsys, "render", write_job(tmp_path, job), "-q", *options)

    return rendered


def digest(path: Path) -> str:
    """The SHA-256 of a picture's size and pixels."""
    rgb = Image.open(path).convert("RGB")
    return hashlib.sha256(f"{rgb.width}x{rgb.height}\n".encode() + rgb.tobytes()).hexdigest()


def videos(folder: Path) -> list[str]:
    return sorted(path.stem for path in (folder / "out").glob("*.mp4"))


def picture_of(folder: Path, name: str) -> dict[str, Any]:
    (found,) = manifest_of(folder, name)["pictures"]
    return dict(found)


def test_a_sweep_over_pictures_and_seeds_reads_each_picture_once(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    real = CLIPVision.forward

    def counted(self: CLIPVision, pixels: Any) -> Any:
        reads.append(len(pixels))
        return real(self, pixels)

    monkeypatch.setattr(CLIPVision, "forward", counted)
    said = render(matrix={"image": ["night/cat.png", "noon/dog.png", "noon/cat.png"], "seed": [1, 2]})
    assert said.code == 0, said.err
    assert sum(reads) == 2  # noon/dog.png has the pixels of night/cat.png
    found = {name: picture_of(tmp_path, name) for name in videos(tmp_path)}
    assert len(found) == 6
    for name, picture in found.items():
        assert name.startswith(Path(picture["path"]).stem)
        assert picture["sha256"] == digest(Path(picture["path"]))


def test_a_flag_sets_the_picture_or_a_key_beside_it(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    tall = {"image": "night/cat.png", "size": "32x64"}
    for id, flag, path, fit in (
        ("a", "image=../noon/cat.png", "noon/cat.png", "crop"),
        ("b", "image.first=../noon/cat.png", "noon/cat.png", "crop"),
        ("c", "image.fit=pad", "night/cat.png", "pad"),
        ("d", "image={first: ../noon/dog.png, fit: stretch}", "noon/dog.png", "stretch"),
    ):
        said = render("--set", flag, id=id, **tall)
        assert said.code == 0, said.err
        found = picture_of(tmp_path, f"{Path(path).stem}-{id}")
        assert (found["path"], found["fit"]) == (str(tmp_path / path), fit)
    keys = [manifest_of(tmp_path, name)["key"] for name in ("cat-a", "cat-b")]
    assert keys[0] == keys[1]
    said = render("--set", "image.last=../noon/cat.png", **tall)
    assert (said.code, "--set image.last: Wan2.1-I2V-480P takes no last frame" in said.err) == (2, True)


def test_pictures_of_one_name_in_several_folders_keep_apart(render: Render, tmp_path: Path) -> None:
    items = [{"image": "night/cat.png"}, {"image": {"first": "noon/cat.png", "fit": "pad"}}]
    said = render(items=items, output="out/{image}.mp4")
    assert said.code == 2
    assert "shots 0 and 1 would both write" in said.err
    assert render(items=items).code == 0
    assert videos(tmp_path) == ["cat-0000", "cat-0001"]
    digests = [picture_of(tmp_path, name)["sha256"] for name in videos(tmp_path)]
    assert digests == [digest(tmp_path / folder / "cat.png") for folder in ("night", "noon")]


@pytest.mark.parametrize("injected", [False, True])
def test_a_picture_that_changes_between_plan_and_render_fails_its_shot_and_no_other(
    injected: bool, render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = picture_stage.encode_frames

    def changed(*arguments: Any, **options: Any) -> Any:
        Image.fromarray(np.zeros((111, 157, 3), np.uint8)).save(tmp_path / "noon/cat.png")
        return real(*arguments, **options)

    monkeypatch.setattr("wancli.engine.pipeline.encode_frames", changed)
    keys = {"inject": [{"image": "noon/cat.png"}]} if injected else {"image": "noon/cat.png"}
    said = render(image="night/cat.png", items=[{"id": "a", **keys}, {"id": "b"}])
    assert said.code == 4, said.err
    assert "noon/cat.png: the picture has changed since it was planned" in said.err
    assert "The same command plans the new picture" in said.err
    assert videos(tmp_path) == ["cat-b"]
    monkeypatch.setattr("wancli.engine.pipeline.encode_frames", real)
    assert render(image="night/cat.png", items=[{"id": "a", **keys}, {"id": "b"}]).code == 0
    assert len(videos(tmp_path)) == 2
