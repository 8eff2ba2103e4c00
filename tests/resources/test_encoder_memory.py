"""The memory of encoding pictures is what torch allocates for it, within 10 %."""

from __future__ import annotations

import pytest
import torch
from live_bytes import most_live_bytes

from wancli.models.config import VAE22Config, VAEConfig
from wancli.models.given_frames import encode_channels, encode_picture
from wancli.models.vae import WanVAE, to_channels_last
from wancli.models.vae22 import WanVAE22
from wancli.resources.encoder_memory import given_frames_phase


@pytest.mark.parametrize(
    ("width", "frames", "rows", "columns"),
    [
        (16, 1, 64, 64),
        (16, 13, 64, 64),
        (16, 1, 128, 256),
        (16, 5, 128, 128),
        (32, 1, 128, 128),
        (32, 5, 64, 128),
        (32, 5, 80, 256),  # in two strips
    ],
)
@torch.no_grad()
def test_the_memory_of_encoding_given_frames_is_predicted(
    width: int, frames: int, rows: int, columns: int
) -> None:
    config = VAEConfig(width)
    vae, picture = WanVAE(config), torch.randn(3, rows, columns)
    to_channels_last(vae.encoder)
    measured = most_live_bytes(lambda: encode_channels(vae, {0: picture}, frames))
    phase = given_frames_phase(config, (config.z_dim, (frames + 3) // 4, rows // 8, columns // 8))
    assert phase.activation + phase.buffer == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("width", "rows", "columns"), [(16, 128, 128), (16, 256, 256), (32, 128, 256)])
@torch.no_grad()
def test_the_memory_of_encoding_a_picture_for_ti2v_is_predicted(width: int, rows: int, columns: int) -> None:
    config = VAE22Config(width, dec_dim=4)
    vae, picture = WanVAE22(config), torch.randn(3, rows, columns)
    to_channels_last(vae.encoder)
    measured = most_live_bytes(lambda: encode_picture(vae, picture.clone()))
    phase = given_frames_phase(config, (config.z_dim, 5, rows // 16, columns // 16))
    assert phase.activation + phase.buffer == pytest.approx(measured, rel=0.1)
