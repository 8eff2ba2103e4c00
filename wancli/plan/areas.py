"""Compile the frames, the region and the mask of each rule into the area where it acts.

Loads without torch. A mask is decoded once for all shots that use it alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from wancli.errors import FfmpegError, JobError
from wancli.injection.area import Area, Mask, TokenGrid, average_mask, compute_weights
from wancli.injection.selectors import parse_during, parse_frames
from wancli.job.loader import Item
from wancli.job.problems import Problems
from wancli.job.schema_rules import Placement
from wancli.job.schema_values import Segment
from wancli.job.yaml_reader import Key
from wancli.pictures.read import read_pixels
from wancli.plan import model_registry
from wancli.plan.injections import locate_errors
from wancli.storage import disk, sidecars
from wancli.storage.file_memo import file_identity
from wancli.video import mp4

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    from wancli.injection.area import Grey

_FORMATS = "A mask is a picture, or an MP4."
_PICTURES_LIKE_MP4 = (b"avif", b"avis", b"heic", b"heix", b"mif1")  # a brand of the same container


class VideoShape(NamedTuple):
    """The size of a video, and its frames a second; its tokens are of 2 x 2 cells of `stride` pixels."""

    width: int
    height: int
    frames: int
    fps: int | str
    stride: int

    @property
    def grid(self) -> TokenGrid:
        return TokenGrid.of_video(self.width, self.height, self.frames, self.stride)


class MaskReader:
    """Reads masks as weights of tokens, each once for as long as its file stays the same."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Mask] = {}

    def read(self, path: Path, feather: float, grid: TokenGrid) -> Mask:
        """Return the mask of a file for a video. Raises JobError, FfmpegError and Unreadable."""
        key = file_identity(path), feather, grid
        if key not in self._known:
            digest, sizes = hashlib.sha256(), [(0, 0)]
            try:
                weights_FYX = average_mask(_digested(_read_grey(path), digest, sizes), feather, grid)
            except ValueError as error:
                hint = "Its frames are those of the video, one by one; take a longer one, or a picture."
                raise JobError(str(error), hint=hint) from None
            self._known[key] = Mask(digest.hexdigest(), grid, sizes[-1], path, weights_FYX)
        return self._known[key]


def _digested(
    pictures: Iterator[Grey], digest: hashlib._Hash, sizes: list[tuple[int, int]]
) -> Iterator[Grey]:
    """Yield the pictures; update the digest, and add the size of each."""
    for grey_YX in pictures:
        height, width = grey_YX.shape
        sizes.append((width, height))
        digest.update(f"{width}x{height}\n".encode())
        digest.update(grey_YX.tobytes())
        yield grey_YX


def _read_grey(path: Path) -> Iterator[Grey]:
    """Yield the frames of an MP4, or a picture, as grey. What is transparent is black."""
    import numpy

    if not _is_mp4(path):
        yield _to_grey(read_pixels(path, "exif", "black"))
        return
    for frame in mp4.read_frames(path):
        yield _to_grey(numpy.frombuffer(frame.rgb, numpy.uint8).reshape(frame.height, frame.width, 3))


def _to_grey(rgb_YX3: Grey) -> Grey:
    import numpy

    luma_YX: NDArray[numpy.float64] = rgb_YX3 @ numpy.array([0.2126, 0.7152, 0.0722])
    return numpy.round(luma_YX).astype(numpy.uint8)


def _is_mp4(path: Path) -> bool:
    starts_like_one = sidecars.has_marker(path, b"ftyp", 8)
    return starts_like_one and not any(sidecars.has_marker(path, brand, 12) for brand in _PICTURES_LIKE_MP4)


def compile_areas(item: Item, video: VideoShape, masks: MaskReader) -> tuple[Area | None, ...]:
    """Compile the area of each rule of a shot; None if it is the whole video. Raises JobError."""
    problems = Problems()
    areas: list[Area | None] = []
    for index in range(len(item.job.inject)):
        with problems.collect():
            areas.append(compile_area(item, ("inject", index), item.job.inject[index], video, masks))
    problems.raise_all()
    return tuple(areas)


