"""Every case of the official code, run as a job file through the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from oracles import relative_error
from safetensors.torch import load_file

from wancli.cli import run
from wancli.storage.manifest import read_json
from wancli.video import mp4

CASES = ("unipc_cfg6", "dpmpp_cfg5", "unipc_cfg1", "inject_cond_27_39", "inject_cond_steps")


def job_of(case: dict[str, Any], prompts: dict[str, str], model: Path) -> dict[str, Any]:
    job: dict[str, Any] = {
        "model": str(model),
        "output": "out/clip.mp4",
        "prompt": prompts["main"],
        "negative": prompts["negative"],
        "size": f"{case['width']}x{case['height']}",
        "frames": case["frames"],
        "seed": case["seed"],
        "sampler": {
            "solver": case["solver"],
            "steps": case["steps"],
            "shift": case["shift"],
            "guidance": case["cfg"],
        },
        "video": {"keep_latents": True, "crf": 0},
    }
    if rule := case.get("inject"):
        first, last = rule["blocks"]
        start, end = rule["steps"]
        job["inject"] = [
            {
                "prompt": prompts["injection"],
                "blocks": f"{first}-{last}",
                "strength": rule["strength"],
                "steps": f"{start}-{end - 1}",
                "branch": rule["branch"],
                "blend": rule["blend"],
            }
        ]
    return job


@pytest.mark.parametrize("name", CASES)
def test_a_job_gives_the_official_latents_and_video(
    name: str, tiny: Path, reference: Any, numbers: Any, tmp_path: Path
) -> None:
    case = reference["cases"][name]
    job = tmp_path / "clip.yaml"
    job.write_text(yaml.safe_dump(job_of(case, reference["prompts"], tiny)))
    assert run(["render", str(job), "-q"]) == 0

    z_CTYX = load_file(tmp_path / "out/clip.latents.safetensors")["latents"]
    assert relative_error(z_CTYX, numbers[f"{name}.latents"][-1]) < 1e-4
    body = read_json(tmp_path / "out/clip.manifest.json")
    assert body is not None
    assert body["shot"]["timesteps"] == numbers[f"{name}.timesteps"].tolist()

    frames = list(mp4.read_frames(tmp_path / "out/clip.mp4"))
    assert len(frames) == case["frames"]
    assert (frames[0].width, frames[0].height) == (case["width"], case["height"])
    if f"{name}.video" in numbers:
        official = (numbers[f"{name}.video"].permute(1, 2, 3, 0) + 1) / 2
        ours = torch.stack([torch.frombuffer(bytearray(f.rgb), dtype=torch.uint8) for f in frames])
        ours = ours.view(official.shape).float() / 255
        # The chroma of a 4:2:0 video is a quarter of the picture's, so noise is compared by its greys.
        luma = torch.tensor([0.2126, 0.7152, 0.0722])
        assert ((ours - official) @ luma).abs().mean() < 0.01


def test_the_decoder_gives_the_official_video_from_our_own_latents(
    tiny: Path, reference: Any, numbers: Any, tmp_path: Path
) -> None:
    from wancli.weights.checkpoint import identify
    from wancli.weights.loader import load_vae

    vae = load_vae(identify(tiny), "cpu")
    with torch.inference_mode():
        for name in ("unipc_cfg6", "dpmpp_cfg5", "unipc_cfg1"):
            z_CTYX = numbers[f"{name}.latents"][-1]
            frames_CTYX = torch.cat(list(vae.decode(z_CTYX)), dim=1)
            assert (frames_CTYX - numbers[f"{name}.video"]).abs().max() < 5e-3


def test_encode_writes_the_official_contexts(
    tiny: Path, reference: Any, numbers: Any, tmp_path: Path
) -> None:
    out = tmp_path / "texts.safetensors"
    texts = [reference["prompts"][name] for name in ("main", "injection", "negative")]
    assert run(["encode", "--model", str(tiny), "--out", str(out), "-q", *texts]) == 0
    rows = load_file(out)
    for index, name in enumerate(("main", "injection", "negative")):
        assert relative_error(rows[f"embedding.{index}"], numbers[f"context.{name}"]) < 1e-5


def test_a_job_that_names_embedding_files_renders_the_same_latents(
    tiny: Path, reference: Any, numbers: Any, tmp_path: Path
) -> None:
    texts = [reference["prompts"][name] for name in ("main", "injection", "negative")]
    out = tmp_path / "texts.safetensors"
    assert run(["encode", "--no-cache", "--model", str(tiny), "--out", str(out), "-q", *texts]) == 0
    job = job_of(reference["cases"]["inject_cond_27_39"], reference["prompts"], tiny)
    job["prompt"] = {"embedding": out.name}
    job["inject"][0]["prompt"] = {"embedding": out.name, "index": 1}
    job["negative"] = {"embedding": out.name, "index": 2}
    path = tmp_path / "clip.yaml"
    path.write_text(yaml.safe_dump(job))
    assert run(["render", str(path), "-q"]) == 0
    z_CTYX = load_file(tmp_path / "out/clip.latents.safetensors")["latents"]
    assert relative_error(z_CTYX, numbers["inject_cond_27_39.latents"][-1]) < 1e-4
    body = read_json(tmp_path / "out/clip.manifest.json")
    assert body is not None
    assert body["encoder_loaded"] is False
