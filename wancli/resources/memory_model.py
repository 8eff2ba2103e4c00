"""Predict the bytes of each phase from sizes alone.

A process takes what Python, torch and the libraries take; a phase comes on top of that.
A phase needs its weights, the working set of its largest layer, and what it keeps between calls.
No phase needs the sum over layers (nothing is kept for a backward pass) and none a matrix of
tokens x tokens (attention runs fused). Phases follow one another; only what the caller names as
resident stays loaded, so the peak of a shot is the largest total, not their sum.

The memory of a phase is piecewise linear in tokens, text rows and chunks (of UMT5 quadratic in the tokens of
a prompt). Three dataclasses hold the coefficients; their `phase()` evaluates them. The HTML page gets the
same coefficients as JSON, and its script repeats only the evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wancli.models.config import CLIPConfig, T5Config, VAE22Config, VAEConfig, WanConfig
from wancli.models.parameter_count import (
    clip_parameters,
    decoder_parameters,
    t5_parameters,
    upsampled_channels,
    vae_parameters,
    wan_parameters,
)

Residency = Literal["resident", "packed", "streamed"]  # of a network's blocks: see weights/offload.py

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


@dataclass(frozen=True)
class EncodeCoefficients:
    """Bytes of UMT5: constant, for each token of the longest prompt, and for its square."""

    model: int
    per_token: int
    per_token_squared: int
    per_further_token: int  # the longest prompt again, for each further prompt that shares a pass
    buffer: int = 0

    def phase(self, tokens: int, prompts: int = 1) -> Phase:
        """Predict the phase for `prompts` prompts, the longest of which has `tokens` tokens."""
        activation = tokens * (self.per_token_squared * tokens + self.per_token)
        return Phase(
            "encode",
            self.model,
            activation + (prompts - 1) * tokens * self.per_further_token,
            self.buffer,
        )


@dataclass(frozen=True)
class SampleCoefficients:
    """Bytes of the transformer: constant, for each token of the video, each text row and each latent cell."""

    model: int
    per_token: int  # with all tokens at once
    per_token_in_chunks: int  # with `chunk` tokens at a time: of all tokens,
    per_chunk_token: int  # and of those of a chunk
    per_further_forward: int  # for each token, of each further forward that shares a pass over the blocks
    per_text_row: int
    per_latent_cell: int  # for each of T * Y * X
    buffer: int = 0
    buffer_for_loras: int = 0  # if there are any

    def phase(
        self,
        latent: tuple[int, int, int, int],
        *,
        text_rows: int,
        forwards_per_pass: int = 1,
        shots: int = 1,
        chunk: int | None = None,
        lora_bytes: int = 0,
    ) -> Phase:
        """Predict the phase for a latent [z, T, Y, X].

        `text_rows` counts the rows of all contexts together, one padding row each. `shots` are sampled in one
        batch. `lora_bytes` are those of the LoRA files.
        """
        _, t, y, x = latent
        tokens = t * (y // 2) * (x // 2)
        activation = tokens * self.per_token
        if chunk:
            activation = min(activation, tokens * self.per_token_in_chunks + chunk * self.per_chunk_token)
        activation += tokens * (forwards_per_pass - 1) * self.per_further_forward
        buffer = text_rows * self.per_text_row + shots * t * y * x * self.per_latent_cell + self.buffer
        if lora_bytes:
            buffer += self.buffer_for_loras
        return Phase("sample", self.model + lora_bytes, activation, buffer)


@dataclass(frozen=True)
class DecodeCoefficients:
    """Bytes of the VAE: constant, for each Y * X of a latent frame, and for each such cell and frame."""

    model: int
    per_frame_cell: int  # for each frame of a chunk
    per_cell: int

    def phase(self, latent: tuple[int, int, int, int], *, chunk: int, resident_bytes: int = 0) -> Phase:
        """Predict the phase for `chunk` frames at a time of a latent [z, T, Y, X]."""
        _, t, y, x = latent
        frames = min(4 * chunk, 4 * t - 3)
        activation = frames * y * x * self.per_frame_cell
        return Phase("decode", resident_bytes + self.model, activation, y * x * self.per_cell)


def encode_coefficients(t5: T5Config, *, element_bytes: int, streamed: bool = False) -> EncodeCoefficients:
    """Return the coefficients of UMT5 with `element_bytes` per weight.

    The position bias is per layer, not kept. If it is streamed, all prompts share a pass over the layers.
    """
    inner = t5.d_kv * t5.num_heads
    return EncodeCoefficients(
        model=t5_bytes(t5, element_bytes=element_bytes, streamed=streamed),
        per_token=(2 * t5.d_model + max(4 * inner, 3 * t5.d_ff)) * element_bytes,
        per_token_squared=3 * t5.num_heads * FP32,  # bias, scores, softmax
        per_further_token=t5.d_model * element_bytes if streamed else 0,
    )


def sample_coefficients(
    wan: WanConfig, *, element_bytes: int, blocks_in_memory: int | None = None
) -> SampleCoefficients:
    """Return the coefficients of the transformer: matmuls in `element_bytes`, the residual in fp32.

    K and V of every text row are kept for every block. `blocks_in_memory` is that of `wan_bytes`. With tokens
    in chunks, all tokens have their residual, K and V, and those of one chunk have the rest.
    """
    attention = 5 * wan.dim * element_bytes  # q, k, v, mixed values, projection
    feed_forward = (wan.ffn_dim + wan.dim) * element_bytes  # hidden, projection
    cast = 0 if element_bytes == FP32 else wan.dim * element_bytes  # what enters a Linear
    return SampleCoefficients(
        model=wan_bytes(wan, element_bytes=element_bytes, blocks_in_memory=blocks_in_memory),
        per_token=2 * wan.dim * FP32 + cast + max(attention, feed_forward),  # residual, its modulated norm
        per_token_in_chunks=wan.dim * FP32 + 2 * wan.dim * element_bytes,
        per_chunk_token=wan.dim * FP32 + cast + max(3 * wan.dim * element_bytes, feed_forward),
        per_further_forward=wan.dim * FP32 + wan.head_dim * FP32,  # its residual and its rotary table
        per_text_row=2 * wan.dim * wan.num_layers * element_bytes,
        per_latent_cell=(_LATENTS_IN_MEMORY * wan.out_dim + _given_channels(wan)) * FP32,
        buffer_for_loras=0 if element_bytes == FP32 else max(wan.dim, wan.ffn_dim) * wan.dim * FP32,
    )


def decode_coefficients(vae: VAEConfig | VAE22Config, *, mapped: bool = False) -> DecodeCoefficients:
    """Return the coefficients of the VAE, whose last stage, at full size, is the largest.

    Full size is that of the frames, for the 2.2 VAE of their 2x2 patches. The buffer is the past two
    frames that every causal convolution keeps, on a CPU in strips of 16 rows or more with two rows
    of overlap. Frame count plays no part. Of a VAE that is `mapped` as it computes, the encoder is never
    read, and the decoder's kernels are beside their reordered copies.
    """
    if isinstance(vae, VAE22Config):
        # The last stage begins with the width of the one before, of which it makes a shortcut and a copy.
        widths, channels = vae.dim_mult[1] + 2 * vae.dim_mult[0], 12
    else:
        widths, channels = 2 * vae.dim_mult[0], 3  # a residual block holds its input and one hidden copy
    weights = 2 * decoder_parameters(vae) if mapped else vae_parameters(vae)
    return DecodeCoefficients(
        model=weights * FP32,
        per_frame_cell=64 * (widths * vae.dec_dim * FP32 + channels * (FP32 + 1)),
        per_cell=2 * history_channels(vae) * FP32 * 18 // 16,
    )


def clip_phase(clip: CLIPConfig, *, pictures: int, element_bytes: int) -> Phase:
    """Predict the encoding of pictures by CLIP: pixels and their patches, the residual before and in a block,
    its norm, and q, k, v and what they mix, or the wide activations of the feed-forward.
    """
    row = 4 * clip.dim + max(5 * clip.dim, 2 * clip.mlp_dim)
    activation = pictures * (clip.rows * row + 3 * clip.image**2) * element_bytes
    return Phase("clip", clip_parameters(clip) * element_bytes, activation, 0)


def derivative_bytes(wan: WanConfig, tokens: int, *, element_bytes: int) -> int:
    """Predict the working set of a derivative by each block's text.

    It is the residual before every block, and the activations of one block forward and backward. Autograd
    keeps 6.1 rows of fp32 and 7.4 rows and a hidden one in the dtype of the matmuls, which a test measures;
    the gradients of the backward pass are about half as much again.
    """
    row = wan.dim * (10 * FP32 + 8 * element_bytes) + 3 * wan.ffn_dim * element_bytes
    return tokens * (wan.num_layers * wan.dim * FP32 + row)


def attention_chunk(device: str) -> int:
    """Return for how many tokens at a time attention maps are computed: a GPU needs many to be busy."""
    return 256 if device == "cpu" else 4096


def attention_bytes(wan: WanConfig, tokens: int, *, maps: int, rows: int, device: str) -> int:
    """Predict the bytes of recording attention maps of a prompt of so many rows.

    They are the sums of all maps with those of the step in progress, and of a chunk of tokens in all heads
    the queries, the scores and their softmax.
    """
    chunk = min(tokens, attention_chunk(device))
    keys = rows * wan.dim
    return FP32 * (2 * maps * tokens + chunk * (wan.dim + 2 * wan.num_heads * rows) + keys)


def wan_bytes(wan: WanConfig, *, element_bytes: int, blocks_in_memory: int | None = None) -> int:
    """Predict the bytes of a transformer as `load_transformer` keeps it.

    `blocks_in_memory` counts the blocks whose matrices are in memory: None is all of them, if it is resident;
    2 if it is packed or streamed. Matrices and biases of blocks have `element_bytes` each, all else is fp32.
    A packed model also keeps its packed weights; a model streamed to a GPU in another dtype than its file's
    also keeps the largest of them.
    """
    linears = _square_linears(wan)
    matrices = linears * wan.dim**2 + 2 * wan.dim * wan.ffn_dim
    biases = wan.num_layers * ((linears + 1) * wan.dim + wan.ffn_dim)
    others = wan_parameters(wan) - wan.num_layers * matrices - biases
    held = wan.num_layers if blocks_in_memory is None else blocks_in_memory
    return (held * matrices + biases) * element_bytes + others * FP32


def _given_channels(wan: WanConfig) -> int:
    """Count the channels of given frames, and of the input in which they are joined to the latent."""
    return 2 * wan.in_dim - wan.out_dim if wan.joins_frames else 0


def _square_linears(wan: WanConfig) -> int:
    """Count the square matrices of a block: q, k, v and o twice, and k and v of pictures."""
    return 8 if wan.image_dim is None else 10


def fp8_bytes(wan: WanConfig) -> int:
    """Predict the bytes of the matrices of all blocks in fp8, with an fp32 scale for each row."""
    linears = _square_linears(wan)
    rows = (linears + 1) * wan.dim + wan.ffn_dim
    return wan.num_layers * (linears * wan.dim**2 + 2 * wan.dim * wan.ffn_dim + FP32 * rows)


def t5_bytes(t5: T5Config, *, element_bytes: int, streamed: bool = False) -> int:
    """Predict the bytes of UMT5.

    If it is streamed, these are its norms, position biases and the matrices of two layers; the embedding
    stays on disk. The largest weight is not included; it comes on top if it is stored in another dtype.
    """
    parameters = t5_parameters(t5)
    if streamed:
        matrices = 4 * t5.d_model * t5.d_kv * t5.num_heads + 3 * t5.d_model * t5.d_ff
        parameters -= t5.vocab_size * t5.d_model + (t5.num_layers - 2) * matrices
    return parameters * element_bytes


def history_channels(vae: VAEConfig | VAE22Config) -> int:
    """Sum the input channels of the decoder's causal convolutions, per pixel of the latent."""
    widths = [vae.dec_dim * m for m in reversed(vae.dim_mult)]
    total = vae.z_dim + 4 * widths[0]
    c_in, pixels = widths[0], 1
    for c, up in zip(widths, (*reversed(vae.temporal_downsample), None), strict=True):
        total += pixels * (c_in + c + vae.num_res_blocks * 2 * c + (c if up else 0))
        if up is not None:
            c_in, pixels = upsampled_channels(vae, c), 4 * pixels
    return total + pixels * widths[-1]
