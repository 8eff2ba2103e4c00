"""The Wan 2.1 causal VAE: decodes and encodes a clip chunk by chunk, in memory that does not grow with it.

Letters: T frames, Y rows, X columns, C channels. Latents and videos are [C, T, Y, X] outside, activations [T,
Y, X, C] inside. Stride (4, 8, 8): 4n+1 frames of 8h x 8w pixels are n+1 latent frames of h x w. Source: the
official wan/modules/vae.py; parameter names are its names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from wancli.models.config import VAEConfig
from wancli.models.vae_layers import (
    AttentionBlock,
    CausalCache,
    Downsample,
    ResidualBlock,
    RMSNorm,
    Settled,
    Upsample,
    causal_conv,
    pointwise,
)

# Per channel, of the latents of the training videos (official wan/modules/vae.py).
# fmt: off
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
# fmt: on


class Head(nn.ModuleList):
    """The last convolution, of SiLU(norm(x))."""

    def __init__(self, c_in: int, c_out: int) -> None:
        norm, conv = RMSNorm(c_in, 3), nn.Conv3d(c_in, c_out, 3)
        super().__init__([norm, nn.SiLU(), conv])
        self.steps = (norm, conv)

    def forward(self, x_TYXC: Tensor, cache: CausalCache) -> Tensor:
        norm, conv = self.steps
        return causal_conv(conv, x_TYXC, cache, norm)


def middle_layers(channels: int) -> nn.ModuleList:
    return nn.ModuleList(
        [ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels)]
    )


class Encoder(nn.Module):
    """Encodes 4n+1 frames to n+1 frames of (mu, log variance), before the last pointwise map."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.dim * m for m in (1, *config.dim_mult)]
        self.conv1 = nn.Conv3d(3, widths[0], 3)
        self.downsamples = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(pairwise(widths)):
            for j in range(config.num_res_blocks):
                self.downsamples.append(ResidualBlock(c_out if j else c_in, c_out))
            if i < len(config.temporal_downsample):
                self.downsamples.append(Downsample(c_out, config.temporal_downsample[i]))
        self.middle = middle_layers(widths[-1])
        self.head = Head(widths[-1], 2 * config.z_dim)

    def forward(self, x_TYXC: Tensor, cache: CausalCache) -> Tensor:
        """Encode the next chunk. Of a chunk that repeats, the first layers return what they returned before.

        A layer looks back two frames, so that it returns the same for two chunks if its input was the same
        for one chunk more; at a quarter of the frame rate, where a chunk is one frame, for two more. The
        result is the same, bit for bit.
        """
        layers = (self.conv1, *self.downsamples, *self.middle, self.head)
        done, lag = 0, 0
        if cache.settled is not None:
            done, lag, x_TYXC = cache.settled.layers, cache.settled.lag, cache.settled.x_TYXC.clone()
        for index, layer in enumerate(layers[done:], done + 1):
            lag += settling_chunks(layer, len(x_TYXC))
            x_TYXC = causal_conv(layer, x_TYXC, cache) if layer is self.conv1 else layer(x_TYXC, cache)
            if isinstance(layer, Downsample) and lag <= cache.repeats:
                cache.settled = Settled(index, lag, x_TYXC.clone())
        cache.started = True
        return x_TYXC


