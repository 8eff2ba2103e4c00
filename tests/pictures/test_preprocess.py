"""Frames and CLIP inputs against the tensors of the official code, diffusers and transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor
from PIL import Image
from safetensors.torch import load_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from wancli.pictures.preprocess import make_clip_input, make_frame
from wancli.pictures.read import read_pixels
from wancli.pictures.sizes import Fit, Method, Preprocessing

PICTURES = Path(__file__).parents[1] / "fixtures" / "pictures"
OFFICIAL = load_file(PICTURES / "official.safetensors")
FRAMES = [name for name in OFFICIAL if "clip" not in name]


def picture(name: str = "input") -> np.ndarray:
    return read_pixels(PICTURES / f"{name}.png", "ignore", "drop")


def gradient(width: int, height: int) -> np.ndarray:
    """Red grows to the right, green downwards."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([red, green, np.zeros_like(red)], axis=2).round().astype(np.uint8)


@pytest.mark.parametrize("name", FRAMES)
def test_an_official_frame_is_the_one_of_the_official_code(name: str) -> None:
    file, stride, size = name.split(".")
    width, height = map(int, size.split("x"))
    fit: Fit = "crop" if stride == "32" else "stretch"
    frame = make_frame(picture(file), width, height, Preprocessing("official", fit, int(stride)))
    assert frame.dtype == torch.float32
    assert (frame - OFFICIAL[name]).abs().max() <= 1e-5


def test_the_official_clip_input_is_the_one_of_the_official_code() -> None:
    made = make_clip_input(picture(), "official")
    assert made.shape == (3, 224, 224)
    assert (made[:, ::7, ::7] - OFFICIAL["input.clip.every_7"]).abs().max() <= 1e-5


@pytest.mark.parametrize("size", [(64, 48), (96, 64), (320, 240), (48, 64)])
@pytest.mark.parametrize("name", ["input", "last"])
def test_a_frame_of_diffusers_is_the_one_of_its_processor(name: str, size: tuple[int, int]) -> None:
    width, height = size
    processor = VideoProcessor(vae_scale_factor=8)
    wanted = processor.preprocess(Image.open(PICTURES / f"{name}.png"), height=height, width=width)[0]
    for stride in (16, 32):
        frame = make_frame(picture(name), width, height, Preprocessing("diffusers", "stretch", stride))
        assert (frame - wanted).abs().max() <= 1e-6


@pytest.mark.parametrize("size", [(157, 111), (111, 157), (224, 224), (500, 301), (90, 700)])
def test_a_clip_input_of_diffusers_is_the_one_of_the_processor(size: tuple[int, int]) -> None:
    pixels = np.asarray(Image.fromarray(picture()).resize(size))
    wanted = CLIPImageProcessorPil()(images=Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    assert (make_clip_input(pixels, "diffusers") - wanted).abs().max() <= 1e-5


def test_comfy_cuts_the_picture_before_it_resizes_and_squares_it_for_clip() -> None:
    halved = make_frame(gradient(200, 50), 32, 16, Preprocessing("comfy", "crop", 16))
    inside = torch.from_numpy(gradient(200, 50)[:, 50:150].copy()).permute(2, 0, 1)[None] / 255
    wanted = torch.nn.functional.interpolate(inside, size=(16, 32), mode="bilinear")[0] * 2 - 1
    assert (halved - wanted).abs().max() <= 1e-6
    square = make_clip_input(gradient(448, 224), "comfy")
    assert square.shape == (3, 224, 224)
    assert make_clip_input(gradient(224, 224), "comfy").shape == (3, 224, 224)
    middle = gradient(448, 224)[:, 112:336] / 255
    wanted = (
        torch.nn.functional.normalize(torch.zeros(1)) if False else torch.from_numpy(middle).permute(2, 0, 1)
    )
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    assert (square - (wanted - mean) / std).abs().max() <= 1e-5


@pytest.mark.parametrize("stride", [16, 32])
@pytest.mark.parametrize("method", ["official", "diffusers", "comfy"])
def test_every_fit_of_every_method_keeps_what_it_says(method: Method, stride: int) -> None:
    frames = {
        fit: make_frame(gradient(200, 100), 64, 64, Preprocessing(method, fit, stride))
        for fit in ("stretch", "crop", "pad")
    }
    assert {tuple(frame.shape) for frame in frames.values()} == {(3, 64, 64)}
    ends = {fit: (float(frame[0, 32, 0]), float(frame[0, 32, -1])) for fit, frame in frames.items()}
    assert ends["stretch"] == pytest.approx((-1, 1), abs=0.05)
    assert ends["crop"] == pytest.approx((-0.5, 0.5), abs=0.05)
    assert ends["pad"] == pytest.approx((-1, 1), abs=0.05)
    assert frames["pad"][:, :16].count_nonzero() == frames["pad"][:, 48:].count_nonzero() == 0
    assert frames["pad"][0, 16:48].count_nonzero() > 32 * 60


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (3, 2)])
@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_pictures_of_any_shape_become_finite_frames(fit: Fit, shape: tuple[int, int]) -> None:
    for method in ("official", "diffusers", "comfy"):
        for stride in (16, 32):
            frame = make_frame(gradient(*shape), 48, 32, Preprocessing(method, fit, stride))
            assert frame.shape == (3, 32, 48)
            assert frame.isfinite().all()
        assert make_clip_input(gradient(*shape), method).shape == (3, 224, 224)
