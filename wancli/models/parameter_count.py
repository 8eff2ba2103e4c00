"""Count the parameters of each network, exactly, from its sizes alone."""

from __future__ import annotations

from functools import cache

from wancli.models.config import CLIPConfig, T5Config, VAE22Config, VAEConfig, WanConfig


def wan_parameters(wan: WanConfig) -> int:
    """Count the parameters of the transformer."""
    d, f = wan.dim, wan.ffn_dim
    attention = 4 * (d * d + d) + 2 * d  # q, k, v, o and the norms of q and k
    block = 2 * attention + 2 * d + (d * f + f) + (f * d + d) + 6 * d  # norm3, ffn, modulation
    patch = 4 * wan.in_dim * d + d
    text = wan.text_dim * d + d + d * d + d
    time_embedding = wan.freq_dim * d + d + d * d + d + d * 6 * d + 6 * d
    head = 4 * wan.out_dim * (d + 1) + 2 * d
    image = 0
    if wan.image_dim is not None:
        block += 2 * (d * d + d) + d  # k_img, v_img and its norm
        e = wan.image_dim
        image = 2 * e + (e * e + e) + (e * d + d) + 2 * d + (wan.image_rows or 0) * e
    return wan.num_layers * block + patch + text + time_embedding + head + image


def clip_parameters(clip: CLIPConfig) -> int:
    """Count the parameters of the part of CLIP's vision tower that Wan runs: all blocks but the last."""
    e, m = clip.dim, clip.mlp_dim
    block = 4 * e + (3 * e * e + 3 * e) + (e * e + e) + (e * m + m) + (m * e + e)
    return (clip.num_layers - 1) * block + 3 * clip.patch**2 * e + (clip.rows + 1) * e + 2 * e


def t5_parameters(t5: T5Config) -> int:
    """Count the parameters of the text encoder, its embedding once."""
    inner = t5.d_kv * t5.num_heads
    layer = 4 * t5.d_model * inner + t5.num_buckets * t5.num_heads + 3 * t5.d_model * t5.d_ff + 2 * t5.d_model
    return t5.vocab_size * t5.d_model + t5.num_layers * layer + t5.d_model


@cache
def vae_parameters(vae: VAEConfig | VAE22Config) -> int:
    """Count the parameters of the VAE, encoder and decoder."""
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
    """Count the parameters of the VAE that decoding reads."""
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
    """Return the output channels of an upsampler of the decoder."""
    return channels if isinstance(vae, VAE22Config) else channels // 2


def _conv_parameters(c_in: int, c_out: int, kernel_size: int) -> int:
    return c_in * c_out * kernel_size + c_out


def _residual_parameters(c_in: int, c_out: int) -> int:
    shortcut = _conv_parameters(c_in, c_out, 1) if c_in != c_out else 0
    return c_in + _conv_parameters(c_in, c_out, 27) + c_out + _conv_parameters(c_out, c_out, 27) + shortcut


def _middle_parameters(c: int) -> int:
    return 2 * _residual_parameters(c, c) + c + _conv_parameters(c, 3 * c, 1) + _conv_parameters(c, c, 1)
