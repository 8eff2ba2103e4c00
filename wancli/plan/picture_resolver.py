"""Resolve `image:` and `size:` of a shot: files to digests and sizes, a linked shot to its frame.

Loads without torch. Pixels are decoded for their digest, once for as long as a file stays the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from wancli.errors import JobError
from wancli.job.loader import Item
from wancli.job.schema import AreaSize, ImageOptions
from wancli.job.schema_rules import InjectPicture
from wancli.models.variants import Variant
from wancli.pictures.read import Alpha, Orient, PictureFacts, inspect_picture
from wancli.pictures.sizes import Preprocessing, Size, default_fit, fit_to_area, official_crop
from wancli.plan import model_registry
from wancli.plan.pictures import GivenFrame, InjectedPicture, LinkedFrame, PictureFile, ShotPictures
from wancli.storage import disk
from wancli.storage.file_memo import file_identity, read_memo, write_memo

if TYPE_CHECKING:
    from wancli.plan.model_spec import ModelSpec
    from wancli.plan.shot import Shot

MAX_SIDE = 99_999  # pixels of a video
_FACTS = {field.name for field in fields(PictureFacts)}


class PictureMemo:
    """Opens pictures, and remembers digests in a file between runs: decoding photos takes long.

    Another version of Pillow may decode a file to other pixels.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_new = False

    @cached_property
    def _known(self) -> dict[str, PictureFacts]:
        return _parse_memo(read_memo(self._path))

    def look_up(self, path: Path, orient: Orient, alpha: Alpha) -> PictureFile:
        """Find size and digest. Raises JobError if it is not a picture, and Unreadable."""
        identity = f"{file_identity(path)}|{orient}|{alpha}|Pillow {version('pillow')}"
        facts = self._known.get(identity)
        if facts is None:
            facts = self._known[identity] = inspect_picture(path, orient, alpha)
            self._is_new = True
        return PictureFile(path, orient, alpha, facts)

    def save(self) -> None:
        """Write new digests to the file, beside those that other processes have added."""
        if self._is_new:
            write_memo(
                self._path, read_memo(self._path) | {key: asdict(facts) for key, facts in self._known.items()}
            )


def _parse_memo(values: Mapping[str, Any]) -> dict[str, PictureFacts]:
    """Return the entries of a memo, except those of versions that noted other facts."""
    return {
        key: PictureFacts(tuple(value["size"]), value["sha256"], tuple(value["notes"]))
        for key, value in values.items()
        if isinstance(value, dict) and value.keys() == _FACTS
    }


def resolve_pictures(
    item: Item, variant: Variant, memo: PictureMemo, parent: Shot | None
) -> tuple[ShotPictures | None, Size]:
    """Resolve the pictures of a shot, and its size. `parent` is the shot whose frame begins this one.

    Raises JobError if a picture cannot be read, or if the model takes another number of pictures.
    """
    options = item.job.image_options
    if options is None:
        _require_text_to_suffice(item, variant)
        return None, _parse_size_without_picture(item, variant)
    _refuse_wrong_number(item, options, variant)
    first = _link(item, options, parent) if parent else _open_given(item, options, "first", memo)
    last = None if options.last is None else _open_given(item, options, "last", memo)
    area = _parse_area(item, variant)
    if area is None:
        size = _parse_exact_size(item, variant)
    elif _continues_in_its_size(first, variant):
        size = first.size  # the rule would shrink a chain from shot to shot
    else:
        size = fit_to_area(first.size, area, options.preprocess, variant.stride)
    if not 0 < min(size) <= max(size) <= MAX_SIDE:
        raise JobError(
            f"a picture of {first.size[0]}x{first.size[1]} gives a video of {size[0]}x{size[1]}",
            where=item.location("image"),
            hint="Write a larger area, or an exact size, for example size: 832x480, which crops the picture.",
        )
    if last and area is not None and variant.last_picture == "required":
        last = _crop_last(last, options, first.size)
    how = partial(_choose_preprocessing, options, size, variant.stride)
    return (
        ShotPictures(
            GivenFrame(first, how(first.size, by_area=area is not None)),
            GivenFrame(last, how(last.size, by_area=_is_by_area(last, first, area))) if last else None,
        ),
        size,
    )


def _crop_last(last: PictureFile, options: ImageOptions, first: Size) -> PictureFile:
    """Crop the last picture as the official FLF2V code does, unless the job says something else."""
    crop = official_crop(first, last.size) if options.preprocess == "official" and not options.fit else None
    if crop is None:
        return last
    grey = " with grey around it," if crop[0] > last.size[0] or crop[1] > last.size[1] else ""
    note = (
        f"it has not the size of the first picture, so a middle of {crop[0]}x{crop[1]} is taken,{grey} and "
        "stretched to the frame, as the official code does; `fit: crop` keeps its aspect"
    )
    return replace(last, crop=crop, facts=replace(last.facts, notes=(*last.facts.notes, note)))


def _is_by_area(last: PictureFile, first: PictureFile | LinkedFrame, area: int | None) -> bool:
    """Return whether the official rule stretches the last picture to the size that it found."""
    return area is not None and (last.size == first.size or last.crop is not None)


def _choose_preprocessing(
    options: ImageOptions, size: Size, stride: int, picture: Size, *, by_area: bool
) -> Preprocessing:
    """Choose the fit, if the job does not. `by_area`: the official rule found the size for this picture."""
    method = options.preprocess
    if options.fit is not None:
        return Preprocessing(method, options.fit, stride)
    if by_area and method == "official":
        return Preprocessing(method, "crop" if stride == 32 else "stretch", stride)
    return Preprocessing(method, default_fit(picture, size, method, stride), stride)


