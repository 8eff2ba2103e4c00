"""The latent space: a linear map of 8x8x4 pixel patches (8x8x1 in the first frame) to 16 numbers.

Principal components divided by the square root of their standard deviation, so that the strong ones
stay the louder ones, then rotated at random, so that all 16 channels carry alike, then brought to
mean 0 and variance 1 per channel. That is the space of a *normalised* latent: times wancli's
LATENT_STD plus LATENT_MEAN it is what a Wan VAE stores. The first frame has components of its own,
turned so that its latent is close to that of the same picture standing still for four frames.

Letters: B clips, T latent frames, Y X latent rows and columns, F features of a patch, N patches.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from scripts.mini.training import torch_rng
from scripts.mini.world import Grid, draw_all, random_scene

CHANNELS = 16
PATCH = 8
GRID: Grid = (9, 64, 64)


@dataclass(frozen=True)
class Linear:
    """z = (patch - mean) @ encode, patch = z @ decode + mean."""

    mean_F: Tensor
    encode_FC: Tensor
    decode_CF: Tensor


@dataclass(frozen=True)
class Latents:
    """Videos [B, 3, 4n+1, 8Y, 8X] to normalised latents [B, 16, n+1, Y, X] and, roughly, back."""

    first: Linear
    rest: Linear

    def encode(self, video_BCTYX: Tensor) -> Tensor:
        first, rest = patches(video_BCTYX[:, :, :1]), patches(video_BCTYX[:, :, 1:])
        parts = [(x - m.mean_F) @ m.encode_FC for x, m in ((first, self.first), (rest, self.rest))]
        return torch.cat(parts, dim=1).permute(0, 4, 1, 2, 3)

    def decode(self, z_BCTYX: Tensor) -> Tensor:
        z_BTYXC = z_BCTYX.permute(0, 2, 3, 4, 1)
        first = z_BTYXC[:, :1] @ self.first.decode_CF + self.first.mean_F
        rest = z_BTYXC[:, 1:] @ self.rest.decode_CF + self.rest.mean_F
        return torch.cat([pixels(first), pixels(rest)], dim=2)

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {"first": vars(self.first), "rest": vars(self.rest)}

    @staticmethod
    def of(state: dict[str, dict[str, Tensor]], device: torch.device | str = "cpu") -> Latents:
        maps = {
            part: Linear(**{k: v.to(device) for k, v in state[part].items()}) for part in ("first", "rest")
        }
        return Latents(**maps)


def patches(video_BCTYX: Tensor) -> Tensor:
    """[B, T, Y, X, F]: one frame is one latent frame, more are four each."""
    B, _, frames, height, width = video_BCTYX.shape
    depth = 1 if frames == 1 else 4
    x = video_BCTYX.reshape(B, 3, frames // depth, depth, height // PATCH, PATCH, width // PATCH, PATCH)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def pixels(patches_BTYXF: Tensor) -> Tensor:
    """The inverse of `patches`: [B, 3, frames, height, width]."""
    B, T, Y, X, F = patches_BTYXF.shape
    depth = F // (3 * PATCH * PATCH)
    x = patches_BTYXF.view(B, T, Y, X, 3, depth, PATCH, PATCH)
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(B, 3, T * depth, Y * PATCH, X * PATCH)


def fit(clips: int, seed: int) -> Latents:
    """The latent space of that many random clips."""
    rng = random.Random(f"{seed} latents")
    video_BCTYX = torch.cat(
        [draw_all([random_scene(rng) for _ in range(min(64, clips - i))], GRID) for i in range(0, clips, 64)]
    )
    first_NF = patches(video_BCTYX[:, :, :1]).flatten(0, 3).double()
    rest_NF = patches(video_BCTYX[:, :, 1:]).flatten(0, 3).double()
    turn_CC = torch.linalg.qr(
        torch.randn(CHANNELS, CHANNELS, generator=torch_rng(rng), dtype=torch.float64)
    ).Q
    rest, scale_C = _linear(rest_NF, turn_CC)
    # Orthogonal Procrustes: the turn of the first frame's components that brings them nearest.
    still_NF = first_NF.view(-1, 3, 1, PATCH**2).expand(-1, -1, 4, -1).flatten(1)
    target_NC = ((still_NF - rest.mean_F) @ rest.encode_FC) * scale_C
    plain, _ = _linear(first_NF, torch.eye(CHANNELS, dtype=torch.float64), normalise=False)
    left, _, right = torch.linalg.svd(((first_NF - plain.mean_F) @ plain.encode_FC).T @ target_NC)
    first, _ = _linear(first_NF, left @ right)
    return Latents(*(Linear(*(t.float().contiguous() for t in vars(m).values())) for m in (first, rest)))


def _linear(x_NF: Tensor, turn_CC: Tensor, normalise: bool = True) -> tuple[Linear, Tensor]:
    """The map of these patches, and what its channels were divided by."""
    mean_F = x_NF.mean(0)
    values, vectors = torch.linalg.eigh((x_NF - mean_F).T @ (x_NF - mean_F) / len(x_NF))
    std_C, axes_FC = values[-CHANNELS:].clamp_min(1e-12).sqrt(), vectors[:, -CHANNELS:]
    encode_FC = axes_FC / std_C.sqrt() @ turn_CC
    scale_C = ((x_NF - mean_F) @ encode_FC).std(0) if normalise else torch.ones_like(std_C)
    decode_CF = (axes_FC * std_C.sqrt() @ turn_CC * scale_C).T
    return Linear(mean_F, encode_FC / scale_C, decode_CF), scale_C
