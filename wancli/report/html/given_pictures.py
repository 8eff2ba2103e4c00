"""Small copies of the pictures that a video was made from: each as it is, and as the model saw it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from wancli.engine.kept_frames import load_frame
from wancli.errors import EntryError, JobError, Unreadable, WancliError
from wancli.models import variants
from wancli.pictures.read import Alpha, Orient, digest_pixels, read_pixels
from wancli.pictures.sizes import Fit, Method, Preprocessing, Size
from wancli.plan.pictures import LinkedFrame
from wancli.storage import atomic, records
from wancli.storage.manifest_schema import Manifest
from wancli.storage.prompt_schema import PictureRecord

if TYPE_CHECKING:
    from wancli.pictures.read import Pixels

_SIDE = 320  # pixels of a small copy at most
_FORMAT = 1  # of the files


def picture_entries(record: Manifest, cache_dir: Path) -> list[dict[str, Any]]:
    """Describe the pictures of a shot. `picture` and `frame` are data URIs, None if the picture is not there
    any more, or is another one.

    The copies are kept in `cache_dir`. Loads torch to make a frame, but not to show one that was made before.
    """
    return [_picture_entry(record, picture, cache_dir) for picture in record.pictures]


def _picture_entry(record: Manifest, picture: PictureRecord, cache_dir: Path) -> dict[str, Any]:
    small = _small_copies(record, picture, cache_dir)
    return {
        "role": picture.role,
        "name": picture.name,
        "path": picture.path,
        "size": [picture.width, picture.height],
        "how": f"{picture.fit} as {picture.preprocess}",
        "orient": picture.orient,
        "alpha": picture.alpha,
        "picture": small and small[0],
        "frame": small and small[1],
    }


def _small_copies(record: Manifest, picture: PictureRecord, cache_dir: Path) -> tuple[str, str] | None:
    """Return the picture and its frame as data URIs, from `cache_dir` or made now; None if there is none."""
    size = (record.shot.width, record.shot.height)
    channels = record.model.sizes.out_dim
    if channels not in variants.BY_CHANNELS:
        return None  # of a later version
    how = Preprocessing(
        cast("Method", picture.preprocess), cast("Fit", picture.fit), variants.BY_CHANNELS[channels].stride
    )
    parts = [_FORMAT, picture.pixels_key, *size, how.method, how.fit, how.stride]
    name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    paths = [cache_dir / f"{name}.{kind}.jpg" for kind in ("picture", "frame")]
    try:
        copies = [records.read(path, records.POSTER) for path in paths]
    except (Unreadable, EntryError):
        try:
            pixels_YX3 = _read_recorded(picture)
        except (JobError, EntryError, Unreadable):
            return None
        frame_YX3 = _frame_pixels(pixels_YX3, picture.crop, size, how)
        copies = [_to_jpeg(pixels_YX3), _to_jpeg(frame_YX3)]
        for path, copy in zip(paths, copies):
            with suppress(WancliError):  # a folder that cannot be written costs the work again
                atomic.replace(path, copy)
    first, second = (f"data:image/jpeg;base64,{base64.b64encode(copy).decode()}" for copy in copies)
    return first, second


def _read_recorded(picture: PictureRecord) -> Pixels:
    """Read the pixels of a recorded picture. Raises EntryError if the file holds another picture."""
    path, link = Path(picture.path), picture.link
    if link:
        output = path.with_name(path.name.removesuffix(f".frame{link.frame}.png") + ".mp4")
        size = (picture.width, picture.height)
        return load_frame(LinkedFrame(0, link.shot, output, link.frame, size, picture.sha256))
    pixels_YX3 = read_pixels(path, cast("Orient", picture.orient), cast("Alpha", picture.alpha))
    if digest_pixels(pixels_YX3) != picture.sha256:
        raise EntryError("is another picture now", where=str(path))
    return pixels_YX3


def _frame_pixels(pixels_YX3: Pixels, crop: Size | None, size: Size, how: Preprocessing) -> Pixels:
    """Return the frame that the model saw, as 8-bit RGB."""
    import numpy as np

    from wancli.pictures.preprocess import crop_middle, make_frame

    if crop:
        pixels_YX3 = crop_middle(pixels_YX3, *crop)
    frame_CYX = make_frame(pixels_YX3, *size, how)
    values = frame_CYX.clamp(-1, 1).add(1).mul(127.5).round().permute(1, 2, 0)
    return values.numpy().astype(np.uint8)


def _to_jpeg(pixels_YX3: Pixels) -> bytes:
    from PIL import Image

    image, file = Image.fromarray(pixels_YX3), io.BytesIO()
    image.thumbnail((_SIDE, _SIDE))
    image.save(file, "JPEG", quality=85)
    return file.getvalue()
