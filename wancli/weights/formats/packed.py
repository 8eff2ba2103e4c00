"""A weight as its file stores it, and its unpacking: fp8 with scales, GGUF blocks, plain floats.

Letters: G groups of weights that share a scale, E elements of a group.

Unpacking works on slices of a few rows: besides the packed weight and the result it needs memory for one to
three slices. All of it is plain torch on the device of the weight.

torch 2.13 converts fp8 to fp32 on a CPU one element at a time. Here the code is moved into the bits of a half
instead, which CPUs convert in bulk: an e5m2 code is the upper byte of a half, and an e4m3fn code s eeee mmm,
as the half s 0eeee mmm0000000, is its value times 2^-8, subnormals included. Exact except for NaN (all ones
after the sign), which is written afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wancli.errors import CheckpointError
from wancli.weights.formats.gguf_dequant import DECODERS
from wancli.weights.formats.gguf_header import BLOCK_SIZES

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FP8_MAX = 448.0  # the largest e4m3fn
TINIEST_SCALE = 1e-8  # of a row of zeros
SLICE_ELEMENTS = 2**19  # elements: 2 MB in fp32, which stay in a CPU's second or third level cache
SLICE_PER_THREAD = 2**17
CUDA_SLICE = 2**22
# Parameters that lose most by fewer bits, and are small compared with the matrices of the blocks.
HIGH_PRECISION = {
    *("patch_embedding", "text_embedding", "time_embedding", "time_projection", "img_emb", "head"),
    *("modulation", "bias", "token_embedding", "pos_embedding", "shared", "relative_attention_bias"),
}


@dataclass(frozen=True, eq=False)
class Packed:
    """One weight in the bytes of its file.

    scheme "plain": `data` is fp32, bf16 or fp16 of `shape`.
    scheme "fp8": `data` is e4m3fn or e5m2 of `shape`, [out, in] where scaled. The weight is
    data * scale; `scale` has one element, or is [out] or [out, 1] for a scale per row, or
    [out, n, 1] for n equal blocks along each row; None stands for 1.
    A quantized type of gguf_header.BLOCK_SIZES, as Q4_K: `data` is uint8, the GGUF blocks of all rows in
    turn.
    """

    scheme: str
    data: Tensor
    shape: tuple[int, ...]
    scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Memory of the packed weight and its scales, in bytes."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def select_rows(self, rows: slice) -> Packed:
        """Return the weight of these rows alone, not copied."""
        count = self.shape[0]
        data = self.data.view(count, -1)[rows]
        shape = (len(data), *self.shape[1:])
        scale = self.scale
        if scale is not None and scale.numel() > 1:
            scale = scale[rows]
        return Packed(
            self.scheme, data.view(shape) if self.scheme in ("plain", "fp8") else data, shape, scale
        )

    @torch.no_grad()
    def unpack(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Return the weight of `shape` in fp32, bf16 or fp16, on the device of `data`.

        If `out` is given, it is filled and returned; it must be contiguous and of that shape, dtype and
        device. Without it, a plain weight that already has the dtype is returned as it is, not copied.
        Products with scales are computed in fp32 and rounded once.
        """
        if out is None:
            if self.scheme == "plain":
                return self.data.to(dtype).view(self.shape)
            out = torch.empty(self.shape, dtype=dtype, device=self.data.device)
        fits = (out.shape, out.dtype, out.device) == (self.shape, dtype, self.data.device)
        if not fits or not out.is_contiguous():
            raise ValueError(f"out is {list(out.shape)} {out.dtype}, the weight {list(self.shape)} {dtype}")
        if self.scheme == "plain":
            return out.copy_(self.data.view(self.shape))
        if self.scheme == "fp8":
            _unpack_fp8(self, out)
        else:
            _unpack_gguf(self, out)
        return out


def pack_fp8(weight: Tensor, where: str = "") -> Packed:
    """Pack a floating-point matrix [out, in] as e4m3fn with one fp32 scale per row: its largest |w| / 448.

    Raises CheckpointError, at `where`, for NaN and infinities.
    """
    largest_G1 = torch.maximum(weight.amax(1, keepdim=True), -weight.amin(1, keepdim=True)).float()
    if not largest_G1.isfinite().all():
        raise CheckpointError("the weight holds NaN or infinities", where=where)
    scale_G1 = (largest_G1 / FP8_MAX).clamp_(min=TINIEST_SCALE)
    data = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    for rows in _row_slices(weight):
        strip = weight[rows].float() / scale_G1[rows]
        data[rows] = strip.clamp_(-FP8_MAX, FP8_MAX)
    return Packed("fp8", data, tuple(weight.shape), scale_G1)


