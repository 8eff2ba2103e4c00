"""Convolution over time with fewer multiplications: Winograd's minimal filtering F(n, 3).

n outputs of a 3-tap filter need n+2 products instead of 3n when the frames are mixed first:
half as many for four frames, two thirds for two. Every "product" here is a 2-D convolution of
a whole frame. Source: Lavin & Gray 2016, arXiv:1509.09308, section 4.1; in fp32 the rounding
stays that of the plain sum, in 16 bits it would not.

Letters: Y rows, X columns, C channels in, O channels out, K taps across and down (1 or 3).
Frames carry the rows that the kernel needs beyond the result, so Y shrinks by K-1; columns are
padded with zeros here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

KernelsBySize = Mapping[int, Sequence[Tensor]]  # group size -> one 2-D kernel per product


def group_sizes(frames: int) -> list[int]:
    """Split a number of frames into groups to compute together, in order: fours, then a two, then a one."""
    return [4] * (frames // 4) + [2] * (frames % 4 // 2) + [1] * (frames % 2)


def transform_kernels(weight_OCTKK: Tensor, sizes: set[int]) -> KernelsBySize:
    """Transform one 3-tap kernel into the 2-D kernels of every group size in `sizes`.

    Fast if the weight is channels-last in memory: then the kernels are channels-last too, without a copy.
    """
    make = {1: _plain_kernels, 2: _f2_3_kernels, 4: _f4_3_kernels}
    return {size: make[size](*weight_OCTKK.unbind(2)) for size in sizes}


def conv_over_time(window: Sequence[Tensor], kernels: KernelsBySize, bias_O: Tensor) -> list[Tensor]:
    """Convolve causally: two earlier frames and n new ones [Y, X, C] give n frames [Y-K+1, X, O]."""
    compute = {1: _plain, 2: _f2_3, 4: _f4_3}
    results: list[Tensor] = []
    for size in group_sizes(len(window) - 2):
        start = len(results)
        results += compute[size](window[start : start + size + 2], kernels[size], bias_O)
    return results


def conv_frame(x_YXC: Tensor, kernel_OCKK: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Convolve one frame in 2-D, its rows already padded: [Y, X, C] -> [Y-K+1, X, O]."""
    # The batch axis comes first: added after the permute, torch would not see channels-last strides.
    x_BCYX = x_YXC[None].permute(0, 3, 1, 2)
    y_BOYX = F.conv2d(x_BCYX, kernel_OCKK, bias_O, padding=(0, kernel_OCKK.shape[-1] // 2))
    return y_BOYX.permute(0, 2, 3, 1)[0]


def _plain_kernels(g0: Tensor, g1: Tensor, g2: Tensor) -> list[Tensor]:
    return [g0, g1, g2]


def _plain(d: Sequence[Tensor], k: Sequence[Tensor], bias_O: Tensor) -> list[Tensor]:
    return [conv_frame(d[2], k[2], bias_O) + conv_frame(d[1], k[1]) + conv_frame(d[0], k[0])]


def _f2_3_kernels(g0: Tensor, g1: Tensor, g2: Tensor) -> list[Tensor]:
    even, odd = (g0 + g2) / 2, g1 / 2
    return [g0, even + odd, even - odd, g2]


def _f2_3(d: Sequence[Tensor], k: Sequence[Tensor], bias_O: Tensor) -> list[Tensor]:
    m0 = conv_frame(d[0] - d[2], k[0])
    m1 = conv_frame(d[1] + d[2], k[1], bias_O)  # enters every result once, and so carries the bias
    m2 = conv_frame(d[2] - d[1], k[2])
    m3 = conv_frame(d[1] - d[3], k[3])
    return [m0 + m1 + m2, m1 - m2 - m3]


def _f4_3_kernels(g0: Tensor, g1: Tensor, g2: Tensor) -> list[Tensor]:
    even_1, even_2 = (g0 + g2) / -6, g0 / 24 + g2 / 6
    return [g0 / 4, even_1 - g1 / 6, even_1 + g1 / 6, even_2 + g1 / 12, even_2 - g1 / 12, g2]


def _f4_3(d: Sequence[Tensor], k: Sequence[Tensor], bias_O: Tensor) -> list[Tensor]:
    even_1, odd_1 = torch.sub(d[4], d[2], alpha=4), torch.sub(d[3], d[1], alpha=4)
    even_2, odd_2 = d[4] - d[2], d[3] - d[1]
    m0 = conv_frame(torch.add(even_2, d[0] - d[2], alpha=4), k[0])
    m1 = conv_frame(even_1 + odd_1, k[1], bias_O)
    m2 = conv_frame(even_1 - odd_1, k[2])
    m3 = conv_frame(torch.add(even_2, odd_2, alpha=2), k[3])
    m4 = conv_frame(torch.sub(even_2, odd_2, alpha=2), k[4])
    m5 = conv_frame(torch.sub(d[5] - d[3], odd_2, alpha=4), k[5])
    sum_1, difference_1, sum_2, difference_2 = m1 + m2, m1 - m2, m3 + m4, m3 - m4
    return [
        m0 + sum_1 + sum_2,
        torch.add(difference_1, difference_2, alpha=2),
        torch.add(sum_1, sum_2, alpha=4),
        torch.add(difference_1, difference_2, alpha=8) + m5,
    ]
