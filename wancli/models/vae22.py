"""The Wan 2.2 causal VAE of TI2V-5B: the layers of the 2.1 VAE, in stages with shortcuts around them.

Letters: T frames, Y rows, X columns, C channels in, O channels out. Stride (4, 16, 16): pixels are taken in
2x2 patches, the stages do the rest. Source: the official wan/modules/vae2_2.py; parameter names are its
names.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from wancli.models.config import VAE22Config
from wancli.models.vae import VAE, Head, middle_layers
from wancli.models.vae_layers import CausalCache, Downsample, ResidualBlock, Upsample, causal_conv

# Per channel, of the latents of the training videos (official wan/modules/vae2_2.py).
# fmt: off
LATENT_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
LATENT_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on
PATCH_CHANNELS = 12  # three colours of 2x2 pixels


class DownStage(nn.Module):
    """Residual blocks and a downsampler, plus a shortcut: means over the pixels that become one.

    `in_time` says whether frames are halved as well as rows and columns; None is a stage that halves nothing.
    """

    def __init__(self, c_in: int, c_out: int, blocks: int, in_time: bool | None) -> None:
        super().__init__()
        self.channels, self.in_time = c_out, in_time
        self.downsamples = nn.ModuleList(ResidualBlock(c_out if j else c_in, c_out) for j in range(blocks))
        if in_time is not None:
            self.downsamples.append(Downsample(c_out, in_time))

    def forward(self, x_TYXC: Tensor, cache: CausalCache) -> Tensor:
        shortcut_TYXO = downsample_shortcut(
            x_TYXC, self.channels, self.in_time
        )  # first, because the blocks overwrite x
        for layer in self.downsamples:
            x_TYXC = layer(x_TYXC, cache)
        return x_TYXC + shortcut_TYXO


class UpStage(nn.Module):
    """Residual blocks and an upsampler, plus a shortcut: the pixels repeated. `in_time` as in DownStage."""

    def __init__(self, c_in: int, c_out: int, blocks: int, in_time: bool | None) -> None:
        super().__init__()
        self.in_time = in_time
        self.upsamples = nn.ModuleList(ResidualBlock(c_out if j else c_in, c_out) for j in range(blocks))
        if in_time is not None:
            self.upsamples.append(Upsample(c_out, c_out, in_time))
        self.overwrites = c_in == c_out

    def forward(self, x_TYXC: Tensor, cache: CausalCache) -> Tensor:
        shortcut_TYXC = x_TYXC.clone() if self.overwrites else x_TYXC
        for layer in self.upsamples:
            x_TYXC = layer(x_TYXC, cache)
        return x_TYXC if self.in_time is None else add_upsample_shortcut(x_TYXC, shortcut_TYXC, self.in_time)


def downsample_shortcut(x_TYXC: Tensor, channels: int, in_time: bool | None) -> Tensor:
    """Average [T, Y, X, C] to [T/2, Y/2, X/2, O].

    The pixels that become one are ordered as channels (c, t, y, x); each output is the mean of neighbours
    among them. An odd T gets a frame of zeros in front.
    """
    if in_time is None:
        return x_TYXC.clone()
    t = 2 if in_time else 1
    if len(x_TYXC) % t:
        x_TYXC = torch.cat([x_TYXC.new_zeros(1, *x_TYXC.shape[1:]), x_TYXC])
    T, Y, X, C = x_TYXC.shape
    x = x_TYXC.view(T // t, t, Y // 2, 2, X // 2, 2, C).permute(0, 2, 4, 6, 1, 3, 5)
    return x.reshape(T // t, Y // 2, X // 2, channels, -1).mean(-1)


def add_upsample_shortcut(y_TYXO: Tensor, x_TYXC: Tensor, in_time: bool) -> Tensor:
    """Add every pixel of x to the two rows, two columns and, `in_time`, two frames of y that it became.

    All values that one pixel becomes, ordered (c, t, y, x), are shared out evenly among its channels. y has
    one frame less for the first frame of a clip, so the first of its two values is left out. Overwrites y.
    """
    t_places = 2 if in_time else 1
    step = x_TYXC.shape[-1] // y_TYXO.shape[-1]  # channels of x to one of y
    run = 4 * t_places // step  # places to one channel of x
    missing = t_places * len(x_TYXC) - len(y_TYXO)
    for position in range(4 * t_places):
        t, y, x = position // 4 - missing, position // 2 % 2, position % 2
        x_TYXO = x_TYXC[int(t < 0) :, ..., position // run :: step]
        y_TYXO[t % t_places :: t_places, y::2, x::2] += x_TYXO
    return y_TYXO


def patchify(x_TYXC: Tensor) -> Tensor:
    """Turn [T, 2Y, 2X, 3] into [T, Y, X, 12], the channels ordered (colour, column, row)."""
    T, Y, X, C = x_TYXC.shape
    x = x_TYXC.reshape(T, Y // 2, 2, X // 2, 2, C).permute(0, 1, 3, 5, 4, 2)
    return x.reshape(T, Y // 2, X // 2, 4 * C)


def unpatchify(x_TYXC: Tensor) -> Tensor:
    """Turn [T, Y, X, 12] back into [T, 2Y, 2X, 3]."""
    T, Y, X, C = x_TYXC.shape
    x = x_TYXC.view(T, Y, X, C // 4, 2, 2).permute(0, 1, 5, 2, 4, 3)
    return x.reshape(T, 2 * Y, 2 * X, C // 4)


class Encoder(nn.Module):
    """Encodes 4n+1 frames to n+1 frames of (mu, log variance), before the last pointwise map."""

    def __init__(self, config: VAE22Config) -> None:
        super().__init__()
        widths = [config.dim * m for m in (1, *config.dim_mult)]
        stages = zip(pairwise(widths), (*config.temporal_downsample, None), strict=True)
        self.conv1 = nn.Conv3d(PATCH_CHANNELS, widths[0], 3)
        self.downsamples = nn.ModuleList(
            DownStage(c_in, c_out, config.num_res_blocks, in_time) for (c_in, c_out), in_time in stages
        )
        self.middle = middle_layers(widths[-1])
        self.head = Head(widths[-1], 2 * config.z_dim)

    def forward(self, x_TYXC: Tensor, cache: CausalCache) -> Tensor:
        x_TYXC = causal_conv(self.conv1, patchify(x_TYXC), cache)
        for layer in (*self.downsamples, *self.middle, self.head):
            x_TYXC = layer(x_TYXC, cache)
        cache.started = True
        return x_TYXC


class Decoder(nn.Module):
    """Decodes latent frames: the first of a clip to one frame, every later one to four."""

    def __init__(self, config: VAE22Config) -> None:
        super().__init__()
        widths = [config.dec_dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
        stages = zip(pairwise(widths), (*reversed(config.temporal_downsample), None), strict=True)
        self.conv1 = nn.Conv3d(config.z_dim, widths[0], 3)
        self.middle = middle_layers(widths[0])
        self.upsamples = nn.ModuleList(
            UpStage(c_in, c_out, config.num_res_blocks + 1, in_time) for (c_in, c_out), in_time in stages
        )
        self.head = Head(widths[-1], PATCH_CHANNELS)

    def forward(self, z_TYXC: Tensor, cache: CausalCache) -> Tensor:
        x_TYXC = causal_conv(self.conv1, z_TYXC, cache)
        for layer in (*self.middle, *self.upsamples, self.head):
            x_TYXC = layer(x_TYXC, cache)
        cache.started = True
        return unpatchify(x_TYXC)


class WanVAE22(VAE):
    """The VAE of Wan 2.2 TI2V-5B."""

    mean, std = LATENT_MEAN, LATENT_STD

    def __init__(self, config: VAE22Config) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.conv1 = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)
