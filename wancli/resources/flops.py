"""Count the FLOPs of each phase from sizes alone: two for every multiplication of a matrix product.

Norms, softmax and other work linear in the activations are left out, as in torch's own counter.
Convolutions count as those of the plain network, although the decoder here multiplies less.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from wancli.models.config import CLIPConfig, T5Config, VAE22Config, VAEConfig, WanConfig
from wancli.models.parameter_count import upsampled_channels


def encode_flops(t5: T5Config, tokens: int) -> int:
    """Count UMT5 on one prompt."""
    inner = t5.d_kv * t5.num_heads
    layer = 2 * tokens * (4 * t5.d_model * inner + 3 * t5.d_model * t5.d_ff) + 4 * tokens**2 * inner
    return t5.num_layers * layer


def forward_flops(wan: WanConfig, tokens: int, text_rows: float) -> int:
    """Count the transformer on one latent; `text_rows` is the sum over blocks of the rows that a token reads,
    on average.
    """
    d = wan.dim
    block = 2 * tokens * (6 * d * d + 2 * d * wan.ffn_dim) + 4 * tokens**2 * d
    return wan.num_layers * block + round(4 * tokens * text_rows * d) + reused_forward_flops(wan, tokens)


def reused_forward_flops(wan: WanConfig, tokens: int) -> int:
    """Count a forward that runs no block: the ends of the transformer, and the embedding of the timestep."""
    d = wan.dim
    return 2 * tokens * 4 * (wan.in_dim + wan.out_dim) * d + 2 * (wan.freq_dim * d + 7 * d * d)


def attention_map_flops(wan: WanConfig, tokens: int, rows: int, words: int) -> int:
    """Count the attention maps of one block: the scores of all tokens with a prompt of so many rows, and for
    each word a sum over the rows in every head.
    """
    return 2 * tokens * rows * (wan.dim + wan.num_heads * words)


def context_flops(wan: WanConfig, rows: int) -> int:
    """Count the projection of a text, and its keys and values in all blocks."""
    return 2 * rows * wan.dim * (wan.text_dim + wan.dim + 2 * wan.num_layers * wan.dim)


def image_context_flops(wan: WanConfig, rows: int) -> int:
    """Count the projection of CLIP rows, and their keys and values in all blocks."""
    width = wan.image_dim or 0
    return 2 * rows * (width * (width + wan.dim) + 2 * wan.num_layers * wan.dim**2)


def decode_flops(vae: VAEConfig | VAE22Config, latent: tuple[int, int, int, int]) -> int:
    """Count the decoder on a latent [z, T, Y, X]."""
    z, frames, height, width = latent
    pixels = height * width
    widths = [vae.dec_dim * m for m in reversed(vae.dim_mult)]
    top, out_channels = widths[0], 12 if isinstance(vae, VAE22Config) else 3
    around_attention = 2 * 2 * 27 * top * top + 4 * top * top  # two residual blocks, q, k, v and projection
    products = frames * pixels * (z * z + 27 * z * top + around_attention)
    products += 2 * frames * pixels**2 * top  # attention among the pixels of a frame
    c_in = top
    for c, up in zip(widths, (*reversed(vae.temporal_downsample), None), strict=True):
        for _ in range(vae.num_res_blocks + 1):
            products += frames * pixels * (27 * c * (c_in + c) + (c_in * c if c_in != c else 0))
            c_in = c
        if up is not None:
            if up:
                products += (frames - 1) * pixels * 3 * c * 2 * c
                frames = 2 * frames - 1
            c_in, pixels = upsampled_channels(vae, c), 4 * pixels
            products += frames * pixels * 9 * c * c_in
    return 2 * (products + frames * pixels * 27 * c_in * out_channels)


def clip_flops(clip: CLIPConfig, pictures: int) -> int:
    """Count CLIP on pictures, without its last block, which Wan does not run."""
    rows = clip.rows
    block = 2 * rows * (4 * clip.dim**2 + 2 * clip.dim * clip.mlp_dim) + 4 * rows**2 * clip.dim
    patches = 2 * (rows - 1) * 3 * clip.patch**2 * clip.dim
    return pictures * (patches + (clip.num_layers - 1) * block)


def given_frames_flops(
    vae: VAEConfig | VAE22Config, latent: tuple[int, int, int, int], given: Collection[int]
) -> int:
    """Count the encoder on a video for a latent [z, T, Y, X], which is grey except for the given frames.

    Chunks of 1, 4, 4, .. frames. While grey chunks repeat, the first layers are left out as in
    `wancli.models.vae.Encoder`. The 2.2 VAE encodes one frame only.
    """
    _, t, y, x = latent
    layers = _encoder_layers(vae, 64 * y * x)
    frames = [1] if isinstance(vae, VAE22Config) else [1] + (t - 1) * [4]
    last_chunk = max(given) // 4 + (max(given) % 4 > 0) if max(given) else 0
    total = repeats = done = lag = 0
    for chunk, count in enumerate(frames):
        is_repeated = chunk > 1 and chunk != last_chunk and chunk - 1 != last_chunk
        repeats = repeats + 1 if is_repeated else 0
        done, lag = (done, lag) if is_repeated else (0, 0)
        total += (2 * vae.z_dim) ** 2 * y * x
        now = lag
        for index, layer in enumerate(layers[done:], done + 1):
            rate = -(-count // layer.stride)
            total += rate * layer.products + (count // 2 // layer.stride) * layer.in_time
            now += layer.looks * -(-2 // rate) if layer.looks else int(layer.in_time > 0)
            if layer.is_downsampler and now <= repeats:
                done, lag = index, now
    return 2 * total


@dataclass(frozen=True)
class _EncoderLayer:
    """Products of one layer of the VAE encoder for a frame that enters it, once for `stride` of the video."""

    products: int
    stride: int
    looks: int = 0  # its convolutions over time that look back two frames
    in_time: int = 0  # products of the convolution that halves frames, for each that comes out
    is_downsampler: bool = False


def _encoder_layers(vae: VAEConfig | VAE22Config, pixels: int) -> list[_EncoderLayer]:
    """List the layers of the encoder, for so many pixels of its first stage."""

    def residual(c_in: int, c: int) -> _EncoderLayer:
        shortcut = c_in * c if c_in != c else 0
        return _EncoderLayer(pixels * (27 * c * (c_in + c) + shortcut), stride, looks=2)

    stride, c_in = 1, vae.dim
    colours = 12 if isinstance(vae, VAE22Config) else 3
    layers = [_EncoderLayer(pixels * 27 * colours * vae.dim, stride, looks=1)]
    for c, in_time in zip((vae.dim * m for m in vae.dim_mult), (*vae.temporal_downsample, None), strict=True):
        layers += [residual(c if number else c_in, c) for number in range(vae.num_res_blocks)]
        c_in = c
        if in_time is not None:
            pixels //= 4
            halved = pixels * 3 * c * c if in_time else 0
            layers.append(_EncoderLayer(pixels * 9 * c * c, stride, in_time=halved, is_downsampler=True))
            stride *= 2 if in_time else 1
    attention = _EncoderLayer(4 * pixels * c_in**2 + 2 * pixels**2 * c_in, stride)
    head = _EncoderLayer(pixels * 27 * c_in * 2 * vae.z_dim, stride, looks=1)
    return [*layers, residual(c_in, c_in), attention, residual(c_in, c_in), head]
