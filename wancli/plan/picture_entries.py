"""Entries of the cache that the picture stage makes: the latents of given frames, and rows of CLIP.

The key of latents covers the pixels, the preprocessing, the size, the weights of the VAE and, if the whole
video is encoded, its number of frames. That of CLIP rows covers the pixels, the preprocessing and the weights
of CLIP (`Shot.clip_id`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from typing import TYPE_CHECKING

from wancli.resources import flops
from wancli.weights.checkpoint import clip_config

if TYPE_CHECKING:
    from wancli.plan.shot import Shot

FORMAT = 1  # of the key and the payload
_MASK_CHANNELS = 4


def frames_key(shot: Shot) -> str:
    """Hash everything that the latents of given frames depend on."""
    assert shot.pictures
    parts = {
        "format": FORMAT,
        "frames": shot.pictures.pixel_settings,
        "size": [shot.width, shot.height],
        "count": shot.frames if shot.model.checkpoint.transformer_config.joins_frames else None,
        "vae": shot.model.vae,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "pillow")},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def given_values(shot: Shot) -> int:
    """Count the values of the latents of given frames, with their mask; 0 if none are given."""
    if not shot.pictures:
        return 0
    z, t, y, x = shot.latent_shape
    joins = shot.model.checkpoint.transformer_config.joins_frames
    return math.prod((_MASK_CHANNELS + z, t, y, x) if joins else (z, 1, y, x))


def entry_flops(shot: Shot) -> dict[str, int]:
    """Count the FLOPs of making each entry that a shot reads, by the key of the entry."""
    if not shot.pictures:
        return {}
    given = [0, shot.frames - 1] if shot.pictures.last else [0]
    latent = shot.latent_shape
    if not shot.model.checkpoint.transformer_config.joins_frames:
        latent = (latent[0], 1, *latent[2:])
    frames = flops.given_frames_flops(shot.model.vae_sizes, latent, given)
    rows = {
        read.id: flops.clip_flops(clip_config(shot.model.checkpoint), len(read.sources))
        for read in shot.clip_pictures
    }
    return rows | {frames_key(shot): frames}


def entry_values(shot: Shot) -> dict[str, int]:
    """Count the values of each entry that a shot reads, by the key of the entry."""
    if not shot.pictures:
        return {}
    width = shot.model.checkpoint.transformer_config.image_dim or 0
    rows = {read.id: read.rows * width for read in shot.clip_pictures}
    return rows | {frames_key(shot): given_values(shot)}
