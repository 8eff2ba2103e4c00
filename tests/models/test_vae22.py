"""The VAE of Wan 2.2 TI2V-5B against diffusers' AutoencoderKLWan with the same random weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan as theirs
from live_bytes import LiveBytes, consume
from torch import Tensor

from wancli.errors import CheckpointError
from wancli.models import parameter_count, row_slices
from wancli.models.config import VAE22Config, VAEConfig
from wancli.models.vae22 import (
    LATENT_MEAN,
    LATENT_STD,
    WanVAE22,
    add_upsample_shortcut,
    downsample_shortcut,
    patchify,
    unpatchify,
)
from wancli.models.vae_layers import CausalCache
from wancli.resources import memory_model
from wancli.weights.formats.infer_config import infer_vae22_config, infer_vae_config
from wancli.weights.formats.key_mapping import choose_vae_renaming, vae22_from_diffusers

MEAN, STD = (torch.tensor(values).view(-1, 1, 1, 1) for values in (LATENT_MEAN, LATENT_STD))
TINY = VAE22Config(dim=8, dec_dim=12)
Pair = tuple[WanVAE22, AutoencoderKLWan]


def diffusers_vae(**sizes: Any) -> AutoencoderKLWan:
    """Their 2.2 VAE, by default as large as TI2V-5B's."""
    said = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48} | sizes
    return AutoencoderKLWan(is_residual=True, in_channels=12, out_channels=12, patch_size=2, **said).eval()


@pytest.fixture(scope="module")
def pair() -> Pair:
    torch.manual_seed(0)
    vae = diffusers_vae(base_dim=TINY.dim, decoder_base_dim=TINY.dec_dim)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    ours = WanVAE22(TINY)
    ours.load_state_dict(
        {vae22_from_diffusers(name): value.clone() for name, value in vae.state_dict().items()}
    )
    return ours, vae


def shapes(vae: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}


def clip(vae: WanVAE22, z: Tensor, chunk: int = 1) -> Tensor:
    return torch.cat(list(vae.decode(z, chunk)), dim=1)


def latent(*shape: int) -> Tensor:
    return torch.randn(48, *shape, generator=torch.Generator().manual_seed(1))


def video(*shape: int) -> Tensor:
    return torch.rand(3, *shape, generator=torch.Generator().manual_seed(2)) * 2 - 1


# ---- names and sizes ----


def test_the_parameters_are_those_of_diffusers_under_official_names() -> None:
    with torch.device("meta"):
        ours, vae = WanVAE22(VAE22Config()), diffusers_vae()
    assert shapes(ours) == {vae22_from_diffusers(name): shape for name, shape in shapes(vae).items()}
    assert len(shapes(ours)) == 196
    assert sum(parameter.numel() for parameter in ours.parameters()) == 704_688_668


def test_names_that_the_table_does_not_know_stay_as_they_are() -> None:
    for name in ("blocks", "decoder.up_blocks.0", "lora.up_blocks.0.upsampler.weight"):
        assert vae22_from_diffusers(name) == name


def test_the_kind_of_a_vae_is_seen_in_its_names() -> None:
    with torch.device("meta"):
        old, new = AutoencoderKLWan(), diffusers_vae()
    for vae, sizes in ((old, VAEConfig()), (new, VAE22Config())):
        rename = choose_vae_renaming(vae.state_dict())
        official = {rename(name): shape for name, shape in shapes(vae).items()}
        assert choose_vae_renaming(official) is str
        assert infer_vae_config(official, "here") == sizes


def test_sizes_are_read_off_the_shapes(pair: Pair) -> None:
    odd = VAE22Config(4, 6, 10, (1, 1, 4), temporal_downsample=(True, False))
    with torch.device("meta"):
        assert infer_vae22_config(shapes(WanVAE22(odd)), "here") == odd
    assert infer_vae22_config(shapes(pair[0]), "here") == TINY


