"""Quantize fp32 matrices to GGUF blocks by rounding to the nearest.

The package `gguf` quantizes types without sub-blocks; it has no quantizers for the K types. The quantizers
here round each sub-block to its own range. ggml also searches for better scales, so real files are a little
closer to their weights.

Letters: O output and I input width of a matrix, B blocks of 256 weights, S sub-blocks of one block,
E weights of one sub-block, W bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import gguf
import torch
from torch import Tensor

from wancli.weights.formats.packed import Packed

ROWS = 512  # quantized at a time, to need little more memory than the blocks


def to_blocks(weight_OI: Tensor, kind: str) -> Packed:
    """Quantize a matrix to a GGUF type, as `Q4_K`. Raises ValueError if its rows are not whole blocks."""
    elements, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if weight_OI.shape[1] % elements:
        raise ValueError(f"rows of {weight_OI.shape[1]} are not made of blocks of {elements}")
    slices = [weight_OI[start : start + ROWS] for start in range(0, len(weight_OI), ROWS)]
    parts = [_quantize_rows(rows_OI, kind) for rows_OI in slices]
    return Packed(kind, torch.cat(parts), tuple(weight_OI.shape))


def _quantize_rows(rows_OI: Tensor, kind: str) -> Tensor:
    if kind in K_TYPES:
        return K_TYPES[kind](rows_OI.reshape(-1, 256)).flatten()
    blocks = gguf.quants.quantize(rows_OI.numpy(), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(blocks).flatten()


def _half_bytes(*numbers_B: Tensor) -> Tensor:
    """Return [B, 2 * count] bytes of half-precision numbers."""
    return torch.stack(numbers_B, 1).half().view(torch.uint8)


def _ratio(numbers: Tensor, by: Tensor) -> Tensor:
    """Return the nearest integers to numbers / by, and 0 for 0 / 0."""
    return (numbers / by).nan_to_num(0, 0, 0).round()


def _quantize_above_minimum(
    x_BSE: Tensor, largest: int, largest_scale: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return d, dmin [B], integer scales, minima [B, S] and q [B, S, E]: x = d * scale * q - dmin * min."""
    low_BS = -x_BSE.amin(2).clamp(max=0)
    scale_BS = (x_BSE.amax(2) + low_BS).clamp(min=0) / largest
    d_B, dmin_B = ((n_BS.amax(1) / largest_scale).half().float() for n_BS in (scale_BS, low_BS))
    scale_BS = _ratio(scale_BS, d_B[:, None]).clamp(0, largest_scale)
    min_BS = _ratio(low_BS, dmin_B[:, None]).clamp(0, largest_scale)
    step_BS = d_B[:, None] * scale_BS
    q_BSE = _ratio(x_BSE + (dmin_B[:, None] * min_BS)[..., None], step_BS[..., None]).clamp(0, largest)
    return d_B, dmin_B, scale_BS.byte(), min_BS.byte(), q_BSE.byte()


