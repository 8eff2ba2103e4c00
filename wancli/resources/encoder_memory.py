"""Predict the bytes of the VAE encoder, convolution by convolution, as a CPU computes them in fp32.

While a convolution computes, four things are in memory: its input, its output and what the block around it
still needs; one strip of rows, padded and normalised, with the products of Winograd's filter over time; the
transformed kernels; and the two past frames that every convolution so far keeps, strip by strip. In strips of
a large frame the first and the last matter most, in a small frame, which is one strip, the products do.

Letters as in `wancli.models.vae_layers`: Y rows, X columns, C channels in, O channels out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from wancli.models.config import VAE22Config, VAEConfig
from wancli.models.parameter_count import vae_parameters
from wancli.models.row_slices import row_slices
from wancli.resources.memory_model import FP32, Phase

_CHUNK = 4  # frames that are encoded together, after the first, which is alone
# Frames of a strip that `wancli.models.winograd` has at a time: mixed inputs, products and results; and
# transformed kernels that are no view. By the frames of a group.
_MIXED = {4: 4, 2: 0, 1: 0}
_PRODUCTS = {4: 15, 2: 7, 1: 3}
_KERNELS = {4: 5, 2: 2, 1: 0}
# A convolution copies its kernel, which is a view, and reorders it. Of an input of at most so many values
# torch unfolds 3x3 pixels into channels instead.
_UNFOLDED = 20480


@dataclass(frozen=True)
class _Convolution:
    """A causal convolution of 3 taps each way, or with `kept_frames` 1 the one that halves frames."""

    c: int
    o: int
    y: int
    x: int
    stride: int  # frames of the video to one of its input
    beside: float = 0  # channels of whole frames beside input and output, of the same rows and columns
    kept_frames: int = 2

    def kept(self) -> int:
        """Count the values that it keeps of the past, each strip with a row above and a row below."""
        if self.kept_frames == 1:
            return self.y * self.x * self.c
        strips = len(list(row_slices(self.y, self.x, self.c)))
        return self.kept_frames * (self.y + 2 * strips) * self.x * self.c

    def working_set(self, frames: int, *, is_first: bool) -> float:
        """Count the values in memory at its peak, past frames left out, for so many frames of the video."""
        t = -(-frames // self.stride)
        whole = t * self.y * self.x * (self.c + self.o + self.beside)
        if self.kept_frames == 1:
            return whole
        tops = list(row_slices(self.y, self.x, self.c))
        rows = tops[0][1]
        strip_in, strip_out = (rows + 2) * self.x * self.c, rows * self.x * self.o
        results_before = t * strip_out if len(tops) > 1 else 0
        shared = whole + t * strip_in + results_before
        kernel = 9 * self.c * self.o
        if is_first:
            unfolded = 9 * rows * self.x * self.c if strip_in <= _UNFOLDED else kernel
            return shared + strip_out + kernel + unfolded
        return shared + _MIXED[t] * strip_in + _PRODUCTS[t] * strip_out + _KERNELS[t] * kernel


def given_frames_phase(
    vae: VAEConfig | VAE22Config, latent: tuple[int, int, int, int], *, resident_bytes: int = 0
) -> Phase:
    """Predict the encoding of given frames to a latent [z, T, Y, X], four frames at a time.

    The buffer is the past frames of all convolutions and the latents so far, the activation what comes on
    top at the peak. Pixels are those of a chunk and of the chunk before, and of a grey frame. The 2.2 VAE
    encodes one frame only.
    """
    _, t, y, x = latent
    layers = list(_convolutions(vae, 8 * y, 8 * x))
    kept = sum(layer.kept() for layer in layers)
    pixels = 64 * y * x
    if isinstance(vae, VAE22Config):
        given, t = 2 * 12 * pixels, 1
    else:
        given = (2 * min(_CHUNK, 4 * t - 3) + 1) * 3 * pixels
    peak = kept_so_far = 0.0
    for layer in layers:
        kept_so_far += layer.kept()
        peak = max(peak, kept_so_far + layer.working_set(1, is_first=True))
        if t > 1:
            peak = max(peak, kept + layer.working_set(_CHUNK, is_first=False))
    latents = t * y * x * 2 * vae.z_dim
    return Phase(
        "pictures",
        resident_bytes + vae_parameters(vae) * FP32,
        round(peak - kept + given) * FP32,
        (kept + latents) * FP32,
    )


def _convolutions(vae: VAEConfig | VAE22Config, y: int, x: int) -> Iterator[_Convolution]:
    """List the causal convolutions of the encoder in order, for rows and columns of its first stage."""
    is_22 = isinstance(vae, VAE22Config)
    stride, c_in = 1, vae.dim
    yield _Convolution(12 if is_22 else 3, c_in, y, x, stride)
    for c, in_time in zip((vae.dim * m for m in vae.dim_mult), (*vae.temporal_downsample, None), strict=True):
        # A stage of the 2.2 VAE keeps its shortcut, and its input unless the first block overwrites it.
        shortcut = (c if in_time is None else c / 4) if is_22 else 0
        stage_input = c_in if is_22 and c_in != c else 0
        for number in range(vae.num_res_blocks):
            beside = shortcut + (stage_input if number else 0)
            yield from _residual(c if number else c_in, c, y, x, stride, beside)
        c_in = c
        if in_time is not None:
            y, x = y // 2, x // 2
            if in_time:
                yield _Convolution(c, c, y, x, stride, kept_frames=1)
            stride *= 2 if in_time else 1
    for _ in range(2):
        yield from _residual(c_in, c_in, y, x, stride, 0)
    yield _Convolution(c_in, 2 * vae.z_dim, y, x, stride)


def _residual(c: int, o: int, y: int, x: int, stride: int, beside: float) -> Iterator[_Convolution]:
    """The second convolution adds to the input of the block, or to its shortcut if the width changes."""
    yield _Convolution(c, o, y, x, stride, beside)
    yield _Convolution(o, o, y, x, stride, beside + (c if c != o else 0))