def compile_area(
    item: Item, key: tuple[Key, ...], inject: Placement, video: VideoShape, masks: MaskReader
) -> Area | None:
    """Compile the area of one rule, at this key of a job; None if it is the whole video. Raises JobError."""
    problems = Problems()
    frames = None
    with problems.collect():
        frames = select_frames(item, inject, key, video)
    with problems.collect():
        _check_region(item, inject, key)
    problems.raise_all()
    region = None
    if inject.region and inject.region != [0, 0, 1, 1]:
        left, top, right, bottom = inject.region
        region = left, top, right, bottom
    feather = inject.feather if region or inject.mask else 0.0
    area = Area(frames, region, feather)
    if inject.mask is not None:
        area = replace(area, mask=_read_mask(item, key, inject.mask, area, video, masks))
    if area == Area():
        return None  # without an import of numpy
    weights_TYX = compute_weights(area, video.grid)
    if (weights_TYX == 1).all():
        return None
    if not weights_TYX.any():
        _refuse_empty(item, key, area, video.grid)
    return area


def select_frames(
    item: Item, entry: Placement | Segment, key: tuple[Key, ...], video: VideoShape
) -> tuple[int, int] | None:
    """Return the first and the last frame of a rule, or of a segment of a prompt; None if it has all.

    Raises JobError.
    """
    if entry.frames is not None and entry.during is not None:
        where = item.location(*key, "during")
        raise JobError("has both `frames` and `during`", where=where, hint="Write one of them.")
    frames = 0, video.frames - 1
    if entry.frames is not None:
        with locate_errors(item, *key, "frames"):
            frames = parse_frames(entry.frames, video.frames)
    elif entry.during is not None:
        with locate_errors(item, *key, "during"):
            frames = parse_during(entry.during, Fraction(video.fps), video.frames)
    return None if frames == (0, video.frames - 1) else frames


def _check_region(item: Item, inject: Placement, key: tuple[Key, ...]) -> None:
    """Refuse a region without an inside, or next to a mask, and an edge of neither."""
    where = item.location(*key, "region")
    if inject.region is not None and inject.mask is not None:
        hint = "Write one of them; a mask can be black outside of the region."
        raise JobError("has both `region` and `mask`", where=where, hint=hint)
    if inject.region is None:
        if inject.feather and inject.mask is None:
            where = item.location(*key, "feather")
            raise JobError("softens the edge of `region` or `mask`, and the rule has neither", where=where)
        return
    left, top, right, bottom = inject.region
    for name, low, high, sides in (
        ("wide", left, right, "left 0.5, right 1"),
        ("high", top, bottom, "top 0.5, bottom 1"),
    ):
        if low >= high:
            hint = f"Write [left, top, right, bottom], for example {sides}."
            raise JobError(f"is {high - low:g} {name}: from {low:g} to {high:g}", where=where, hint=hint)


def _read_mask(
    item: Item, key: tuple[Key, ...], name: str, area: Area, video: VideoShape, masks: MaskReader
) -> Mask:
    where = item.location(*key, "mask")
    path = model_registry.resolve_path(item.base_dir(*key, "mask"), name, where)
    try:
        with disk.reading_for_job(where, name):
            if disk.is_folder(path):
                raise JobError("is a folder", hint=_FORMATS)
            return masks.read(path, area.feather, video.grid)
    except JobError as error:
        if error.where:
            raise
        raise JobError(f"{name!r} {error.message}", where=where, hint=error.hint) from None
    except FfmpegError as error:
        raise JobError(f"{name!r} is a damaged video: {error.message}", where=where, hint=_FORMATS) from None


def _refuse_empty(item: Item, key: tuple[Key, ...], area: Area, grid: TokenGrid) -> NoReturn:
    """Raise an error that names the nearest area that has a token."""
    if area.mask is None:
        assert area.region
        left, top, right, bottom = area.region
        column, row = (
            min(int((low + high) / 2 * count), count - 1)
            for low, high, count in ((left, right, grid.columns), (top, bottom, grid.rows))
        )
        box = (column / grid.columns, row / grid.rows, (column + 1) / grid.columns, (row + 1) / grid.rows)
        hint = f"The nearest token is [{', '.join(f'{side:.4g}' for side in box)}]."
        raise JobError("reaches no token", where=item.location(*key, "region"), hint=hint)
    where = item.location(*key, "mask")
    white = [frame for frame, weights_YX in enumerate(area.mask.weights_FYX) if weights_YX.any()]
    if not white or area.frames is None:
        hint = "White is where the rule acts."
        raise JobError("reaches no token: the mask is black", where=where, hint=hint)
    first, last = area.frames
    near = min(white, key=lambda frame: max(frame - last, first - frame))
    hint = f"The nearest frame where it is not: {near}."
    raise JobError(f"reaches no token: the mask is black in frames {first}-{last}", where=where, hint=hint)