@pytest.mark.parametrize(
    ("name", "shape", "problem"),
    [
        ("encoder.conv1.weight", (8, 3, 3, 3, 3), r"here: no Wan 2.2 VAE: encoder.conv1.weight"),
        ("conv2.weight", (), r"here: no Wan 2.2 VAE: tuple index out of range"),
        ("encoder.downsamples.1.downsamples.0.residual.2.weight", (24,), r"here: widths of \(1, 3, 4, 4\)"),
    ],
)
def test_another_vae_is_refused(pair: Pair, name: str, shape: tuple[int, ...], problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        infer_vae22_config(shapes(pair[0]) | {name: shape}, "here")


# ---- decoding and encoding ----


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 3, 4), (2, 5, 3), (3, 2, 4), (5, 3, 2)])
@torch.no_grad()
def test_decoding_agrees_with_diffusers(shape: tuple[int, ...], chunk: int, pair: Pair) -> None:
    ours, vae = pair
    z = latent(*shape)
    frames, expected = clip(ours, z, chunk), vae.decode((z * STD + MEAN)[None]).sample[0]
    assert frames.shape == expected.shape == (3, 4 * shape[0] - 3, 16 * shape[1], 16 * shape[2])
    assert (frames - expected).abs().max() < 1e-5
    assert expected.std() > 0.1


@pytest.mark.parametrize("chunk", [4, 8])
@pytest.mark.parametrize("shape", [(1, 48, 32), (5, 32, 64), (9, 16, 48), (17, 32, 32)])
@torch.no_grad()
def test_encoding_agrees_with_diffusers(shape: tuple[int, ...], chunk: int, pair: Pair) -> None:
    ours, vae = pair
    frames = video(*shape)
    z, expected = ours.encode(frames, chunk), (vae.encode(frames[None]).latent_dist.mode()[0] - MEAN) / STD
    assert z.shape == expected.shape
    assert (z - expected).abs().max() < 1e-5
    assert expected.std() > 0.1


def test_a_clip_comes_as_one_frame_and_then_four_for_each_latent_frame_of_the_chunk(pair: Pair) -> None:
    pieces = list(pair[0].decode(5 * latent(4, 2, 3), chunk=2))
    assert [tuple(piece.shape) for piece in pieces] == [(3, 1, 32, 48), (3, 8, 32, 48), (3, 4, 32, 48)]
    assert all(piece.dtype == torch.float32 for piece in pieces)
    assert max(piece.abs().max() for piece in pieces) == 1  # clamped