def is_high_precision(name: str) -> bool:
    """Return whether a parameter is kept in high precision: all but the large matrices of the blocks.

    `name` is the network's own: official for the transformer, that of transformers for UMT5. The list is what
    musubi-tuner, LightX2V, ComfyUI, diffusers and city96's GGUF converter have in common.
    """
    parts = name.split(".")
    return not HIGH_PRECISION.isdisjoint(parts) or any("norm" in part for part in parts)


def _row_slices(x_GE: Tensor) -> list[slice]:
    """Return slices of a few rows that cover all rows."""
    size = CUDA_SLICE if x_GE.is_cuda else max(SLICE_ELEMENTS, SLICE_PER_THREAD * torch.get_num_threads())
    rows = max(1, size // max(1, x_GE.shape[1]))
    return [slice(i, min(i + rows, len(x_GE))) for i in range(0, len(x_GE), rows)]


def _fill_by_slices(out_GE: Tensor, write: Callable[[slice, Tensor], None]) -> None:
    """Call `write(rows, slice)` to fill fp32 slices of rows; round each to the dtype of `out`."""
    strips = _row_slices(out_GE)
    strip_GE = out_GE
    if strips and out_GE.dtype != torch.float32:
        strip_GE = torch.empty(strips[0].stop, out_GE.shape[1], device=out_GE.device)
    for rows in strips:
        if strip_GE is out_GE:
            write(rows, out_GE[rows])
        else:
            strip = strip_GE[: rows.stop - rows.start]
            write(rows, strip)
            out_GE[rows] = strip


def _unpack_fp8(packed: Packed, out: Tensor) -> None:
    scale = torch.ones(1) if packed.scale is None else packed.scale
    scale = scale.to(out.device, torch.float32)
    groups = scale.numel() if scale.numel() > 1 else out.shape[0] if out.dim() > 1 else 1
    data_GE = packed.data.contiguous().view(groups, -1)
    e4m3fn, as_half = data_GE.dtype == torch.float8_e4m3fn, not out.is_cuda
    scale_G1 = (scale * (256.0 if e4m3fn and as_half else 1.0)).view(-1, 1).expand(groups, 1)
    holds_nan = e4m3fn and as_half and _holds_e4m3fn_nan(data_GE)
    strips = _row_slices(data_GE) if as_half else []
    bits_GE = torch.empty(strips[0].stop if strips else 0, data_GE.shape[1], dtype=torch.int16)

    def write(rows: slice, strip: Tensor) -> None:
        code_GE = data_GE[rows]
        strip.copy_(_decode_as_half(code_GE, bits_GE[: len(code_GE)]) if as_half else code_GE)
        strip.mul_(scale_G1[rows])
        if holds_nan:
            strip[code_GE.view(torch.uint8) & 0x7F == 0x7F] = torch.nan

    _fill_by_slices(out.view(groups, -1), write)


def _decode_as_half(code_GE: Tensor, bits_GE: Tensor) -> Tensor:
    """Return the values as halves in `bits`, for e4m3 times 2^-8 and except NaN. Widening an int8 code
    extends its sign, which for e4m3fn lands in bits 15 and 14.
    """
    bits_GE.copy_(code_GE.view(torch.int8))
    if code_GE.dtype == torch.float8_e5m2:
        bits_GE.mul_(256)
    else:
        bits_GE.mul_(128).bitwise_and_(~0x4000)
    return bits_GE.view(torch.float16)


def _holds_e4m3fn_nan(code_GE: Tensor) -> bool:
    """Find NaN by two maxima: with a sign it is the largest uint8, without one the largest int8."""
    return code_GE.numel() > 0 and (
        int(code_GE.view(torch.uint8).max()) == 0xFF or int(code_GE.view(torch.int8).max()) == 0x7F
    )


def _unpack_gguf(packed: Packed, out: Tensor) -> None:
    elements, size = BLOCK_SIZES[packed.scheme]
    blocks_BT = packed.data.contiguous().view(-1, size)
    decode = DECODERS[packed.scheme]
    _fill_by_slices(out.view(-1, elements), lambda blocks, strip: decode(blocks_BT[blocks], strip))
