"""The picture stage: the given frames of shots as latents and as rows of CLIP, each encoded once ever.

Both are entries of the store, with the keys of `wancli.plan.picture_entries`. What exists loads neither
network. The transformer of an earlier round stays in memory if the plan says that everything fits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from wancli.engine import manifest_body
from wancli.engine.context import RenderContext
from wancli.engine.kept_frames import frame_path, load_frame
from wancli.engine.manifest_body import Record
from wancli.engine.networks import Networks
from wancli.errors import EntryError, ErrorCapture, Unreadable
from wancli.pictures.read import digest_pixels, read_pixels
from wancli.plan import memory_policy
from wancli.plan.picture_entries import entry_values, frames_key
from wancli.plan.pictures import ClipPictures, GivenFrame, LinkedFrame, PictureFile
from wancli.plan.shot import Shot
from wancli.resources.measure import PeakMemory, oom_as_error
from wancli.storage import records

if TYPE_CHECKING:
    from torch import Tensor

    from wancli.models.given_frames import GivenFrames
    from wancli.pictures.read import Pixels
    from wancli.storage.cache import Store

_TENSOR = "frames"
_LABEL = "pictures"


@dataclass(frozen=True)
class EncodedFrames:
    """The given frames of a shot on the CPU, and by id the CLIP rows that its blocks read.

    `hit`: its own pictures had been encoded before. `clip_hits` are the ids of rows that had been.
    """

    frames: GivenFrames
    clip_NE: Mapping[str, Tensor]
    hit: bool
    clip_hits: frozenset[str]


def encode_frames(
    shots: Sequence[Shot], networks: Networks, context: RenderContext, *, keep_clip: bool = False
) -> tuple[dict[int, EncodedFrames], dict[int, ErrorCapture], Record | None]:
    """Encode the pictures of shots; return frames and errors by the index of the shot, and the phase record.

    Raises Stopped between two shots. CLIP is released before it returns unless it is to be kept, the VAE
    unless it was in memory before. The transformer is released first if the encoders do not fit beside it.
    """
    encoded: dict[int, EncodedFrames] = {}
    errors: dict[int, ErrorCapture] = {}
    with_pictures = [shot for shot in shots if shot.pictures]
    if not with_pictures:
        return encoded, errors, None
    import torch

    cache = _Entries(context.store)
    missing = [shot for shot in with_pictures if not all(map(cache.has, entry_values(shot)))]
    if not all(map(memory_policy.pictures_fit_alongside, missing)):
        networks.release_transformer()
    with (
        networks.borrow_encoders(keep_clip=keep_clip),
        PeakMemory() as peak,
        context.progress.phase("pictures", [shot.id for shot in with_pictures], len(with_pictures)) as bar,
    ):
        for shot in with_pictures:
            if context.stop.requested:
                raise context.stop.error(f"pictures of {len(encoded)} of {len(with_pictures)} shots encoded")
            with (
                ErrorCapture() as attempt,
                oom_as_error("pictures", f"shot {shot.id}"),
                torch.inference_mode(),
            ):
                encoded[shot.index] = _encode_shot(shot, networks, cache)
            if attempt.error:
                errors[shot.index] = attempt
            bar.advance()
    record = manifest_body.phase_record("pictures", peak) | {"shots": len(with_pictures)}
    return encoded, errors, record


def _encode_shot(shot: Shot, networks: Networks, cache: _Entries) -> EncodedFrames:
    clip_NE, clip_hits = {}, set()
    for read in shot.clip_pictures:
        encode = partial(_encode_clip, read, networks, shot.model.device)
        clip_NE[read.id], hit = cache.get(read.id, _name_pictures(read.sources), encode)
        clip_hits |= {read.id} if hit else set()
    assert shot.pictures
    names = _name_pictures([frame.source for frame in shot.pictures.frames])
    label = f"{names} at {shot.width}x{shot.height}"
    z_CTYX, hit = cache.get(frames_key(shot), label, partial(_encode_latents, shot, networks))
    hit = hit and (shot.clip_id is None or shot.clip_id in clip_hits)
    return EncodedFrames(_as_given(shot, z_CTYX), clip_NE, hit, frozenset(clip_hits))


def _name_pictures(sources: Sequence[PictureFile | LinkedFrame]) -> str:
    return " and ".join(dict.fromkeys(source.name for source in sources))


class _Entries:
    """Tensors by key: those of this round, and those of the store."""

    def __init__(self, store: Store | None) -> None:
        self._store = store
        self._known: dict[str, Tensor] = {}

    def has(self, key: str) -> bool:
        """Return whether the store has an entry, which may be damaged."""
        return self._store is not None and self._store.has(key)

    def get(self, key: str, label: str, make: Callable[[], Tensor]) -> tuple[Tensor, bool]:
        """Return an entry, and whether it existed; else make it and keep it under a name for people."""
        if key in self._known:
            return self._known[key], True
        found = _load(key, self._store)
        self._known[key] = make() if found is None else found
        if found is None and self._store is not None:
            self._store.put(key, _pack(self._known[key], label))
        return self._known[key], found is not None


def _encode_clip(read: ClipPictures, networks: Networks, device: str) -> Tensor:
    """Return the CLIP rows [N, E] of pictures, one after the other."""
    import torch

    from wancli.pictures.preprocess import make_clip_input

    inputs = [make_clip_input(_read_source(source), read.method) for source in read.sources]
    rows_PNE: Tensor = networks.clip(torch.stack(inputs).to(device))
    return rows_PNE.flatten(0, 1).cpu()


def _encode_latents(shot: Shot, networks: Networks) -> Tensor:
    from wancli.models import given_frames

    assert shot.pictures
    device = shot.model.device
    first_CYX = _make_frame(shot, shot.pictures.first).to(device)
    if not shot.model.checkpoint.transformer_config.joins_frames:
        return given_frames.encode_picture(networks.vae, first_CYX).cpu()
    frames_CYX: dict[int, Tensor] = {0: first_CYX}
    if shot.pictures.last:
        frames_CYX[shot.frames - 1] = _make_frame(shot, shot.pictures.last).to(device)
    return given_frames.encode_channels(networks.vae, frames_CYX, shot.frames).cpu()


def _make_frame(shot: Shot, frame: GivenFrame) -> Tensor:
    """Make a frame [3, Y, X] of its picture."""
    from wancli.pictures.preprocess import make_frame

    return make_frame(_read_source(frame.source), shot.width, shot.height, frame.how)


def _read_source(source: PictureFile | LinkedFrame) -> Pixels:
    """Read the pixels of a picture. Raises EntryError if it is not the planned one."""
    if isinstance(source, LinkedFrame):
        return load_frame(source)
    pixels_YX3 = read_pixels(source.path, source.orient, source.alpha)
    if digest_pixels(pixels_YX3) != source.facts.sha256:
        hint = "The same command plans the new picture; its video gets another key."
        raise EntryError("the picture has changed since it was planned", where=str(source.path), hint=hint)
    if source.crop is None:
        return pixels_YX3
    from wancli.pictures.preprocess import crop_middle

    return crop_middle(pixels_YX3, *source.crop)


def _as_given(shot: Shot, z_CTYX: Tensor) -> GivenFrames:
    from wancli.models.given_frames import GivenFrames

    return (
        GivenFrames(channels_CTYX=z_CTYX)
        if shot.model.checkpoint.transformer_config.joins_frames
        else GivenFrames(first_CTYX=z_CTYX)
    )


def _pack(entry: Tensor, label: str) -> bytes:
    return records.write_tensors({_TENSOR: entry.contiguous()}, json.dumps({_LABEL: label}))


def read_label(payload: bytes) -> str | None:
    """Return what an entry of the store shows, for people; None if it is not one of pictures. No torch."""
    try:
        document = records.parse_header(payload)[1]
    except ValueError:
        return None
    return str(document[_LABEL]) if isinstance(document, dict) and _LABEL in document else None


def _load(key: str, store: Store | None) -> Tensor | None:
    """Load an entry of the store; None if there is none, or one that another version wrote."""
    payload = store.get(key) if store else None
    try:
        return None if payload is None else records.parse_tensors(payload)[0][_TENSOR]
    except (ValueError, KeyError):
        return None


def picture_records(shot: Shot, encoded: Mapping[int, EncodedFrames]) -> list[Record]:
    """Describe the given frames of a shot for its manifest."""
    if shot.pictures is None:
        return []
    described: list[Record] = []
    for role, frame in zip(("first", "last"), shot.pictures.frames):
        source = frame.source
        if isinstance(source, PictureFile):
            read = {"orient": source.orient, "alpha": source.alpha, "crop": source.crop}
            origin: Record = {"path": str(source.path), "sha256": source.facts.sha256, **read}
        else:
            link = {"shot": source.id, "frame": source.frame}
            path = frame_path(source.output, source.frame)
            digests = {"sha256": source.pixels_key, "pixels_sha256": _digest_frame(source)}
            origin = {"path": str(path), "orient": "ignore", "alpha": "drop", "link": link, **digests}
        size = {"width": source.size[0], "height": source.size[1]}
        how = {"preprocess": frame.how.method, "fit": frame.how.fit}
        cached = encoded[shot.index].hit
        described.append({"role": role, "cached": cached, **origin, **size, **how})
    return described


def _digest_frame(link: LinkedFrame) -> str | None:
    """Return the SHA-256 of the pixels of a kept frame; None if it is gone, and its latents were cached."""
    try:
        return digest_pixels(load_frame(link))
    except (EntryError, Unreadable):
        return None


def injected_records(shot: Shot, encoded: Mapping[int, EncodedFrames]) -> dict[str, Record]:
    """Describe the injected pictures of a shot by id, for its manifest."""
    return {
        picture.id: {
            "path": str(picture.source.path),
            "sha256": picture.source.pixels_key,
            "width": picture.source.size[0],
            "height": picture.source.size[1],
            "preprocess": picture.read.method,
            "orient": picture.source.orient,
            "alpha": picture.source.alpha,
            "cached": picture.id in encoded[shot.index].clip_hits,
        }
        for picture in shot.injected_pictures
    }
