"""Bytes that a batch will write, against what is free where it writes them.

The estimate is generous. A video takes 2 bits per pixel at crf 16, twice that for every 6 less, up to raw
4:2:0: more than grain of 3 levels takes, and a third of pure noise. Beside it are a manifest of 64 KiB, the
latent where it is kept, and for the largest wave of shots the latents and states that lie there until its
videos are made, each a second time while it is replaced.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from wancli.errors import NoSpace
from wancli.plan import batching
from wancli.plan.shot import Shot
from wancli.resources.memory_model import FP32
from wancli.storage import atomic
from wancli.storage.cache import Store
from wancli.units import format_bytes, pluralize

_RECORD_BYTES = 64 * 2**10  # a manifest, or what is told of a latent beside its numbers
_RAW_BITS = 12.6  # bits per pixel of 4:2:0 that did not compress, and some
_MARGIN, _MIN_FREE = 1.05, 2**20  # for other files, and other programs


@dataclass(frozen=True)
class DiskNeed:
    """What one file system has to hold. `folder` is the first that lies there."""

    folder: Path
    needed: int
    free: int

    @property
    def with_margin(self) -> int:
        """With what is left for others."""
        return math.ceil(self.needed * _MARGIN) + _MIN_FREE

    @property
    def fits(self) -> bool:
        return self.free >= self.with_margin


def disk_needs(shots: Sequence[Shot], store: Store | None = None) -> list[DiskNeed]:
    """Per file system that the shots write to; with `store` also what missing embeddings take, where that is
    on one of them."""
    per_device: dict[int, int] = {}
    folders: dict[int, Path] = {}
    for shot in shots:
        device = _device_id(shot.output.parent)
        folders.setdefault(device, shot.output.parent)
        per_device[device] = per_device.get(device, 0) + _permanent_bytes(shot)
    waves = [[shot for group in wave for shot in group] for wave in batching.waves(shots)]
    for device in folders:
        passing = (
            sum(_temporary_bytes(s) for s in wave if _device_id(s.output.parent) == device) for wave in waves
        )
        per_device[device] += max(passing, default=0)
    if store and (device := _device_id(store.root)) in folders:
        per_device[device] += embedding_bytes(shots, store)
    return [DiskNeed(folder, per_device[d], atomic.free_space(folder)) for d, folder in folders.items()]


def embedding_bytes(shots: Iterable[Shot], store: Store) -> int:
    """Bytes that the store will take for prompts that are not there yet."""
    texts = {text.id: (shot, text) for shot in shots for text in shot.prompts if text.file is None}
    missing = [found for id, found in texts.items() if not store.path(id).exists()]
    rows = ((len(text.tokens.ids), shot.model.checkpoint.transformer.text_dim) for shot, text in missing)
    return sum(count * width * FP32 + _RECORD_BYTES for count, width in rows)


def require(shots: Sequence[Shot], store: Store | None = None) -> None:
    """Raises NoSpace, with the figures, where less is free than the shots may need."""
    for need in disk_needs(shots, store):
        if not need.fits:
            many, needed, free = (
                pluralize(len(shots), "shot"),
                format_bytes(need.with_margin),
                format_bytes(need.free),
            )
            raise NoSpace(
                f"{many} may need {needed} on this disk, {free} are free",
                where=str(need.folder),
                hint="Free some space, write elsewhere with `output`, or render a part with --items.",
            )


def video_bytes(shot: Shot) -> int:
    """What the MP4 takes, generously."""
    bits = min(_RAW_BITS, 2 * 2 ** ((16 - shot.crf) / 6))
    return math.ceil(shot.width * shot.height * shot.frames * bits / 8)


def _permanent_bytes(shot: Shot) -> int:
    latent = FP32 * math.prod(shot.latent_shape) + _RECORD_BYTES
    return video_bytes(shot) + _RECORD_BYTES + (latent if shot.keep_latents else 0)


def _temporary_bytes(shot: Shot) -> int:
    """The latent, and its state twice, unless they are there already."""
    latent = FP32 * math.prod(shot.latent_shape) + _RECORD_BYTES
    there = sum(path.stat().st_size for path in (shot.latents, shot.state) if path.exists())
    return max(0, latent + 2 * (batching.STATE_TENSORS * latent) - there)


def _device_id(path: Path) -> int:
    while not path.exists():
        path = path.absolute().parent
    return path.stat().st_dev
