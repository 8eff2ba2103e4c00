from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from live_bytes import LiveBytes, consume
from safetensors.torch import load_file
from torch import Tensor

from wancli.models import row_slices, vae_layers
from wancli.models.config import VAEConfig
from wancli.models.vae import LATENT_MEAN, LATENT_STD, WanVAE
from wancli.models.vae_layers import CausalCache, phase_kernels
from wancli.models.winograd import conv_over_time, group_sizes, transform_kernels

FIXTURE = Path(__file__).parents[1] / "fixtures" / "wan21-tiny"
MEAN, STD = (torch.tensor(values).view(-1, 1, 1, 1) for values in (LATENT_MEAN, LATENT_STD))


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = torch.load(FIXTURE / "Wan2.1_VAE.pth", weights_only=True)
    return loaded


@pytest.fixture(scope="module")
def official() -> WanVAE:
    """Our network with the weights of the fixture, loaded as the program does it."""
    with torch.device("meta"):
        vae = WanVAE(VAEConfig(dim=4))
    vae.load_state_dict(torch.load(FIXTURE / "Wan2.1_VAE.pth", weights_only=True), assign=True, strict=True)
    return vae.requires_grad_(False)


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return load_file(FIXTURE / "reference.safetensors")


@pytest.fixture(scope="module")
def pair() -> tuple[WanVAE, AutoencoderKLWan]:
    """Ours and diffusers', one set of random weights, wide enough for well-conditioned norms."""
    torch.manual_seed(0)
    theirs = AutoencoderKLWan(base_dim=16).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    ours = WanVAE(VAEConfig(dim=16))
    known = theirs.state_dict()
    ours.load_state_dict(
        {name: known[diffusers_name(name)].clone() for name in ours.state_dict()}, strict=True
    )
    return ours, theirs


def diffusers_name(official: str) -> str:
    """Official parameter name to that of AutoencoderKLWan."""
    stage = re.fullmatch(r"decoder\.upsamples\.(\d+)\.(.+)", official)
    if stage:
        block, place = divmod(int(stage[1]), 4)
        official = (
            f"decoder.up_blocks.{block}.{'upsamplers.0' if place == 3 else f'resnets.{place}'}.{stage[2]}"
        )
    for pattern, name in (
        (r"^conv1\.", "quant_conv."),
        (r"^conv2\.", "post_quant_conv."),
        (r"coder\.conv1\.", "coder.conv_in."),
        (r"head\.0\.", "norm_out."),
        (r"head\.2\.", "conv_out."),
        (r"middle\.0\.", "mid_block.resnets.0."),
        (r"middle\.1\.", "mid_block.attentions.0."),
        (r"middle\.2\.", "mid_block.resnets.1."),
        (r"encoder\.downsamples\.", "encoder.down_blocks."),
        (r"residual\.0\.", "norm1."),
        (r"residual\.2\.", "conv1."),
        (r"residual\.3\.", "norm2."),
        (r"residual\.6\.", "conv2."),
        (r"shortcut\.", "conv_shortcut."),
    ):
        official = re.sub(pattern, name, official)
    return official


def clip(vae: WanVAE, z: Tensor, chunk: int = 1) -> Tensor:
    return torch.cat(list(vae.decode(z, chunk)), dim=1)


def diffusers_clip(vae: AutoencoderKLWan, z: Tensor) -> Tensor:
    frames: Tensor = vae.decode((z * STD + MEAN)[None]).sample[0]
    return frames


