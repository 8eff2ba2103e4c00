"""Bytes, predicted per phase from sizes alone.

A process takes what Python, torch and the libraries take; a phase comes on top of that.
A phase needs its weights, the working set of its largest layer, and what it keeps between calls.
No phase needs the sum over layers (nothing is kept for a backward pass) and none a matrix of
tokens x tokens (attention runs fused). Phases follow one another; only what the caller names as
resident stays loaded, so the peak of a shot is the largest total, not their sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from wancli.models.config import T5Config, VAE22Config, VAEConfig, WanConfig

Residency = Literal["resident", "packed", "streamed"]  # of a network's blocks: see weights/residency.py

FP32 = 4
# Python, torch, transformers, what torch's kernels keep and the allocator does not give back: 417 to 462 MiB
# beside what is predicted in renders on two cores of an AMD EPYC, torch 2.13 for CPUs, 2026-11-22. On a GPU
# what torch allocates is counted, of which the process itself has none.
PROCESS = 430 * 2**20
_LATENTS_IN_MEMORY = 6  # the latent, two velocities, and what UniPC remembers: two x0 and the last latent


@dataclass(frozen=True)
class Phase:
    """Predicted bytes of one phase: weights, working set, and what is kept from call to call."""

    name: str
    model: int
    activation: int
    buffer: int

    @property
    def total(self) -> int:
        return self.model + self.activation + self.buffer


def encode_phase(
    t5: T5Config, *, prompt_tokens: int, element_bytes: int, streamed: bool = False, prompts: int = 1
) -> Phase:
    """UMT5 on its longest prompt; `element` bytes per weight. The position bias is per layer, not kept.

    Streamed, `prompts` of them share a pass over the layers.
    """
    inner = t5.d_kv * t5.num_heads
    scores = 3 * prompt_tokens**2 * t5.num_heads * FP32  # bias, scores, softmax
    rows = prompt_tokens * (2 * t5.d_model + max(4 * inner, 3 * t5.d_ff)) * element_bytes
    rows += (prompts - 1) * prompt_tokens * t5.d_model * element_bytes
    return Phase("encode", t5_bytes(t5, element_bytes=element_bytes, streamed=streamed), scores + rows, 0)


def sample_phase(
    wan: WanConfig,
    latent: tuple[int, int, int, int],
    *,
    context_rows: int,
    element_bytes: int,
    extra_weight_bytes: int = 0,
    blocks_in_memory: int | None = None,
    forwards_per_pass: int = 1,
    shots: int = 1,
    chunk: int | None = None,
) -> Phase:
    """One forward at a time on a latent [z, T, Y, X]; matmuls in `element` bytes, residual in fp32.

    `context_rows` counts the text rows of all contexts together, one padding row each: their K and
    V are kept for every block. `blocks` as in `wan_bytes`; `riders` forwards share a pass over the blocks,
    and `shots` are sampled in lock-step. With `chunk`, so many tokens at a time have more than their
    residual, K and V.
    """
    channels, t, y, x = latent
    tokens = t * (y // 2) * (x // 2)
    attention = 5 * wan.dim * element_bytes  # q, k, v, mixed values, projection
    feed_forward = (wan.ffn_dim + wan.dim) * element_bytes  # hidden, projection
    cast = 0 if element_bytes == FP32 else wan.dim * element_bytes  # what enters a Linear
    per_token = 2 * wan.dim * FP32 + cast + max(attention, feed_forward)  # residual and its modulated norm
    activation = tokens * per_token
    if chunk and chunk < tokens:
        bytes_per_token = wan.dim * FP32 + 2 * wan.dim * element_bytes
        bytes_per_chunk_token = wan.dim * FP32 + cast + max(3 * wan.dim * element_bytes, feed_forward)
        activation = min(activation, tokens * bytes_per_token + chunk * bytes_per_chunk_token)
    keys_values = 2 * context_rows * wan.dim * wan.num_layers * element_bytes
    latents = shots * _LATENTS_IN_MEMORY * channels * t * y * x * FP32
    bytes_per_forward = wan.dim * FP32 + wan.head_dim * FP32  # its residual and its rotary table
    return Phase(
        "sample",
        extra_weight_bytes + wan_bytes(wan, element_bytes=element_bytes, blocks_in_memory=blocks_in_memory),
        activation + tokens * (forwards_per_pass - 1) * bytes_per_forward,
        keys_values + latents,
    )


def derivative_bytes(wan: WanConfig, tokens: int, *, element_bytes: int) -> int:
    """The working set of a derivative by each block's text: the residual before every block, and one block's
    activations there and back. Autograd keeps 6.1 rows of fp32 and 7.4 rows and a hidden one in the dtype of
    the matmuls, which a test measures; gradients on their way are about half as much again."""
    row = wan.dim * (10 * FP32 + 8 * element_bytes) + 3 * wan.ffn_dim * element_bytes
    return tokens * (wan.num_layers * wan.dim * FP32 + row)


def decode_phase(
    vae: VAEConfig | VAE22Config,
    latent: tuple[int, int, int, int],
    *,
    chunk: int,
    element_bytes: int = FP32,
    resident_bytes: int = 0,
    mapped: bool = False,
) -> Phase:
    """`chunk` latent frames at a time; the last stage, at full size, is the largest.

    Full size is that of the frames, for the 2.2 VAE of their 2x2 patches. The buffer is the past two
    frames that every causal convolution keeps, on a CPU in strips of 16 rows or more with two rows
    of overlap. Frame count plays no part. Of a VAE that is `mapped` as it computes, the encoder is never
    read, and the decoder's kernels are beside their reordered copies.
    """
    _, t, y, x = latent
    frames = min(4 * chunk, 4 * t - 3)
    pixels = 64 * y * x
    if isinstance(vae, VAE22Config):
        # The last stage begins with the width of the one before, of which it makes a shortcut and a copy.
        widths, colours = vae.dim_mult[1] + 2 * vae.dim_mult[0], 12
    else:
        widths, colours = 2 * vae.dim_mult[0], 3  # a residual block holds its input and one hidden copy
    widest_bytes = widths * vae.dec_dim * element_bytes
    activation = frames * pixels * (widest_bytes + colours * (FP32 + 1))
    history = 2 * y * x * history_channels(vae) * element_bytes * 18 // 16
    weights = 2 * decoder_parameters(vae) if mapped else vae_parameters(vae)
    return Phase("decode", resident_bytes + weights * element_bytes, activation, history)


def wan_bytes(wan: WanConfig, *, element_bytes: int, blocks_in_memory: int | None = None) -> int:
    """Bytes of a transformer as `load_transformer` keeps it, with the matrices of `blocks` blocks in memory:
    all where it is resident, 2 where it is packed or streamed.

    Matrices and biases of blocks in `element` bytes each, all else in fp32. Beside a packed model are its
    packed weights; beside one streamed to a GPU in another dtype than its file's, the largest of them.
    """
    matrices = 8 * wan.dim**2 + 2 * wan.dim * wan.ffn_dim
    biases = wan.num_layers * (9 * wan.dim + wan.ffn_dim)
    others = wan_parameters(wan) - wan.num_layers * matrices - biases
    held = wan.num_layers if blocks_in_memory is None else blocks_in_memory
    return (held * matrices + biases) * element_bytes + others * FP32


def fp8_bytes(wan: WanConfig) -> int:
    """Bytes of the matrices of all blocks in fp8, with an fp32 scale for each of their rows."""
    rows = 9 * wan.dim + wan.ffn_dim
    return wan.num_layers * (8 * wan.dim**2 + 2 * wan.dim * wan.ffn_dim + FP32 * rows)


def t5_bytes(t5: T5Config, *, element_bytes: int, streamed: bool = False) -> int:
    """Bytes of UMT5. Streamed, they are its norms, position biases and the matrices of two layers; the
    embedding stays on disk. Beside that is the largest weight, if it is stored in another dtype."""
    parameters = t5_parameters(t5)
    if streamed:
        matrices = 4 * t5.d_model * t5.d_kv * t5.num_heads + 3 * t5.d_model * t5.d_ff
        parameters -= t5.vocab_size * t5.d_model + (t5.num_layers - 2) * matrices
    return parameters * element_bytes


# ---- parameters, exactly ----


def wan_parameters(wan: WanConfig) -> int:
    """Parameters of the transformer."""
    d, f = wan.dim, wan.ffn_dim
    attention = 4 * (d * d + d) + 2 * d  # q, k, v, o and the norms of q and k
    block = 2 * attention + 2 * d + (d * f + f) + (f * d + d) + 6 * d  # norm3, ffn, modulation
    patch = 4 * wan.in_dim * d + d
    text = wan.text_dim * d + d + d * d + d
    time_embedding = wan.freq_dim * d + d + d * d + d + d * 6 * d + 6 * d
    head = 4 * wan.out_dim * (d + 1) + 2 * d
    return wan.num_layers * block + patch + text + time_embedding + head


def t5_parameters(t5: T5Config) -> int:
    """Parameters of the text encoder, its embedding counted once."""
    inner = t5.d_kv * t5.num_heads
    layer = 4 * t5.d_model * inner + t5.num_buckets * t5.num_heads + 3 * t5.d_model * t5.d_ff + 2 * t5.d_model
    return t5.vocab_size * t5.d_model + t5.num_layers * layer + t5.d_model


@cache
def vae_parameters(vae: VAEConfig | VAE22Config) -> int:
    """Parameters of the VAE, encoder and decoder."""
    picture_channels = 12 if isinstance(vae, VAE22Config) else 3
    widths = [vae.dim * m for m in vae.dim_mult]
    top, z, blocks = widths[-1], vae.z_dim, vae.num_res_blocks
    encoder = (
        _conv_parameters(picture_channels, vae.dim, 27)
        + _middle_parameters(top)
        + top
        + _conv_parameters(top, 2 * z, 27)
        + _conv_parameters(2 * z, 2 * z, 1)
    )
    c_in = vae.dim
    for c, down in zip(widths, (*vae.temporal_downsample, None), strict=True):
        encoder += _residual_parameters(c_in, c) + (blocks - 1) * _residual_parameters(c, c)
        encoder += 0 if down is None else _conv_parameters(c, c, 9) + down * _conv_parameters(c, c, 3)
        c_in = c
    return encoder + decoder_parameters(vae)


def decoder_parameters(vae: VAEConfig | VAE22Config) -> int:
    """Those that decoding reads."""
    picture_channels = 12 if isinstance(vae, VAE22Config) else 3
    z, blocks = vae.z_dim, vae.num_res_blocks
    widths = [vae.dec_dim * m for m in reversed(vae.dim_mult)]
    top, last = widths[0], widths[-1]
    decoder = (
        _conv_parameters(z, top, 27)
        + _middle_parameters(top)
        + last
        + _conv_parameters(last, picture_channels, 27)
        + _conv_parameters(z, z, 1)
    )
    c_in = top
    for c, up in zip(widths, (*reversed(vae.temporal_downsample), None), strict=True):
        decoder += _residual_parameters(c_in, c) + blocks * _residual_parameters(c, c)
        c_in = upsampled_channels(vae, c)
        decoder += 0 if up is None else _conv_parameters(c, c_in, 9) + up * _conv_parameters(c, 2 * c, 3)
    return decoder


def upsampled_channels(vae: VAEConfig | VAE22Config, channels: int) -> int:
    """Channels that an upsampler of the decoder leaves."""
    return channels if isinstance(vae, VAE22Config) else channels // 2


def _conv_parameters(c_in: int, c_out: int, kernel_size: int) -> int:
    return c_in * c_out * kernel_size + c_out


def _residual_parameters(c_in: int, c_out: int) -> int:
    shortcut = _conv_parameters(c_in, c_out, 1) if c_in != c_out else 0
    return c_in + _conv_parameters(c_in, c_out, 27) + c_out + _conv_parameters(c_out, c_out, 27) + shortcut


def _middle_parameters(c: int) -> int:
    return 2 * _residual_parameters(c, c) + c + _conv_parameters(c, 3 * c, 1) + _conv_parameters(c, c, 1)


def history_channels(vae: VAEConfig | VAE22Config) -> int:
    """Input channels of the decoder's causal convolutions, summed, per pixel of the latent."""
    widths = [vae.dec_dim * m for m in reversed(vae.dim_mult)]
    total = vae.z_dim + 4 * widths[0]
    c_in, pixels = widths[0], 1
    for c, up in zip(widths, (*reversed(vae.temporal_downsample), None), strict=True):
        total += pixels * (c_in + c + vae.num_res_blocks * 2 * c + (c if up else 0))
        if up is not None:
            c_in, pixels = upsampled_channels(vae, c), 4 * pixels
    return total + pixels * widths[-1]
