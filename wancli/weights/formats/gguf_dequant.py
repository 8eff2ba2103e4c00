"""GGUF blocks to fp32, in plain torch: the formats that GGUF files of Wan and UMT5 hold.

Letters: B blocks, T bytes of one block, E elements of one block, W bytes of one row of fields,
S sub-blocks of one block.

A block is E weights of one row that share their scales. Its bytes hold small integers ("fields"
of 1, 2 or 4 bits, several to a byte), a half-precision scale or two, and in the K formats small
integer scales for its sub-blocks. The arithmetic follows ggml's dequantize_row_* in order, so that
the numbers are those of its reference to the last bit.
https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c

Bytes are moved in runs of 32 and more where they can be: torch vectorises no shorter ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor


def _unpack_fields(bytes_BXW: Tensor, bits: int) -> Tensor:
    """[B, X, 8 / bits, W]: every byte's fields, lowest first, each spread over a row of its own."""
    bytes_BXW = bytes_BXW.contiguous()
    count, mask = 8 // bits, 2**bits - 1
    fields = bytes_BXW.new_empty(*bytes_BXW.shape[:2], count, bytes_BXW.shape[2])
    for i in range(count):
        fields[:, :, i] = (bytes_BXW >> bits * i).bitwise_and_(mask)
    return fields