def latent(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(16, *shape, generator=torch.Generator().manual_seed(seed))


def video(*shape: int) -> Tensor:
    return torch.rand(3, *shape, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.mark.parametrize("case", ["unipc_cfg6", "dpmpp_cfg5", "unipc_cfg1"])
def test_the_latents_of_the_official_code_decode_to_its_video(
    case: str, official: WanVAE, reference: dict[str, Tensor]
) -> None:
    frames = clip(official, reference[f"{case}.latents"][-1])
    assert (frames - reference[f"{case}.video"]).abs().max() < 1e-4


def test_the_parameters_are_those_of_the_official_checkpoint(weights: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        tiny, full = WanVAE(VAEConfig(dim=4)), WanVAE(VAEConfig())
    assert {name: tensor.shape for name, tensor in tiny.state_dict().items()} == {
        name: tensor.shape for name, tensor in weights.items()
    }
    assert len(full.state_dict()) == 194
    assert sum(parameter.numel() for parameter in full.parameters()) == 126_892_531


def test_the_latent_statistics_are_those_that_diffusers_ships(pair: tuple[WanVAE, AutoencoderKLWan]) -> None:
    assert list(LATENT_MEAN) == pair[1].config.latents_mean
    assert list(LATENT_STD) == pair[1].config.latents_std


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 5, 7), (5, 3, 6)])
@torch.no_grad()
def test_decoding_agrees_with_diffusers(
    shape: tuple[int, ...], pair: tuple[WanVAE, AutoencoderKLWan]
) -> None:
    ours, theirs = pair
    z = latent(*shape)
    frames, expected = clip(ours, z), diffusers_clip(theirs, z)
    assert frames.shape == expected.shape
    assert (frames - expected).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(1, 16, 16), (9, 40, 56), (17, 24, 48)])
@torch.no_grad()
def test_encoding_agrees_with_diffusers(
    shape: tuple[int, ...], pair: tuple[WanVAE, AutoencoderKLWan]
) -> None:
    ours, theirs = pair
    frames = video(*shape)
    expected = (theirs.encode(frames[None]).latent_dist.mode()[0] - MEAN) / STD
    z = ours.encode(frames)
    assert z.shape == expected.shape
    assert (z - expected).abs().max() < 1e-5


def test_a_clip_comes_as_one_frame_and_then_four_for_each_latent_frame_of_the_chunk(official: WanVAE) -> None:
    pieces = list(official.decode(latent(6, 2, 4), chunk=2))
    assert [tuple(piece.shape) for piece in pieces] == [
        (3, 1, 16, 32),
        (3, 8, 16, 32),
        (3, 8, 16, 32),
        (3, 4, 16, 32),
    ]
    assert all(piece.dtype == torch.float32 and piece.abs().max() <= 1 for piece in pieces)


@pytest.mark.parametrize("chunk", [2, 3, 6])
def test_the_chunk_size_does_not_change_the_decoded_frames(
    chunk: int, pair: tuple[WanVAE, AutoencoderKLWan]
) -> None:
    z = latent(7, 4, 6)
    assert (clip(pair[0], z, chunk) - clip(pair[0], z)).abs().max() < 1e-5


@pytest.mark.parametrize("chunk", [8, 12, 24])
def test_the_chunk_size_does_not_change_the_encoded_latent(
    chunk: int, pair: tuple[WanVAE, AutoencoderKLWan]
) -> None:
    frames = video(25, 16, 24)
    assert (pair[0].encode(frames, chunk) - pair[0].encode(frames)).abs().max() < 1e-5


def test_row_slices_do_not_change_the_result(
    pair: tuple[WanVAE, AutoencoderKLWan], monkeypatch: pytest.MonkeyPatch
) -> None:
    z, frames = latent(3, 5, 6), video(9, 40, 48)
    whole = clip(pair[0], z), pair[0].encode(frames)
    monkeypatch.setattr(row_slices, "SLICE_VALUES", 1)
    monkeypatch.setattr(row_slices, "MIN_SLICE_ROWS", 3)
    monkeypatch.setattr(vae_layers, "QUERY_ROWS", 7)
    assert (clip(pair[0], z) - whole[0]).abs().max() < 1e-5
    assert (pair[0].encode(frames) - whole[1]).abs().max() < 1e-5


def test_two_clips_decoded_by_turns_do_not_mix(official: WanVAE) -> None:
    one, other = latent(3, 2, 2, seed=3), latent(3, 2, 2, seed=4)
    by_turns = list(zip(official.decode(one), official.decode(other), strict=True))
    for i, z in enumerate((one, other)):
        assert torch.equal(torch.cat([pieces[i] for pieces in by_turns], dim=1), clip(official, z))


