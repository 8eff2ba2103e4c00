"""Count the FLOPs of each phase from sizes alone: two for every multiplication of a matrix product.

Norms, softmax and other work linear in the activations are left out, as in torch's own counter.
Convolutions count as those of the plain network, although the decoder here multiplies less.
"""

from __future__ import annotations

from wancli.models.config import T5Config, VAE22Config, VAEConfig, WanConfig
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
    ends = 2 * tokens * 4 * (wan.in_dim + wan.out_dim) * d
    time_embedding = 2 * (wan.freq_dim * d + 7 * d * d)
    return wan.num_layers * block + round(4 * tokens * text_rows * d) + ends + time_embedding


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
