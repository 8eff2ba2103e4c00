"""Masks and latents of given frames against the official numbers."""

from __future__ import annotations

import pytest
import torch
from image_cases import FIXTURES, Case, all_cases
from oracles import relative_error

from wancli.models import vae as vae_module
from wancli.models.config import VAE22Config, VAEConfig
from wancli.models.given_frames import GivenFrames, encode_channels, encode_picture, frame_mask
from wancli.models.vae import LATENT_MEAN, LATENT_STD, VAE, WanVAE
from wancli.models.vae22 import WanVAE22
from wancli.models.vae_layers import CausalCache, ResidualBlock


@pytest.fixture(scope="module")
def vae() -> VAE:
    network = WanVAE(VAEConfig(dim=4))
    network.load_state_dict(torch.load(FIXTURES / "wan21-tiny/Wan2.1_VAE.pth", weights_only=True))
    return network.requires_grad_(False)


@pytest.fixture(scope="module")
def vae22() -> VAE:
    network = WanVAE22(VAE22Config(dim=4, dec_dim=4))
    network.load_state_dict(torch.load(FIXTURES / "wan22-ti2v-tiny/Wan2.2_VAE.pth", weights_only=True))
    return network.requires_grad_(False)


@pytest.mark.parametrize("case", [case for case in all_cases() if case.has("y")], ids=str)
def test_mask_and_latents_are_those_of_the_official_code(case: Case, vae: VAE) -> None:
    channels_CTYX = encode_channels(vae, case.pictures, case.settings["frames"])
    assert torch.equal(channels_CTYX[:4], case["mask"])
    assert relative_error(channels_CTYX[4:], case["y"]) < 1e-5


@pytest.mark.parametrize("case", [case for case in all_cases() if case.has("z_image")], ids=str)
def test_the_latent_of_a_first_frame_is_that_of_the_official_code(case: Case, vae22: VAE) -> None:
    z_CTYX = encode_picture(vae22, case.pictures[0])
    assert relative_error(z_CTYX, case["z_image"]) < 1e-5
    assert relative_error(GivenFrames(first_CTYX=z_CTYX).put_into(case["noise"]), case["input_step0"]) < 1e-5


@pytest.mark.parametrize("name", ["image_unipc_cfg1", "text_dpmpp_cfg4"])
def test_the_decoder_of_wan_2_2_gives_the_official_video(name: str, vae22: VAE) -> None:
    (case,) = (case for case in all_cases() if (case.set, case.name) == ("wan22-ti2v-tiny", name))
    frames = torch.cat(list(vae22.decode(case["latents"][-1])), dim=1)
    assert (frames - case["video"]).abs().max() < 5e-4


def test_channels_of_the_mask_are_the_frames_of_a_latent_frame() -> None:
    first, later = [1.0] * 4, [0.0] * 4
    assert frame_mask(9, {0}).T.tolist() == [first, later, later]
    assert frame_mask(9, {0, 8}).T.tolist() == [first, later, [0, 0, 0, 1]]
    assert frame_mask(9, {5}).T.tolist() == [later, later, [1, 0, 0, 0]]
    assert frame_mask(1, {0}).T.tolist() == [first]


def test_without_given_first_frames_a_latent_stays_as_it_is() -> None:
    x_CTYX = torch.randn(2, 3, 4, 4)
    assert GivenFrames(channels_CTYX=torch.ones(4, 3, 4, 4)).put_into(x_CTYX) is x_CTYX


@pytest.mark.parametrize("given", [{0}, {0, 80}, {0, 41}])
@torch.no_grad()
def test_repeated_frames_are_encoded_once_with_the_same_bits(
    given: set[int], vae: VAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    video_CTYX = torch.zeros(3, 81, 16, 24)
    for number in given:
        video_CTYX[:, number] = torch.randn(3, 16, 24)
    vae_module.to_channels_last(vae.encoder)  # as `encode` does, which decides how kernels round
    cache, spans = CausalCache(), [(0, 1), *((start, start + 4) for start in range(1, 81, 4))]
    mean_CTYX = torch.cat([vae.encode_chunk(video_CTYX[:, a:b], cache)[0] for a, b in spans], dim=1)
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (LATENT_MEAN, LATENT_STD))

    calls = []
    forward = ResidualBlock.forward
    monkeypatch.setattr(ResidualBlock, "forward", lambda *args: (calls.append(1), forward(*args))[1])
    channels_CTYX = encode_channels(vae, {n: video_CTYX[:, n] for n in given}, 81)
    assert torch.equal(channels_CTYX[4:], (mean_CTYX - mean) / std)
    assert len(calls) < 10 * 21  # the encoder has ten residual blocks


@torch.no_grad()
def test_a_layer_settles_after_the_chunks_that_it_looks_back(vae: VAE) -> None:
    """The lag of each layer, against the first chunk from which its output really repeats."""
    outputs: dict[int, list[torch.Tensor]] = {}
    cache, layers = CausalCache(), [*vae.encoder.downsamples, *vae.encoder.middle]  # type: ignore[misc]
    frames: dict[int, int] = {}

    def keep(index: int, x_TYXC: torch.Tensor, y_TYXC: torch.Tensor) -> None:
        frames[index] = len(x_TYXC)
        outputs.setdefault(index, []).append(y_TYXC.clone())

    handles = [
        layer.register_forward_hook(lambda _, args, out, i=i: keep(i, args[0], out))
        for i, layer in enumerate(layers)
    ]
    chunk_CTYX = torch.zeros(3, 4, 16, 16)
    vae.encode_chunk(torch.randn(3, 1, 16, 16), cache)
    for _ in range(40):
        vae.encode_chunk(chunk_CTYX, cache)
    for handle in handles:
        handle.remove()
    lag = vae_module.settling_chunks(vae.encoder.conv1, 4)  # type: ignore[arg-type]
    for index, layer in enumerate(layers):
        lag += vae_module.settling_chunks(layer, frames[index])
        of_chunks = outputs[index][1:]
        assert all(torch.equal(of_chunks[lag], later) for later in of_chunks[lag:])
