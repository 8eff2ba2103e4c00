"""Layers of the Wan causal VAE, which can process a clip chunk by chunk.

Letters: T frames, Y rows, X columns, C channels in, O channels out, N pixels of a frame. Activations are [T,
Y, X, C]: channels last, which is how the convolutions run fastest.

Every layer that looks back in time keeps its last two input frames in a `CausalCache`. A clip in one chunk
and the same clip in several chunks on one cache give the same result.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wancli.models.row_slices import row_slices
from wancli.models.winograd import conv_frame, conv_over_time, group_sizes, transform_kernels

QUERY_ROWS = 4096  # attention rows at a time: the N x N matrix of a large frame never exists


@dataclass
class CausalCache:
    """The past frames of one clip that layers still need, by layer and first row of the slice."""

    frames: dict[tuple[nn.Module, int], Tensor] = field(default_factory=dict)
    started: bool = False  # the first frame, which alone is not doubled in time, has passed
    repeats: int = 0  # how many chunks in a row were equal to the chunk before
    settled: Settled | None = None  # while chunks repeat


@dataclass(frozen=True)
class Settled:
    """What a layer returns as long as chunks repeat, and the layers after it receive."""

    layers: int  # which return the same as for the chunk before
    lag: int  # after so many repeats
    x_TYXC: Tensor


class RMSNorm(nn.Module):
    """x / ||x|| · sqrt(C) · gamma over the channels, the norm taken in fp32. Gamma is [C, 1, ..]."""

    def __init__(self, channels: int, axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * axes))

    def forward(self, x_TYXC: Tensor, out_TYXC: Tensor | None = None) -> Tensor:
        norm_TYX1 = torch.linalg.vector_norm(x_TYXC, dim=-1, keepdim=True, dtype=torch.float32)
        scale_TYX1 = x_TYXC.shape[-1] ** 0.5 / norm_TYX1.clamp_min(1e-12)
        return torch.mul(x_TYXC, scale_TYX1, out=out_TYXC).to(x_TYXC.dtype).mul_(self.gamma.flatten())


def causal_conv(
    conv: nn.Conv3d,
    x_TYXC: Tensor,
    cache: CausalCache,
    norm: RMSNorm | None = None,
    residual_TYXO: Tensor | None = None,
) -> Tensor:
    """Convolve x, or SiLU(norm(x)), with 3 taps in time that look back only.

    With `residual_TYXO` the result is added to it, in place if no gradient is needed.
    """
    if x_TYXC.device.type == "cpu" and x_TYXC.dtype == torch.float32 and not torch.is_grad_enabled():
        return _causal_conv_sliced(conv, x_TYXC, cache, norm, residual_TYXO)
    if norm is not None:
        x_TYXC = F.silu(norm(x_TYXC))
    before = cache.frames.get((conv, 0))
    if before is None:
        before = x_TYXC.new_zeros(2, *x_TYXC.shape[1:])
    x_TYXC = torch.cat([before, x_TYXC])
    cache.frames[conv, 0] = x_TYXC[-2:].clone()
    pad = conv.kernel_size[1] // 2
    y_BOTYX = F.conv3d(x_TYXC[None].permute(0, 4, 1, 2, 3), conv.weight, conv.bias, padding=(0, pad, pad))
    y_TYXO = y_BOTYX.permute(0, 2, 3, 4, 1)[0]
    return y_TYXO if residual_TYXO is None else residual_TYXO + y_TYXO


def _causal_conv_sliced(
    conv: nn.Conv3d, x_TYXC: Tensor, cache: CausalCache, norm: RMSNorm | None, residual_TYXO: Tensor | None
) -> Tensor:
    """Compute `causal_conv` for fp32 on a CPU: no full-size temporary, half the multiplications."""
    T, Y, X, _ = x_TYXC.shape
    assert conv.bias is not None
    out_TYXO = x_TYXC.new_empty(T, Y, X, conv.out_channels) if residual_TYXO is None else residual_TYXO
    is_first_frame = (
        T == 1 and (conv, 0) not in cache.frames
    )  # only zeros precede it, so only the last tap counts
    kernels = {} if is_first_frame else transform_kernels(conv.weight, set(group_sizes(T)))
    halo = conv.kernel_size[1] // 2
    for top, bottom in row_slices(Y, X, x_TYXC.shape[-1]):
        x_TYXC_strip = padded_rows(x_TYXC, top - halo, bottom + halo, norm)
        before = cache.frames.get((conv, top))
        if before is None:
            before = cache.frames[conv, top] = x_TYXC_strip.new_zeros(2, *x_TYXC_strip.shape[1:])
        window = [*before, *x_TYXC_strip]
        if is_first_frame:
            results = [conv_frame(window[-1], conv.weight[:, :, -1], conv.bias)]
        else:
            results = conv_over_time(window, kernels, conv.bias)
        before[0].copy_(window[-2])  # with a single new frame that is before[1]: keep the order
        before[1].copy_(window[-1])
        for out_YXO, y_YXO in zip(out_TYXO[:, top:bottom], results, strict=True):
            if residual_TYXO is None:
                out_YXO.copy_(y_YXO)
            else:
                out_YXO.add_(y_YXO)
    return out_TYXO


def padded_rows(x_TYXC: Tensor, top: int, bottom: int, norm: RMSNorm | None = None) -> Tensor:
    """Return rows top..bottom-1 of x, or of SiLU(norm(x)). Rows outside the frame are zero."""
    T, Y, X, C = x_TYXC.shape
    above, below = max(-top, 0), max(bottom - Y, 0)
    inside = x_TYXC[:, top + above : bottom - below]
    if norm is None:
        return F.pad(inside, (0, 0, 0, 0, above, below)) if above or below else inside
    out = x_TYXC.new_empty(T, bottom - top, X, C)
    out[:, :above] = 0
    out[:, bottom - top - below :] = 0
    norm(inside, out[:, above : bottom - top - below])
    return F.silu(out, inplace=True)


def pointwise(conv: nn.Conv2d | nn.Conv3d, x_TYXC: Tensor) -> Tensor:
    """Apply a convolution whose kernel is a single point: a linear map of the channels."""
    return F.linear(x_TYXC, conv.weight.flatten(1), conv.bias)


class ResidualBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), with a pointwise shortcut if the width changes.

    May overwrite x in place: it does without a shortcut and without autograd.
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        norm1, conv1 = RMSNorm(c_in, 3), nn.Conv3d(c_in, c_out, 3)
        norm2, conv2 = RMSNorm(c_out, 3), nn.Conv3d(c_out, c_out, 3)
        self.residual = nn.Sequential(norm1, nn.SiLU(), conv1, norm2, nn.SiLU(), nn.Identity(), conv2)
        self.shortcut = nn.Conv3d(c_in, c_out, 1) if c_in != c_out else None
        self.steps = (norm1, conv1, norm2, conv2)

    def forward(self, x_TYXC: Tensor, cache: CausalCache) -> Tensor:
        norm1, conv1, norm2, conv2 = self.steps
        h_TYXO = causal_conv(conv1, x_TYXC, cache, norm1)
        x_TYXO = x_TYXC if self.shortcut is None else pointwise(self.shortcut, x_TYXC)
        return causal_conv(conv2, h_TYXO, cache, norm2, residual_TYXO=x_TYXO)


class AttentionBlock(nn.Module):
    """x + self-attention among the pixels of each frame, one head as wide as the layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x_TYXC: Tensor, cache: CausalCache) -> Tensor:  # noqa: ARG002  (looks at one frame)
        q, k, v = pointwise(self.to_qkv, self.norm(x_TYXC)).flatten(1, 2)[:, None].chunk(3, dim=-1)
        starts = range(0, q.shape[-2], QUERY_ROWS)
        parts = [F.scaled_dot_product_attention(q[..., i : i + QUERY_ROWS, :], k, v) for i in starts]
        return x_TYXC + pointwise(self.proj, torch.cat(parts, dim=-2).view(x_TYXC.shape))


