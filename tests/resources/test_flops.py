"""Arithmetic predicted from sizes, against torch's own counter on wancli, transformers and diffusers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from wancli.models import t5
from wancli.models.config import CLIPConfig, T5Config, VAE22Config, VAEConfig, WanConfig
from wancli.models.dit import WanModel
from wancli.models.given_frames import GivenFrames
from wancli.resources import flops


def counted(run: Callable[[], object]) -> int:
    # The counter does not know the fused attention of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("latent", [(16, 1, 4, 4), (16, 3, 8, 6)])
def test_a_forward_of_the_transformer_and_its_context(latent: tuple[int, int, int, int]) -> None:
    config = WanConfig(dim=48, ffn_dim=80, num_heads=4, num_layers=3, text_dim=20)
    model = WanModel(config)
    _, t, y, x = latent
    tokens = t * y * x // 4

    def run() -> None:  # with gradients, without which a CPU multiplies by an operator that is not counted
        context = model.project(torch.randn(9, 20))
        model(torch.randn(1, *latent), 500.0, [((context, 1.0),)] * 3)

    predicted = flops.forward_flops(config, tokens, 3 * 10) + flops.context_flops(config, 10)
    assert counted(run) == predicted


def test_a_forward_that_reads_a_picture_and_its_context() -> None:
    config = WanConfig(
        dim=48, ffn_dim=80, num_heads=4, num_layers=3, in_dim=36, out_dim=16, text_dim=20, image_dim=24
    )
    model = WanModel(config)
    given = GivenFrames(torch.randn(20, 2, 4, 6))

    def run() -> None:
        text, image = model.project(torch.randn(9, 20)), model.project_image(torch.randn(257, 24))
        model(torch.randn(1, 16, 2, 4, 6), 500.0, [((text, 1.0), (image, 1.0))] * 3, given)

    contexts = flops.context_flops(config, 10) + flops.image_context_flops(config, 257)
    assert counted(run) == flops.forward_flops(config, 12, 3 * (10 + 257)) + contexts


def test_the_text_encoder_on_a_prompt() -> None:
    config = T5Config(vocab_size=99, d_model=24, d_kv=5, d_ff=17, num_layers=3, num_heads=7)
    model = t5.build_encoder(config).to_empty(device="cpu")
    model.encoder.embed_tokens = model.shared
    ids = torch.ones(1, 11, dtype=torch.long)
    assert counted(lambda: model(ids)) == flops.encode_flops(config, 11)


@pytest.mark.parametrize("frames", [1, 3])
def test_the_plain_decoder(frames: int) -> None:
    from diffusers import AutoencoderKLWan

    config = VAEConfig(dim=8, z_dim=4, dim_mult=(1, 2, 4, 4))
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 4, 4], latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    latent = (4, frames, 6, 4)
    predicted = flops.decode_flops(config, latent)
    with torch.no_grad():
        assert counted(lambda: vae.decode(torch.randn(1, *latent))) == predicted


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_the_encoder_on_given_frames(frames: int) -> None:
    """Of 9 frames the last is given, so that no chunk repeats."""
    from diffusers import AutoencoderKLWan

    config = VAEConfig(dim=8, z_dim=4)
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 4, 4], latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    given = [0, 8] if frames == 9 else [0]
    predicted = flops.given_frames_flops(config, (4, (frames + 3) // 4, 4, 6), given)
    with torch.no_grad():
        assert counted(lambda: vae.encode(torch.randn(1, 3, frames, 32, 48))) == predicted


def test_a_grey_chunk_like_those_before_takes_only_the_layers_after_the_last_downsampler() -> None:
    config, cells, top = VAEConfig(dim=8, z_dim=4), 4 * 6, 32
    block, attention = 27 * 2 * top * top, 4 * top * top + 2 * cells * top
    late = 2 * cells * (4 * block + attention + 27 * top * 8 + 8 * 8)

    def total(frames: int, *given: int) -> int:
        return flops.given_frames_flops(config, (4, (frames + 3) // 4, 4, 6), given)

    assert total(81, 0) - total(77, 0) == total(401, 0) - total(397, 0) == late
    assert total(13, 0) - total(9, 0) > 2 * late
    assert total(81, 0, 80) - total(81, 0) == total(5, 0) - total(1, 0) - late


def test_clip_without_its_last_block() -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = CLIPConfig(dim=32, num_heads=2, num_layers=3, mlp_dim=64)
    config = CLIPVisionConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=64, patch_size=14
    )
    model = CLIPVisionModel(config)
    assert counted(lambda: model(torch.randn(2, 3, 224, 224))) == flops.clip_flops(sizes, 2)


def test_the_arithmetic_of_the_published_models_is_that_of_the_papers() -> None:
    """42 TFLOP a block at 32,760 tokens and 163 at 75,600, counted by hand with 512 text rows."""
    wan = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
    for tokens, tera in ((32_760, 42), (75_600, 163)):
        assert flops.forward_flops(wan, tokens, 40 * 512) / 40 / 1e12 == pytest.approx(tera, rel=0.02)


def test_the_decoder_of_wan_22_does_more_on_as_many_pixels() -> None:
    old, new = VAEConfig(), VAE22Config()
    assert flops.decode_flops(new, (48, 3, 30, 52)) > flops.decode_flops(old, (16, 3, 60, 104))