def settling_chunks(layer: nn.Module, frames: int) -> int:
    """Return for how many chunks of `frames` frames a layer of the encoder still returns something new after
    its input began to repeat.
    """
    match layer:
        case AttentionBlock():
            return 0
        case Downsample():
            return int(layer.time_conv is not None)
        case ResidualBlock():
            return 2 * -(-2 // frames)
    return -(-2 // frames)


class Decoder(nn.Module):
    """Decodes latent frames: the first of a clip to one frame, every later one to four."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.dim * m for m in reversed(config.dim_mult)]
        self.conv1 = nn.Conv3d(config.z_dim, widths[0], 3)
        self.middle = middle_layers(widths[0])
        self.upsamples = nn.ModuleList()
        in_time = tuple(reversed(config.temporal_downsample))
        c_in = widths[0]
        for i, c_out in enumerate(widths):
            for j in range(config.num_res_blocks + 1):
                self.upsamples.append(ResidualBlock(c_out if j else c_in, c_out))
            if i < len(in_time):
                self.upsamples.append(Upsample(c_out, c_out // 2, in_time[i]))
                c_in = c_out // 2
        self.head = Head(widths[-1], 3)

    def forward(self, z_TYXC: Tensor, cache: CausalCache) -> Tensor:
        x_TYXC = causal_conv(self.conv1, z_TYXC, cache)
        for layer in (*self.middle, *self.upsamples, self.head):
            x_TYXC = layer(x_TYXC, cache)
        cache.started = True
        return x_TYXC


class VAE(nn.Module):
    """Videos in [-1, 1] to normalised latents and back. Can be built on the meta device.

    `decode` and `encode` are for inference and work chunk by chunk; `decode_chunk` and `encode_chunk` are the
    same maths on one chunk, differentiable. In the shapes below s is the spatial stride. A subclass builds
    the networks and defines `mean` and `std` of each latent channel.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    encoder: nn.Module
    conv1: nn.Conv3d
    conv2: nn.Conv3d
    decoder: nn.Module

    @torch.no_grad()
    def decode(self, z_CTYX: Tensor, chunk: int = 1) -> Iterator[Tensor]:
        """Yield the frames [3, n, sY, sX], fp32 in [-1, 1], of a normalised latent [z, T, Y, X].

        First one frame, then 4*`chunk` at a time (fewer at the end). The chunk changes speed and memory, not
        the result; memory does not grow with T. A yielded tensor is [n, sY, sX, 3] in memory.
        """
        to_channels_last(self.decoder)
        cache = CausalCache()
        for start, stop in _chunk_spans(z_CTYX.shape[1], chunk):
            yield self.decode_chunk(z_CTYX[:, start:stop], cache).clamp_(-1, 1)

    @torch.no_grad()
    def encode(self, frames_CTYX: Tensor, chunk: int = 4) -> Tensor:
        """Return the normalised latent [z, n+1, Y/s, X/s], fp32: the mean of the posterior.

        Frames are [3, 4n+1, Y, X] in [-1, 1]; `chunk` of them, a multiple of 4, are encoded at a time.
        """
        return self.encode_chunks(frames_CTYX[:, a:b] for a, b in _chunk_spans(frames_CTYX.shape[1], chunk))

    @torch.no_grad()
    def encode_chunks(self, chunks: Iterable[Tensor]) -> Tensor:
        """Return the normalised latent of a clip that comes in chunks [3, n, Y, X]: of one frame, then of
        multiples of 4. Chunks that are equal to the one before take less time.
        """
        to_channels_last(self.encoder)
        cache = CausalCache()
        means: list[Tensor] = []
        before_CTYX = torch.empty(0)
        for chunk_CTYX in chunks:
            if chunk_CTYX.shape == before_CTYX.shape and torch.equal(chunk_CTYX, before_CTYX):
                cache.repeats += 1
            else:
                cache.repeats, cache.settled = 0, None
            means.append(self.encode_chunk(chunk_CTYX, cache)[0])
            before_CTYX = chunk_CTYX
        mean_CTYX = torch.cat(means, dim=1)
        return (mean_CTYX - _per_channel(self.mean, mean_CTYX)) / _per_channel(self.std, mean_CTYX)

    def decode_chunk(self, z_CTYX: Tensor, cache: CausalCache) -> Tensor:
        """Decode the next latents of a clip to frames [3, n, sY, sX], fp32, not clamped."""
        z_CTYX = z_CTYX.float() * _per_channel(self.std, z_CTYX) + _per_channel(self.mean, z_CTYX)
        z_TYXC = z_CTYX.permute(1, 2, 3, 0).to(self.conv2.weight.dtype)
        x_TYXC: Tensor = self.decoder(pointwise(self.conv2, z_TYXC), cache)
        return x_TYXC.permute(3, 0, 1, 2).float()

    def encode_chunk(self, frames_CTYX: Tensor, cache: CausalCache) -> tuple[Tensor, Tensor]:
        """Encode the next frames of a clip to mean and log variance [z, n, Y/s, X/s], fp32, not
        normalised.
        """
        x_TYXC = frames_CTYX.permute(1, 2, 3, 0).to(self.conv1.weight.dtype)
        y_CTYX = pointwise(self.conv1, self.encoder(x_TYXC, cache)).permute(3, 0, 1, 2).float()
        mean_CTYX, log_variance_CTYX = y_CTYX.chunk(2)
        return mean_CTYX, log_variance_CTYX


class WanVAE(VAE):
    """The VAE of Wan 2.1 and of Wan 2.2 A14B."""

    mean, std = LATENT_MEAN, LATENT_STD

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.conv1 = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)


def to_channels_last(network: nn.Module) -> None:
    """Lay out all 3-D kernels channels-last in memory. A second call changes nothing.

    Values and names stay, but safetensors needs `.contiguous()` before it saves such a tensor.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)


def _per_channel(values: tuple[float, ...], like_CTYX: Tensor) -> Tensor:
    return torch.tensor(values, device=like_CTYX.device).view(-1, 1, 1, 1)


def _chunk_spans(length: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Yield the first index alone, then `chunk` indices at a time."""
    yield 0, 1
    for start in range(1, length, chunk):
        yield start, min(start + chunk, length)
