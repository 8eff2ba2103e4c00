"""Matrices that multiply in fp8, twice as fast as bf16 on GPUs that support it.

Letters: R rows of an input (batch and tokens), I inputs, O outputs.

Both factors are e4m3 with a scale per row. The scale of the weight is computed once, that of the input on
each forward. Products are summed in fp32 or, on Hopper, in its shorter sums, and rounded once to bf16.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from wancli.errors import MachineError
from wancli.models.dit_layers import Linear
from wancli.weights.formats.packed import FP8_MAX, TINIEST_SCALE, Packed, pack_fp8
from wancli.weights.offload import find_matrices

CAPABILITY = (8, 9)  # Ada and Hopper were the first
WIDTH_MULTIPLE = 16  # elements: what the kernels want widths to be multiples of
SLICE_ELEMENTS = 2**25  # elements of an input that are in fp32 at a time


class Fp8Linear(nn.Module):
    """A Linear whose weight is e4m3 in memory and in the product. Takes any float, returns bf16."""

    dtype = torch.bfloat16

    def __init__(self, weight: Packed, bias: Tensor, gelu: bool) -> None:
        super().__init__()
        scale = torch.ones(()) if weight.scale is None else weight.scale
        rows = weight.shape[0]
        self.weight = nn.Parameter(weight.data.view(weight.shape), requires_grad=False)
        self.bias = nn.Parameter(bias.to(self.dtype), requires_grad=False)
        self.gelu = gelu
        scale_O = scale.float().reshape(-1).expand(rows)
        self.register_buffer("scale_1O", scale_O[None].to(bias.device).contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x8_RI, scale_R1 = quantize_rows(x.flatten(0, -2))
        y_RO: Tensor = torch._scaled_mm(
            x8_RI,
            self.weight.T,
            scale_a=scale_R1,
            scale_b=self.get_buffer("scale_1O"),
            bias=self.bias,
            out_dtype=self.dtype,
            use_fast_accum=True,
        )
        if self.gelu:
            torch.ops.aten.gelu_(y_RO, approximate="tanh")
        return y_RO.view(*x.shape[:-1], -1)


def quantize_rows(x_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Return e4m3 and the fp32 scale of each row [R, 1]: its largest |x| / 448."""
    scale_R1 = torch.linalg.vector_norm(x_RI, float("inf"), dim=1, keepdim=True).float()
    scale_R1 = (scale_R1 / FP8_MAX).clamp_(min=TINIEST_SCALE)
    x8_RI = torch.empty_like(x_RI, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    rows = max(1, SLICE_ELEMENTS // x_RI.shape[1])
    for start in range(0, len(x_RI), rows):
        slice_ = slice(start, start + rows)
        x8_RI[slice_] = (x_RI[slice_] / scale_R1[slice_]).clamp_(-FP8_MAX, FP8_MAX)
    return x8_RI, scale_R1


def replace_with_fp8(
    blocks: nn.ModuleList, prefix: str, source: Mapping[str, Packed], device: torch.device | str
) -> None:
    """Replace each matrix of the blocks, which are on the meta device, with an Fp8Linear.

    Weights stored as e4m3 with one scale, or one per row, are used as they are; all others are converted.
    Raises CheckpointError for NaN and infinities.
    """
    for i in range(len(blocks)):
        for part, layer in find_matrices(blocks[i]).items():
            assert isinstance(layer, Linear)
            weight = source[f"{prefix}.{i}.{part}"]
            if not _has_row_scales(weight):
                weight = pack_fp8(weight.unpack(torch.float32), f"{prefix}.{i}.{part}")
            data = weight.data.to(device)
            moved = Packed("fp8", data, weight.shape, weight.scale)
            blocks[i].set_submodule(part.removesuffix(".weight"), Fp8Linear(moved, layer.bias, layer.gelu))


def _has_row_scales(weight: Packed) -> bool:
    if weight.scheme != "fp8" or weight.data.dtype != torch.float8_e4m3fn:
        return False
    return weight.scale is None or weight.scale.numel() in (1, weight.shape[0])


def check_fp8_matmul(device: str, widths: tuple[int, ...]) -> None:
    """Raise MachineError if matrices of these widths cannot multiply in fp8 on the device."""
    where, hint = "memory.fp8_matmul", "Leave it out; memory.dtype: fp8 alone saves the same memory."
    if device != "cuda":
        raise MachineError("only CUDA devices multiply in fp8", where=where, hint=hint)
    capability, needed = torch.cuda.get_device_capability(), CAPABILITY
    if capability < needed:
        card = f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}"
        raise MachineError(f"{card}, fp8 products need {needed[0]}.{needed[1]}", where=where, hint=hint)
    if unaligned := [width for width in widths if width % WIDTH_MULTIPLE]:
        message = f"the model is {unaligned[0]} wide, fp8 products take multiples of {WIDTH_MULTIPLE}"
        raise MachineError(message, where=where, hint=hint)