class Upsample(nn.Module):
    """Doubles rows and columns; with `in_time` also the frames, except the first."""

    def __init__(self, c_in: int, c_out: int, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(c_in, c_out, 3))
        self.time_conv = nn.Conv3d(c_in, 2 * c_in, (3, 1, 1)) if in_time else None

    def forward(self, x_TYXC: Tensor, cache: CausalCache) -> Tensor:
        if self.time_conv is None:
            return self._upsample_space(x_TYXC)
        parts = [] if cache.started else [x_TYXC[:1]]
        rest_TYXC = x_TYXC[len(parts) :]
        if len(rest_TYXC):
            y_TYXSC = causal_conv(self.time_conv, rest_TYXC, cache).reshape(*rest_TYXC.shape[:3], 2, -1)
            parts.append(y_TYXSC.permute(0, 3, 1, 2, 4).flatten(0, 1))
        return self._upsample_space(torch.cat(parts))

    def _upsample_space(self, x_TYXC: Tensor) -> Tensor:
        """Compute nearest x2 and a 3x3 kernel: on each of the four output phases that is a 2x2 kernel on
        x.
        """
        T, Y, X, C = x_TYXC.shape
        weight_OCKK, bias_O = self.resample[1].parameters()
        kernel = phase_kernels(weight_OCKK).contiguous(memory_format=torch.channels_last)
        bias = bias_O.repeat(4)
        out_TYRXSO = x_TYXC.new_empty(T, Y, 2, X, 2, len(bias_O))
        for top, bottom in row_slices(Y, X, C):
            x_TCYX = padded_rows(x_TYXC, top - 1, bottom + 1).permute(0, 3, 1, 2)
            y_TYXO = F.conv2d(x_TCYX, kernel, bias, padding=(0, 1)).permute(0, 2, 3, 1)
            # One row and one column too many: phase 0 leaves out the last, phase 1 the first.
            y_TYXRSO = y_TYXO.reshape(*y_TYXO.shape[:3], 2, 2, len(bias_O))
            for r, s in ((0, 0), (0, 1), (1, 0), (1, 1)):
                out_TYRXSO[:, top:bottom, r, :, s] = y_TYXRSO[:, r : r + bottom - top, s : s + X, r, s]
        return out_TYRXSO.view(T, 2 * Y, 2 * X, len(bias_O))