def _read_half(blocks_BT: Tensor, at: int) -> Tensor:
    """[B, 1] fp32: the half-precision number at an even byte."""
    return blocks_BT.view(torch.float16)[:, at // 2, None].float()


def _q8_0(blocks_BT: Tensor, out_BE: Tensor) -> None:
    out_BE.copy_(blocks_BT.view(torch.int8)[:, 2:])
    out_BE.mul_(_read_half(blocks_BT, 0))


def _q4_0(blocks_BT: Tensor, out_BE: Tensor) -> None:
    q_BE = _unpack_fields(blocks_BT[:, None, 2:], 4).flatten(1)
    out_BE.copy_(q_BE.view(torch.int8).sub_(8))
    out_BE.mul_(_read_half(blocks_BT, 0))


def _q4_1(blocks_BT: Tensor, out_BE: Tensor) -> None:
    out_BE.copy_(_unpack_fields(blocks_BT[:, None, 4:], 4).flatten(1))
    out_BE.mul_(_read_half(blocks_BT, 0)).add_(_read_half(blocks_BT, 2))


def _fifth_bits(bytes_B4: Tensor) -> Tensor:
    """[B, 32]: 16 where bit i of the four bytes is set, 0 elsewhere."""
    eight_bytes = _spread(bytes_B4.device).index_select(0, bytes_B4.flatten().int())
    return eight_bytes.view(torch.uint8).view(-1, 32)


@cache
def _spread(device: torch.device) -> Tensor:
    """[256] int64: for each byte, eight bytes; byte i is 16 if bit i is set."""
    codes = torch.arange(256, dtype=torch.int16)
    bits = codes[:, None] >> torch.arange(8, dtype=torch.int16) & 1
    return (bits * 16).to(torch.uint8).view(torch.int64).flatten().to(device)


def _q5_0(blocks_BT: Tensor, out_BE: Tensor) -> None:
    q_BE = _unpack_fields(blocks_BT[:, None, 6:], 4).flatten(1) | _fifth_bits(blocks_BT[:, 2:6])
    out_BE.copy_(q_BE.view(torch.int8).sub_(16))
    out_BE.mul_(_read_half(blocks_BT, 0))


def _q5_1(blocks_BT: Tensor, out_BE: Tensor) -> None:
    out_BE.copy_(_unpack_fields(blocks_BT[:, None, 8:], 4).flatten(1) | _fifth_bits(blocks_BT[:, 4:8]))
    out_BE.mul_(_read_half(blocks_BT, 0)).add_(_read_half(blocks_BT, 2))


def _apply_scales(q_BE: Tensor, scale_BS: Tensor, out_BE: Tensor, minus_BS: Tensor | None = None) -> None:
    """out = scale * q - minus, with S scales per block."""
    out_BE.copy_(q_BE)
    out_BSX = out_BE.view(*scale_BS.shape, -1)
    out_BSX.mul_(scale_BS[:, :, None])
    if minus_BS is not None:
        out_BSX.sub_(minus_BS[:, :, None])


def _q6_k(blocks_BT: Tensor, out_BE: Tensor) -> None:
    low = _unpack_fields(blocks_BT[:, :128].view(-1, 2, 64), 4).flatten(1)
    high = _unpack_fields(blocks_BT[:, 128:192].view(-1, 2, 32), 2).flatten(1)
    q_BE = low.bitwise_or_(high.bitwise_left_shift_(4)).view(torch.int8).sub_(32)
    scale_BS = _read_half(blocks_BT, 208) * blocks_BT[:, 192:208].view(torch.int8)
    _apply_scales(q_BE, scale_BS, out_BE)


def _unpack_six_bits(bytes_B12: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 scales and 8 minima of Q4_K and Q5_K, 6 bits each.

    Bytes 0-3 hold scales 0-3, bytes 4-7 minima 0-3, in their low 6 bits; the high 2 bits there are
    those of 4-7, whose low 4 bits share bytes 8-11: scales in the low half, minima in the high.
    """
    d, m, both = bytes_B12.contiguous().view(-1, 3, 4).unbind(1)
    scales = torch.cat((d & 63, (both & 15) | ((d >> 2) & 48)), 1)
    return scales, torch.cat((m & 63, (both >> 4) | ((m >> 2) & 48)), 1)


def _q4_k(blocks_BT: Tensor, out_BE: Tensor) -> None:
    scale_BS, minus_BS = _unpack_six_bits(blocks_BT[:, 4:16])
    q_BE = _unpack_fields(blocks_BT[:, 16:].view(-1, 4, 32), 4).flatten(1)
    _apply_scales(q_BE, _read_half(blocks_BT, 0) * scale_BS, out_BE, _read_half(blocks_BT, 2) * minus_BS)


def _q5_k(blocks_BT: Tensor, out_BE: Tensor) -> None:
    scale_BS, minus_BS = _unpack_six_bits(blocks_BT[:, 4:16])
    q_BE = _unpack_fields(blocks_BT[:, 48:].view(-1, 4, 32), 4).flatten(1)
    q_BE.bitwise_or_(_unpack_fields(blocks_BT[:, None, 16:48], 1).flatten(1).bitwise_left_shift_(4))
    _apply_scales(q_BE, _read_half(blocks_BT, 0) * scale_BS, out_BE, _read_half(blocks_BT, 2) * minus_BS)


def _q3_k(blocks_BT: Tensor, out_BE: Tensor) -> None:
    q_BE = _unpack_fields(blocks_BT[:, 32:96].view(-1, 2, 32), 2).flatten(1)
    q_BE.bitwise_or_(_unpack_fields(blocks_BT[:, None, :32], 1).flatten(1).bitwise_left_shift_(2))
    low = _unpack_fields(blocks_BT[:, None, 96:104], 4).flatten(1)  # 16 scales: low 4 bits here,
    high = _unpack_fields(blocks_BT[:, None, 104:108], 2).flatten(1)  # high 2 bits here
    scale_BS = (low | high << 4).view(torch.int8) - 32
    _apply_scales(q_BE.view(torch.int8).sub_(4), _read_half(blocks_BT, 108) * scale_BS, out_BE)


def _q2_k(blocks_BT: Tensor, out_BE: Tensor) -> None:
    scales = blocks_BT[:, :16]  # the low half of each byte scales 16 weights, the high half shifts them
    q_BE = _unpack_fields(blocks_BT[:, 16:80].view(-1, 2, 32), 2).flatten(1)
    scale_BS, minus_BS = _read_half(blocks_BT, 80) * (scales & 15), _read_half(blocks_BT, 82) * (scales >> 4)
    _apply_scales(q_BE, scale_BS, out_BE, minus_BS)


@cache
def _iq4_levels(device: torch.device) -> Tensor:
    """[16] fp32: the numbers that the 4 bits of IQ4 stand for, closer together near zero."""
    levels = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
    return torch.tensor(levels, dtype=torch.float32, device=device)


def _look_up_iq4(bytes_BXW: Tensor) -> Tensor:
    """[B, E] fp32: the levels of two fields per byte."""
    q_BE = _unpack_fields(bytes_BXW, 4).flatten(1)
    return _iq4_levels(q_BE.device).index_select(0, q_BE.flatten().int()).view_as(q_BE)


def _iq4_nl(blocks_BT: Tensor, out_BE: Tensor) -> None:
    out_BE.copy_(_look_up_iq4(blocks_BT[:, None, 2:]))
    out_BE.mul_(_read_half(blocks_BT, 0))


def _iq4_xs(blocks_BT: Tensor, out_BE: Tensor) -> None:
    high = _unpack_fields(blocks_BT[:, 2:4, None], 2).flatten(1)  # 8 scales: high 2 bits here,
    low = _unpack_fields(blocks_BT[:, 4:8, None], 4).flatten(1)  # low 4 bits here
    scale_BS = (low | high << 4).view(torch.int8) - 32
    q_BE = _look_up_iq4(blocks_BT[:, 8:].reshape(-1, 8, 16))
    _apply_scales(q_BE, _read_half(blocks_BT, 0) * scale_BS, out_BE)


# Each takes contiguous blocks [B, T] uint8 and fills [B, E] fp32.
DECODERS: Mapping[str, Callable[[Tensor, Tensor], None]] = {
    "Q8_0": _q8_0,
    "Q6_K": _q6_k,
    "Q5_K": _q5_k,
    "Q4_K": _q4_k,
    "Q3_K": _q3_k,
    "Q2_K": _q2_k,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
