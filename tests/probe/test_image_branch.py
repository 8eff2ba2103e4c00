"""`wancli probe` of what blocks read of pictures, against whole forwards of the official checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from image_cases import FIXTURES, LAST, assemble, case_keys, load
from jobs import CommandResult, run_wancli, tiny_job, write_job
from safetensors.torch import load_file

from wancli.injection import block_map
from wancli.models.dit import lerp
from wancli.models.given_frames import GivenFrames
from wancli.sampling.solvers import build_sigma_schedule
from wancli.video import mp4

I2V = FIXTURES / "wan21-i2v-tiny"
GAIN = 1.5
RANGES = [[5], list(range(20, 26))]
Probe = Callable[..., CommandResult]


@pytest.fixture
def picture_job() -> dict[str, Any]:
    """The first official case, whose rules inject a picture and a prompt."""
    prompts = json.loads((I2V / "reference.json").read_text())["prompts"]
    inject = [{"image": str(LAST), "gain": GAIN}, {"prompt": prompts["injection"]}]
    return case_keys(I2V.name, "dpmpp_cfg5") | {"inject": inject}


@pytest.fixture
def probe(picture_job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Probe:
    model = assemble(I2V.name, tmp_path / "model")

    def run_probe(*options: str, **changes: Any) -> CommandResult:
        job = write_job(tmp_path, tiny_job(model) | picture_job | changes)
        cache = ("--cache-dir", tmp_path / "cache")
        return run_wancli(capsys, "probe", job, "--levels", "1", *options, *cache, "-q")

    return run_probe


@torch.inference_mode()
def change_by_hand(attended: str, blocks: list[int], *, skips: bool = False) -> float:
    """The relative change of the first velocity, by whole forwards on the numbers of the official code."""
    of = load_file(I2V / "reference.safetensors")
    both = load_file(FIXTURES / "wan21-flf2v-tiny/reference.safetensors")["clip.input+last.features"]
    model = load(I2V)
    main, injected = (model.project(of[f"context.{name}"]) for name in ("main", "injection"))
    own = model.project_image(of["clip.input.features"].flatten(0, -2))
    other = lerp(own, model.project_image(both.view(2, 257, -1)[1]), GAIN)
    if skips:
        changed = [((own if attended == "text" else main), 1.0)]
    elif attended == "text":
        changed = [(injected, 1.0), (own, 1.0)]
    else:
        changed = [(main, 1.0), (other, 1.0)]
    mixes = [changed if block in blocks else [(main, 1.0), (own, 1.0)] for block in range(40)]
    x_1CTYX, given = (
        of["dpmpp_cfg5.noise"][None],
        GivenFrames(torch.cat((of["dpmpp_cfg5.mask"], of["dpmpp_cfg5.y"]))),
    )
    sampler = json.loads((I2V / "reference.json").read_text())["cases"]["dpmpp_cfg5"]
    t = build_sigma_schedule("dpm++", sampler["steps"], sampler["shift"]).timesteps[0]
    plain, v = (model(x_1CTYX, t, row, given) for row in ([[(main, 1.0), (own, 1.0)]] * 40, mixes))
    return ((v - plain).norm() / plain.norm()).item()


@pytest.mark.parametrize("method", ["inject", "skip"])
def test_both_branches_are_measured_as_whole_forwards_measure_them(method: str, probe: Probe) -> None:
    said = probe("--json", "--ranges", "5,20-25", "--method", method)
    assert said.code == 0, said.err
    found = json.loads(said.out)
    expected = {
        attended: [change_by_hand(attended, blocks, skips=method == "skip") for blocks in RANGES]
        for attended in ("text", "image")
    }
    assert found["values"] == [pytest.approx(expected["text"], rel=1e-3)]
    assert found["image"]["values"] == [pytest.approx(expected["image"], rel=1e-3)]
    assert min(*expected["text"], *expected["image"]) > 1e-4
    assert (found["hits"], found["image"]["hits"]) == (7, 7)
    assert (found["image"]["main"], found["image"]["injected"]) == ("input.png", "last.png")


def test_a_job_that_injects_a_picture_alone_has_a_map_of_the_image_branch_from_which_rules_take_blocks(
    probe: Probe, picture_job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inject = [picture_job["inject"][0] | {"blocks": "auto:top3"}]
    said = probe("--method", "gradient", inject=inject)
    assert said.code == 0, said.err
    assert "gradient map of shot 0000: 40 blocks at 1 noise level" in said.out
    assert "image branch, last.png: 40 hits" in said.out
    assert "text branch" not in said.out
    assert max(map(len, said.out.splitlines()[:-2])) <= 80
    found = block_map.read(tmp_path / "out/job.map.gradient.json")
    assert found
    assert found.image
    assert (found.prompts, found.values, found.total, len(found.image.total)) == ([], [], [], 40)
    cache = ("--cache-dir", tmp_path / "cache")
    planned = run_wancli(capsys, "plan", tmp_path / "job.yaml", "-v", *cache)
    top = sorted(block_map.rank(found.image.total)[:3])
    assert f"auto:top3  is {block_map.format_blocks(top)}, by the gradient map" in planned.out
    assert planned.err == ""
    job = yaml.safe_load((tmp_path / "job.yaml").read_text()) | {"image": str(LAST)}
    warned = run_wancli(capsys, "plan", write_job(tmp_path, job), *cache)
    assert "which was measured with 'input.png' against 'last.png'" in warned.err
    job["inject"] = [{"prompt": "A dog.", "blocks": "auto:top3"}]
    said = run_wancli(capsys, "plan", write_job(tmp_path, job), *cache)
    assert (said.code, "auto:top3 needs a map, and none was measured" in said.err) == (2, True)


def pixels(path: Path) -> np.ndarray[Any, Any]:
    return np.stack([np.frombuffer(frame.rgb, np.uint8).astype(float) for frame in mp4.read_frames(path)])


def test_whole_renders_measure_both_branches(probe: Probe, tmp_path: Path) -> None:
    sampler = {"steps": 2, "guidance": 1}
    said = probe("--json", "--method", "render", "--ranges", "5,20-25", sampler=sampler, frames=5)
    assert said.code == 0, said.err
    found, folder = json.loads(said.out), tmp_path / "out" / "clip.map"
    plain, *others = sorted(folder.glob("*.mp4"))
    assert [path.stem for path in (plain, *others)] == [
        "00-plain", "01-blocks-5", "02-blocks-20-25", "03-image-blocks-5", "04-image-blocks-20-25"
    ]  # fmt: skip
    differences = [abs(pixels(path) - pixels(plain)).mean() for path in others]
    assert [*found["total"], *found["image"]["total"]] == pytest.approx(differences)
    assert len({*differences}) == 4


def test_a_model_whose_blocks_attend_to_text_alone_is_refused_by_name(probe: Probe, tmp_path: Path) -> None:
    said = probe(model=str(assemble("wan22-i2v-tiny", tmp_path / "a14b")))
    assert said.code == 2
    assert "inject.0.image: the blocks of Wan2.2-I2V attend to text alone, not to pictures" in said.err