def _quantize_around_zero(x_BSE: Tensor, half: int, largest_scale: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return d [B], integer scales [B, S] and q [B, S, E] from -half to half - 1: x = d * scale * q.

    The sign of a scale maps the largest weight to -half, because half - 1 would not reach it.
    """
    high_BS, low_BS = x_BSE.amax(2), x_BSE.amin(2)
    scale_BS = torch.where(high_BS > -low_BS, high_BS, low_BS) / -half
    d_B = (scale_BS.abs().amax(1) / largest_scale).half().float()
    scale_BS = _ratio(scale_BS, d_B[:, None]).clamp(-largest_scale, largest_scale)
    q_BSE = _ratio(x_BSE, (d_B[:, None] * scale_BS)[..., None]).clamp(-half, half - 1)
    return d_B, scale_BS, q_BSE


def _pack_six_bits(scale_B8: Tensor, min_B8: Tensor) -> Tensor:
    """Return [B, 12]: eight scales and minima of 6 bits; the last four keep their upper two bits apart."""
    first = [n_B8[:, :4] | (n_B8[:, 4:] >> 4) << 6 for n_B8 in (scale_B8, min_B8)]
    return torch.cat([*first, scale_B8[:, 4:] & 15 | (min_B8[:, 4:] & 15) << 4], 1)


def _pack_nibbles(q_B256: Tensor) -> Tensor:
    """Return [B, 128]: of every 64 numbers 32 in the lower halves of 32 bytes, the rest in the upper."""
    q_BX2W = q_B256.view(-1, 4, 2, 32)
    return (q_BX2W[:, :, 0] | q_BX2W[:, :, 1] << 4).flatten(1)


def _pack_pairs(q_B256: Tensor) -> Tensor:
    """Return [B, 64]: of every 128 numbers four runs of 32, two bits each, in 32 bytes."""
    q_BX4W = q_B256.view(-1, 2, 4, 32)
    return sum((q_BX4W[:, :, i] << 2 * i for i in range(1, 4)), q_BX4W[:, :, 0]).flatten(1)


def _q2_k(x_B256: Tensor) -> Tensor:
    d_B, dmin_B, scale_BS, min_BS, q_BSE = _quantize_above_minimum(x_B256.view(-1, 16, 16), 3, 15)
    return torch.cat([scale_BS | min_BS << 4, _pack_pairs(q_BSE.flatten(1)), _half_bytes(d_B, dmin_B)], 1)


def _q3_k(x_B256: Tensor) -> Tensor:
    d_B, scale_BS, q_BSE = _quantize_around_zero(x_B256.view(-1, 16, 16), 4, 31)
    q_B256 = (q_BSE + 4).byte().flatten(1)
    high_BX4W = (q_B256 >> 2).view(-1, 8, 32)
    mask_BW = sum((high_BX4W[:, i] << i for i in range(1, 8)), high_BX4W[:, 0])
    six_BS = (scale_BS + 32).byte()
    low_BS = six_BS[:, :8] & 15 | (six_BS[:, 8:] & 15) << 4
    upper_B4X = (six_BS >> 4).view(-1, 4, 4)
    upper_BS = sum((upper_B4X[:, i] << 2 * i for i in range(1, 4)), upper_B4X[:, 0])
    return torch.cat([mask_BW, _pack_pairs(q_B256 & 3), low_BS, upper_BS, _half_bytes(d_B)], 1)


def _q4_k(x_B256: Tensor) -> Tensor:
    d_B, dmin_B, scale_BS, min_BS, q_BSE = _quantize_above_minimum(x_B256.view(-1, 8, 32), 15, 63)
    return torch.cat(
        [_half_bytes(d_B, dmin_B), _pack_six_bits(scale_BS, min_BS), _pack_nibbles(q_BSE.flatten(1))], 1
    )


def _q5_k(x_B256: Tensor) -> Tensor:
    d_B, dmin_B, scale_BS, min_BS, q_BSE = _quantize_above_minimum(x_B256.view(-1, 8, 32), 31, 63)
    high_BSE = q_BSE >> 4
    fifth_BW = sum((high_BSE[:, i] << i for i in range(1, 8)), high_BSE[:, 0])
    nibbles_BW = _pack_nibbles((q_BSE & 15).flatten(1))
    return torch.cat([_half_bytes(d_B, dmin_B), _pack_six_bits(scale_BS, min_BS), fifth_BW, nibbles_BW], 1)


def _q6_k(x_B256: Tensor) -> Tensor:
    d_B, scale_BS, q_BSE = _quantize_around_zero(x_B256.view(-1, 16, 16), 32, 127)
    q_BX4W = (q_BSE + 32).byte().view(-1, 2, 4, 32)
    low_BX4W = q_BX4W & 15
    lower_BXW = (low_BX4W[:, :, :2] | low_BX4W[:, :, 2:] << 4).flatten(1)
    upper_BW = _pack_pairs((q_BX4W >> 4).flatten(1))
    return torch.cat([lower_BXW, upper_BW, scale_BS.to(torch.int8).view(torch.uint8), _half_bytes(d_B)], 1)


K_TYPES: dict[str, Callable[[Tensor], Tensor]] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