def test_row_slices_do_not_change_the_result(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    z, frames = latent(3, 3, 2), video(9, 32, 48)
    whole = clip(pair[0], z), pair[0].encode(frames)
    monkeypatch.setattr(row_slices, "SLICE_VALUES", 1)
    monkeypatch.setattr(row_slices, "MIN_SLICE_ROWS", 3)
    assert (clip(pair[0], z) - whole[0]).abs().max() < 1e-5
    assert (pair[0].encode(frames) - whole[1]).abs().max() < 1e-5


def test_the_differentiable_pass_gives_the_frames_and_latents_of_the_streaming_one(pair: Pair) -> None:
    z, frames = latent(3, 2, 3), video(9, 32, 32)
    whole = pair[0].decode_chunk(z, CausalCache())
    assert whole.requires_grad
    assert (whole.clamp(-1, 1) - clip(pair[0], z)).abs().max() < 1e-5
    mean, _ = pair[0].encode_chunk(frames, CausalCache())
    assert ((mean - MEAN) / STD - pair[0].encode(frames)).abs().max() < 1e-5


def test_sixteen_bit_weights_give_nearly_the_same_clip(pair: Pair) -> None:
    half = copy.deepcopy(pair[0]).to(torch.bfloat16)
    z = latent(2, 2, 3)
    assert (clip(half, z) - clip(pair[0], z)).norm() < 0.05 * clip(pair[0], z).norm()


# ---- shortcuts and patches ----


@pytest.mark.parametrize("in_time", [False, True])
@pytest.mark.parametrize(("c_in", "c_out"), [(8, 8), (8, 16), (8, 32)])
@pytest.mark.parametrize("frames", [1, 4, 5])
def test_the_shortcut_down_is_that_of_diffusers(c_in: int, c_out: int, frames: int, in_time: bool) -> None:
    x = torch.randn(c_in, frames, 6, 4)
    expected = theirs.AvgDown3D(c_in, c_out, factor_t=1 + in_time, factor_s=2)(x[None])[0]
    torch.testing.assert_close(
        downsample_shortcut(x.permute(1, 2, 3, 0), c_out, in_time).permute(3, 0, 1, 2), expected
    )


@pytest.mark.parametrize("in_time", [False, True])
@pytest.mark.parametrize(("c_in", "c_out"), [(16, 16), (16, 8), (16, 4)])
@pytest.mark.parametrize("first", [False, True])
def test_the_shortcut_up_is_that_of_diffusers(c_in: int, c_out: int, first: bool, in_time: bool) -> None:
    x = torch.randn(c_in, 3, 4, 5)
    up = theirs.DupUp3D(c_in, c_out, factor_t=1 + in_time, factor_s=2)
    expected = up(x[None], first_chunk=first)[0]
    y = torch.randn(expected.shape)
    result = add_upsample_shortcut(y.permute(1, 2, 3, 0).clone(), x.permute(1, 2, 3, 0), in_time)
    torch.testing.assert_close(result.permute(3, 0, 1, 2), y + expected)


def test_patches_are_those_of_diffusers() -> None:
    x = video(2, 6, 4)
    expected = theirs.patchify(x[None], 2)[0]
    patches = patchify(x.permute(1, 2, 3, 0))
    assert torch.equal(patches.permute(3, 0, 1, 2), expected)
    assert torch.equal(unpatchify(patches).permute(3, 0, 1, 2), theirs.unpatchify(expected[None], 2)[0])


# ---- memory ----


def test_memory_does_not_grow_with_the_length_of_the_clip(pair: Pair) -> None:
    pair[0].requires_grad_(False)
    peaks = []
    for frames in (3, 9):
        z = latent(frames, 2, 2)
        with LiveBytes() as live:
            live.seen.add(z.untyped_storage().data_ptr())
            consume(pair[0].decode(z))
        peaks.append(live.peak)
    assert peaks[0] == peaks[1] > 0


@pytest.mark.parametrize("config", [VAE22Config(), TINY, VAE22Config(4, 6, 10, (1, 1, 4), 1, (True, False))])
def test_a_vae_of_any_size_is_counted_exactly(config: VAE22Config) -> None:
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in WanVAE22(config).parameters())
    assert parameter_count.vae_parameters(config) == count


def test_what_decoding_needs_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_slices, "SLICE_VALUES", 1)  # as thin as the strips of a real frame
    monkeypatch.setattr(row_slices, "MIN_SLICE_ROWS", 4)
    config, stream = VAE22Config(4, 8), CausalCache()
    vae = WanVAE22(config).requires_grad_(False)
    z = latent(7, 8, 8)
    with torch.no_grad(), LiveBytes() as live:
        for start, stop in ((0, 1), (1, 4), (4, 7)):
            vae.decode_chunk(z[:, start:stop], stream)
    kept = sum(past.nbytes for past in stream.frames.values())
    predicted = memory_model.decode_coefficients(config).phase((48, 7, 8, 8), chunk=3)
    # Two rows of overlap are an eighth of a strip of 16 rows, and half of one of four.
    assert 0.9 * predicted.buffer < kept * (18 / 16) / (6 / 4) <= 1.01 * predicted.buffer
    assert 0.8 * predicted.activation < live.peak - kept < 1.2 * predicted.activation


def test_a_clip_of_ti2v_needs_what_its_widest_stage_holds() -> None:
    latents = (48, 31, 44, 80)  # 121 frames of 1280x704
    phase = memory_model.decode_coefficients(VAE22Config()).phase(latents, chunk=1)
    assert phase.model == 4 * 704_688_668
    pixels = 4 * 352 * 640
    assert 4 * pixels * (512 + 2 * 256) < phase.activation < 1.05 * 4 * pixels * (512 + 2 * 256)
    assert memory_model.decode_coefficients(VAE22Config()).phase((48, 5, 44, 80), chunk=1) == phase
