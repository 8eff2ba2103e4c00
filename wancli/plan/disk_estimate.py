"""Bytes that a batch will write, compared with the free space of its disks.

The estimate is generous. A video takes 2 bits per pixel at crf 16, twice that for every 6 less, up to raw
4:2:0: more than grain of 3 levels takes, and a third of pure noise. Beside it are a manifest of 64 KiB, if
the job keeps it the latent, and attention maps with their overlay. The largest round also needs the latents
and states of its shots until their videos are made, each a second time while it is replaced. Frames that
other shots begin with are PNG files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from wancli.errors import NoSpace
from wancli.plan.batching import STATE_TENSORS
from wancli.plan.memory_estimate import residual_bytes
from wancli.plan.picture_entries import entry_values
from wancli.plan.schedule import Schedule
from wancli.plan.shot import Shot
from wancli.resources.memory_model import FP32
from wancli.storage import disk
from wancli.storage.cache import Store
from wancli.units import format_bytes, pluralize

_RECORD_BYTES = 64 * 2**10  # a manifest, or the record of a latent
_RAW_BITS = 12.6  # bits per pixel of 4:2:0 that did not compress, and a little more
_MIN_CELL = 320 * 320  # pixels of a cell of an overlay, whose letters are to be legible
_MARGIN, _MIN_FREE = 1.05, 2**20  # for other files, and other programs


@dataclass(frozen=True)
class DiskNeed:
    """The bytes that one file system has to hold. `folder` is the first output folder on it."""

    folder: Path
    needed: int
    free: int

    @property
    def with_margin(self) -> int:
        """The bytes needed with a margin for other programs."""
        return math.ceil(self.needed * _MARGIN) + _MIN_FREE

    @property
    def fits(self) -> bool:
        return self.free >= self.with_margin


def disk_needs(schedule: Schedule, store: Store | None = None) -> list[DiskNeed]:
    """Return the need of each file system that the shots write to.

    With `store` it includes the missing embeddings and encoded pictures, if the store is on one of these file
    systems.
    """
    per_device: dict[int, int] = {}
    folders: dict[int, Path] = {}
    for shot in schedule.shots:
        device = _device_id(shot.output.parent)
        folders.setdefault(device, shot.output.parent)
        per_device[device] = per_device.get(device, 0) + _permanent_bytes(shot)
    rounds = [[shot for batch in round_ for shot in batch] for round_ in schedule.rounds]
    for device in folders:
        passing = (
            sum(_temporary_bytes(s) for s in r if _device_id(s.output.parent) == device) for r in rounds
        )
        per_device[device] += max(passing, default=0)
    if store and (device := _device_id(store.root)) in folders:
        per_device[device] += embedding_bytes(schedule.shots, store)
        per_device[device] += picture_bytes(schedule.shots, store)
    return [DiskNeed(folder, per_device[d], disk.free_space(folder)) for d, folder in folders.items()]


def embedding_bytes(shots: Iterable[Shot], store: Store) -> int:
    """Return the bytes of the embeddings that the store does not have yet."""
    texts = {text.id: (shot, text) for shot in shots for text in shot.prompts if text.file is None}
    missing = [pair for id, pair in texts.items() if not store.has(id)]
    rows = (
        (len(text.tokens.ids), shot.model.checkpoint.transformer_config.text_dim) for shot, text in missing
    )
    return sum(count * width * FP32 + _RECORD_BYTES for count, width in rows)


def picture_bytes(shots: Iterable[Shot], store: Store) -> int:
    """Return the bytes of the encoded pictures that the store does not have yet."""
    entries = {key: count for shot in shots for key, count in entry_values(shot).items()}
    return sum(FP32 * count + _RECORD_BYTES for key, count in entries.items() if not store.has(key))


def require(schedule: Schedule, store: Store | None = None) -> None:
    """Raise NoSpace, with the figures, if less is free than the shots may need."""
    for need in disk_needs(schedule, store):
        if not need.fits:
            many, needed, free = (
                pluralize(len(schedule.shots), "shot"),
                format_bytes(need.with_margin),
                format_bytes(need.free),
            )
            raise NoSpace(
                f"{many} may need {needed} on this disk, {free} are free",
                where=str(need.folder),
                hint="Free some space, choose another `output`, or render a part with --items.",
            )


def video_bytes(shot: Shot) -> int:
    """Return the bytes of the MP4, a generous estimate."""
    bits = min(_RAW_BITS, 2 * 2 ** ((16 - shot.crf) / 6))
    return math.ceil(shot.width * shot.height * shot.frames * bits / 8)


def _permanent_bytes(shot: Shot) -> int:
    latent = FP32 * math.prod(shot.latent_shape) + _RECORD_BYTES
    kept_frame = 3 * shot.width * shot.height + _RECORD_BYTES  # a PNG
    beside = (latent if shot.keep_latents else 0) + len(shot.kept_frames) * kept_frame
    return video_bytes(shot) + _RECORD_BYTES + beside + _attention_bytes(shot)


def _attention_bytes(shot: Shot) -> int:
    """Return the bytes of the attention maps and of their overlay, which has a cell for every word."""
    if shot.attention is None:
        return 0
    cell = max(shot.width * shot.height, _MIN_CELL) * shot.frames
    overlay = math.ceil(len(shot.attention.words) * cell * 2 / 8)  # 2 bits per pixel at crf 16
    return _map_bytes(shot) + overlay


def _map_bytes(shot: Shot) -> int:
    """Return the bytes of the attention maps of a shot, in their file or in a state."""
    return 0 if shot.attention is None else FP32 * shot.attention.count * shot.tokens + _RECORD_BYTES


def _temporary_bytes(shot: Shot) -> int:
    """Return the bytes of the latent, and twice of the state, less what is on disk already."""
    latent = FP32 * math.prod(shot.latent_shape) + _RECORD_BYTES
    existing = sum(found.st_size for path in (shot.latents, shot.state) if (found := disk.status(path)))
    state = STATE_TENSORS * latent + _map_bytes(shot) + residual_bytes(shot)
    return max(0, latent + 2 * state - existing)


def _device_id(path: Path) -> int:
    found = disk.status(disk.nearest_folder(path))
    return found.st_dev if found else 0