def _require_text_to_suffice(item: Item, variant: Variant) -> None:
    """Raise JobError if the model makes no video without a picture."""
    if variant.first_picture == "required":
        message = f"{variant.name} makes a video from a picture, and the job names none"
        raise JobError(message, where=item.location("image"), hint="Add image: cat.png")


def _refuse_wrong_number(item: Item, options: ImageOptions, variant: Variant) -> None:
    """Raise JobError unless the job names the pictures that the model takes."""
    where = item.location("image")
    if options.first is not None and options.shot is not None:
        raise JobError(
            "has both `first` and `shot`",
            where=where,
            hint="The first frame is one or the other. `image` of an item is merged over that of the job.",
        )
    has_first = (options.first or options.shot) is not None
    if not has_first and options.last is None:
        hint = "Write image: cat.png, or image: {first: cat.png}."
        raise JobError("names no picture", where=where, hint=hint)
    if variant.first_picture == "none":
        hint = "Leave `image` out, or take an image-to-video model, or Wan2.2-TI2V-5B."
        raise JobError(f"{variant.name} makes videos from text alone", where=where, hint=hint)
    if not has_first:
        raise JobError(f"{variant.name} needs the first frame", where=where, hint="Add first: cat.png.")
    if options.last is not None and variant.last_picture == "none":
        where = item.location("image", "last")
        raise JobError(f"{variant.name} takes no last frame", where=where, hint="Leave `last` out.")
    if options.last is None and variant.last_picture == "required":
        hint = f"Write image: {{first: {options.first or 'cat.png'}, last: end.png}}."
        raise JobError(f"{variant.name} needs the last frame, too", where=where, hint=hint)


def _link(item: Item, options: ImageOptions, parent: Shot) -> LinkedFrame:
    frame = parent.frames - 1 if options.frame == "last" else options.frame
    if frame >= parent.frames:
        raise JobError(
            f"{frame} is past the last frame of {parent.id}, which is {parent.frames - 1}",
            where=item.location("image", "frame"),
        )
    return LinkedFrame(
        parent.index, parent.id, parent.output, frame, (parent.width, parent.height), parent.frame_key(frame)
    )


def _open_given(
    item: Item, options: ImageOptions, key: Literal["first", "last"], memo: PictureMemo
) -> PictureFile:
    path_of_key = ("image",) if isinstance(item.job.image, str) else ("image", key)
    return _open(item, path_of_key, getattr(options, key), options, memo)


def resolve_injected(item: Item, index: int, model: ModelSpec, memo: PictureMemo) -> InjectedPicture:
    """Resolve the picture of a rule; it is read as the key `image` says of the shot's own.

    Raises JobError if it cannot be read, or if the blocks of the model attend to text alone.
    """
    rule, key = item.job.inject[index], ("inject", index, "image")
    assert isinstance(rule, InjectPicture)
    if not model.clip:
        name = model.checkpoint.variant.name
        message = f"the blocks of {name} attend to text alone, not to pictures"
        raise JobError(message, where=item.location(*key), hint="Inject a prompt.")
    options = item.job.image_options or ImageOptions()
    source = _open(item, key, rule.image, options, memo)
    read = model.read_with_clip([source], options.preprocess)
    assert read
    return InjectedPicture(source, read)


def _open(
    item: Item, key: tuple[str | int, ...], name: str, options: ImageOptions, memo: PictureMemo
) -> PictureFile:
    """Open the picture that a key names."""
    where = item.location(*key)
    path = model_registry.resolve_path(item.base_dir(*key), name, where)
    orient = options.orient or ("ignore" if options.preprocess == "official" else "exif")
    try:
        with disk.reading_for_job(where, name):
            if disk.is_folder(path):
                hint = f"Write images_from: {name} for a video of each picture in it."
                raise JobError("is a folder", hint=hint)
            return memo.look_up(path, orient, options.alpha)
    except JobError as error:
        if error.where:
            raise
        raise JobError(f"{name!r} {error.message}", where=where, hint=error.hint) from None


def _continues_in_its_size(first: PictureFile | LinkedFrame, variant: Variant) -> bool:
    """Return whether a frame is of another shot's video whose size this model renders, too."""
    return isinstance(first, LinkedFrame) and not any(side % variant.stride for side in first.size)


def _parse_area(item: Item, variant: Variant) -> int | None:
    """Return the pixels of a video whose sides the model's rule finds; None for an exact size."""
    size = item.job.size
    if size is None:
        return variant.width * variant.height
    if not isinstance(size, AreaSize):
        return None
    if isinstance(size.area, int):
        return size.area
    width, height = parse_sides(size.area, item.location("size", "area"))
    return width * height


def _parse_size_without_picture(item: Item, variant: Variant) -> Size:
    if isinstance(item.job.size, AreaSize):
        raise JobError(
            "finds the size from the aspect of a picture, and the job has no `image`",
            where=item.location("size", "area"), hint="Write size: 832x480.",
        )  # fmt: skip
    return (variant.width, variant.height) if item.job.size is None else _parse_exact_size(item, variant)


def _parse_exact_size(item: Item, variant: Variant) -> Size:
    text, where = item.job.size, item.location("size")
    assert isinstance(text, str)
    size, stride = parse_sides(text, where), variant.stride
    near = tuple(max(stride, round(side / stride) * stride) for side in size)
    if size != near:
        raise JobError(
            f"{text} is not made of multiples of {stride}; nearest is {near[0]}x{near[1]}", where=where
        )
    return size


def parse_sides(text: str, where: str) -> Size:
    """Parse `832x480`. Raises JobError, at `where`."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and len(text) <= 11):
        raise JobError(f"{text!r} is not a size", where=where, hint="Write width x height: 832x480.")
    return int(width), int(height)