def test_gradients_through_a_whole_clip_are_those_of_diffusers(pair: tuple[WanVAE, AutoencoderKLWan]) -> None:
    ours, theirs = pair
    frames, z = video(9, 16, 24), latent(3, 2, 3)
    target_z, target_frames = latent(3, 2, 3, seed=5), frames.flip(1)
    name = "decoder.upsamples.3.time_conv.weight"

    mean, _ = ours.encode_chunk(frames, CausalCache())
    loss = (mean * target_z).sum() + (ours.decode_chunk(z, CausalCache()).clamp(-1, 1) * target_frames).sum()
    parameters = [ours.encoder.conv1.weight, ours.get_parameter(name), ours.encoder.head[0].gamma]
    gradients = torch.autograd.grad(loss, parameters)

    their_mean = theirs.encode(frames[None]).latent_dist.mean[0]
    their_frames = diffusers_clip(theirs, z)
    their_loss = (their_mean * target_z).sum() + (their_frames * target_frames).sum()
    their_names = [diffusers_name(n) for n in ("encoder.conv1.weight", name, "encoder.head.0.gamma")]
    expected = torch.autograd.grad(their_loss, [theirs.get_parameter(n) for n in their_names])
    for gradient, their_gradient in zip(gradients, expected, strict=True):
        assert (gradient - their_gradient).norm() < 1e-4 * their_gradient.norm()


def test_the_differentiable_pass_gives_the_frames_and_latents_of_the_streaming_one(
    pair: tuple[WanVAE, AutoencoderKLWan],
) -> None:
    vae = pair[0]
    z, frames = latent(4, 3, 4), video(13, 24, 32)
    assert (vae.decode_chunk(z, CausalCache()).clamp(-1, 1) - clip(vae, z, 3)).abs().max() < 1e-5
    mean, log_variance = vae.encode_chunk(frames, CausalCache())
    assert mean.requires_grad
    assert log_variance.requires_grad
    assert ((mean - MEAN) / STD - vae.encode(frames)).abs().max() < 1e-5


def test_sixteen_bit_weights_give_nearly_the_same_clip(pair: tuple[WanVAE, AutoencoderKLWan]) -> None:
    half = copy.deepcopy(pair[0]).to(torch.bfloat16)
    z, frames = latent(2, 4, 4), video(5, 32, 32)
    whole_clip, whole_latent = clip(pair[0], z), pair[0].encode(frames)
    assert (clip(half, z) - whole_clip).norm() < 0.05 * whole_clip.norm()
    assert (half.encode(frames) - whole_latent).norm() < 0.05 * whole_latent.norm()


def test_memory_does_not_grow_with_the_length_of_the_clip(official: WanVAE) -> None:
    peaks = []
    for frames in (3, 21):
        z = latent(frames, 4, 4)
        with LiveBytes() as live:
            live.seen.add(z.untyped_storage().data_ptr())
            consume(official.decode(z))
        peaks.append(live.peak)
    assert peaks[0] == peaks[1] > 0


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 7, 8])
def test_mixing_frames_before_the_convolution_is_the_same_convolution(frames: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(frames + 2, 6, 5, 3, dtype=torch.float64)
    weight, bias = torch.randn(4, 3, 3, 3, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    results = conv_over_time([*x], transform_kernels(weight, set(group_sizes(frames))), bias)
    expected = F.conv3d(x.permute(3, 0, 1, 2)[None], weight, bias, padding=(0, 0, 1))[0].permute(1, 2, 3, 0)
    torch.testing.assert_close(torch.stack(results), expected, rtol=1e-12, atol=1e-12)


def test_phase_kernels_do_to_an_image_what_the_kernel_does_to_the_doubled_one() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 3, 3, dtype=torch.float64)
    expected = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest-exact"), weight, padding=1)
    y = F.conv2d(x, phase_kernels(weight), padding=1).view(2, 2, 2, 5, 6)
    for r, s in ((0, 0), (0, 1), (1, 0), (1, 1)):
        torch.testing.assert_close(y[r, s, :, r : r + 4, s : s + 5], expected[0, :, r::2, s::2])