def phase_kernels(weight_OCKK: Tensor) -> Tensor:
    """Return [4*O, C, 2, 2], phase-major: the effect of a 3x3 kernel on an image with doubled pixels.

    An even row sees its pixel's row twice and the row above once; an odd row, the row below once.
    """
    first, middle, last = weight_OCKK.unbind(2)
    by_row = [torch.stack([first, middle + last], 2), torch.stack([first + middle, last], 2)]
    phases = []
    for kernel in by_row:
        first, middle, last = kernel.unbind(3)
        phases += [torch.stack([first, middle + last], 3), torch.stack([first + middle, last], 3)]
    return torch.cat(phases)


class Downsample(nn.Module):
    """Halves rows and columns; with `in_time` also the frames, except the first."""

    def __init__(self, channels: int, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(channels, channels, 3))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1)) if in_time else None

    def forward(self, x_TYXC: Tensor, cache: CausalCache) -> Tensor:
        T, Y, X, C = x_TYXC.shape
        weight_OCKK, bias_O = self.resample[1].parameters()
        out_TYXC = x_TYXC.new_empty(T, Y // 2, X // 2, C)
        for top, bottom in row_slices(Y // 2, 2 * X, C):
            x_TCYX = F.pad(padded_rows(x_TYXC, 2 * top, 2 * bottom + 1), (0, 0, 0, 1)).permute(0, 3, 1, 2)
            out_TYXC[:, top:bottom] = F.conv2d(x_TCYX, weight_OCKK, bias_O, stride=2).permute(0, 2, 3, 1)
        return out_TYXC if self.time_conv is None else self._downsample_time(self.time_conv, out_TYXC, cache)

    def _downsample_time(self, conv: nn.Conv3d, x_TYXC: Tensor, cache: CausalCache) -> Tensor:
        last = cache.frames.get((conv, 0))
        cache.frames[conv, 0] = x_TYXC[-1:].clone()
        parts = [x_TYXC[:1]] if last is None else []
        window_TYXC = x_TYXC if last is None else torch.cat([last, x_TYXC])
        if len(window_TYXC) > 1:
            x_BCTYX = window_TYXC[None].permute(0, 4, 1, 2, 3)
            y_BCTYX = F.conv3d(x_BCTYX, conv.weight, conv.bias, stride=(2, 1, 1))
            parts.append(y_BCTYX.permute(0, 2, 3, 4, 1)[0])
        return torch.cat(parts)
