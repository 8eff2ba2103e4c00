"""Videos from pictures under `preprocess: diffusers`, against diffusers' whole WanImageToVideoPipeline.

Four pipelines of random weights: Wan 2.1 I2V and FLF2V with CLIP, two experts of Wan 2.2, TI2V-5B.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline
from image_cases import LAST, PICTURE
from jobs import CAT, FISH, KEPT, latents_of, manifest_of, run_wancli, tiny_job, write_job
from oracles import relative_error
from PIL import Image
from saved_pipelines import SavedPipeline, random_transformer, random_vae22
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

STEPS, SHIFT, SEED, FRAMES = 6, 5.0, 11, 9
SIZE = (64, 96)  # height and width; the pictures have another aspect
NEGATIVE = "crowded market, fog"


def with_clip(**rows: Any) -> dict[str, Any]:
    config = CLIPVisionConfig(
        hidden_size=160, num_attention_heads=2, num_hidden_layers=3, intermediate_size=320,
        patch_size=14, image_size=224, hidden_act="gelu",
    )  # fmt: skip
    reads = {"image_dim": 160, "added_kv_proj_dim": 44, **rows}
    return {
        "transformer": random_transformer(36, **reads),
        "image_encoder": CLIPVisionModel(config).eval(),
        "image_processor": CLIPImageProcessorPil(),
    }


def experts() -> dict[str, Any]:
    both = {"transformer": random_transformer(36), "transformer_2": random_transformer(36)}
    return both | {"boundary_ratio": 0.9}


PIPELINES: dict[str, Callable[[], dict[str, Any]]] = {
    "i2v": with_clip,
    "flf2v": lambda: with_clip(pos_embed_seq_len=514),
    "a14b": experts,
    "a14b with a last frame": experts,
    "ti2v": lambda: {"transformer": random_transformer(48, 48), "expand_timesteps": True},
}
GUIDANCE: dict[str, tuple[Any, dict[str, float]]] = {
    "a14b": ({"high": 4.0, "low": 3.0}, {"guidance_scale": 4.0, "guidance_scale_2": 3.0}),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", PIPELINES)
@torch.inference_mode()
def test_a_picture_gives_the_latents_of_the_pipelines_of_diffusers(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    vae = random_vae22() if name == "ti2v" else AutoencoderKLWan(base_dim=4)
    saved = SavedPipeline(tmp_path / "model", WanImageToVideoPipeline, vae, SHIFT, **PIPELINES[name]())
    image, call = {"first": str(PICTURE), "preprocess": "diffusers"}, {"image": Image.open(PICTURE)}
    if name == "flf2v" or name.endswith("last frame"):
        image, call = image | {"last": str(LAST)}, call | {"last_image": Image.open(LAST)}
    ours, theirs = GUIDANCE.get(name.split()[0], (5.0, {"guidance_scale": 5.0}))
    height, width = SIZE
    job = tiny_job(
        saved.folder, negative=NEGATIVE, seed=SEED, frames=FRAMES, size=f"{width}x{height}", image=image,
        sampler={"steps": STEPS, "shift": SHIFT, "guidance": ours}, video=KEPT,
    )  # fmt: skip
    said = run_wancli(capsys, "render", write_job(tmp_path, job), "--cache-dir", tmp_path / "cache")
    assert said.code == 0, said.err

    stride, channels = (16, 48) if name == "ti2v" else (8, 16)
    shape = (channels, (FRAMES - 1) // 4 + 1, height // stride, width // stride)
    settings = {"height": height, "width": width, "num_frames": FRAMES, "num_inference_steps": STEPS} | theirs
    expected = saved.latents(shape, SEED, CAT, NEGATIVE, **settings, **call)
    assert relative_error(latents_of(tmp_path), expected) <= 1e-4
    given = [picture["preprocess"] for picture in manifest_of(tmp_path)["pictures"]]
    assert given == ["diffusers"] * len(call)
    other = saved.latents(shape, SEED, CAT, NEGATIVE, **settings, **call | {"image": Image.open(LAST)})
    assert relative_error(other, expected) > 1e-3  # the picture has a say in them
    other = saved.latents(shape, SEED, FISH, NEGATIVE, **settings, **call)
    assert relative_error(other, expected) > 1e-3
