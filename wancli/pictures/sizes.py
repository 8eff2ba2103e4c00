"""How a picture fits a video: the methods, and the size of a video from the aspect of its picture.

Sizes are (width, height) in pixels. Pure arithmetic, without torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Size = tuple[int, int]
Method = Literal["official", "diffusers", "comfy"]
Fit = Literal["stretch", "crop", "pad"]


@dataclass(frozen=True)
class Preprocessing:
    """How the pixels of a picture become a frame of a video. Each field changes pixels."""

    method: Method
    fit: Fit
    stride: int  # of the model, which selects the official resize


def fit_to_area(picture: Size, area: int, method: Method, stride: int) -> Size:
    """Return the size for a picture: about `area` pixels, in multiples of `stride`. A side may be 0.

    `diffusers` is its documented recipe, which rounds before it rounds down. All others are the official
    code: with stride 16 (Wan 2.1 and 2.2 I2V) an even number of latent rows and columns, rounded down; with
    stride 32 (TI2V-5B) the better of two candidates.
    """
    width, height = picture
    aspect = height / width
    if method == "diffusers":
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        return columns // stride * stride, rows // stride * stride
    if stride == 32:
        return _better_of_two(picture, area, stride)
    rows, columns = (int(math.sqrt(value) // 8 // 2 * 2) for value in (area * aspect, area / aspect))
    return columns * 8, rows * 8


def official_crop(first: Size, last: Size) -> Size | None:
    """Return how large a middle the official FLF2V code takes of a last picture; None if it takes all.

    If its size is not that of the first picture, the code means to scale it to cover the first, but crops it
    to the scaled size with width and height exchanged (wan/first_last_frame2video.py of Wan 2.1).
    """
    if last == first:
        return None
    scale = max(first[0] / last[0], first[1] / last[1])
    return round(last[1] * scale), round(last[0] * scale)


def default_fit(picture: Size, size: Size, method: Method, stride: int) -> Fit:
    """Return how a picture fits a size if the job does not say it.

    `official` crops, except if its rule of stride 16 gives this size for some area: such a picture is
    stretched, by less than a step. `diffusers` always stretches, `comfy` always crops.
    """
    if method == "diffusers":
        return "stretch"
    if method == "comfy" or stride == 32:
        return "crop"
    smallest, largest = _official_areas(picture, size, stride)
    return "stretch" if smallest < largest else "crop"


def official_area(picture: Size, size: Size) -> int:
    """Return an area for which the official rule of stride 16 gives a size that it gave for a picture."""
    return math.ceil(_official_areas(picture, size, 16)[0])


def _official_areas(picture: Size, size: Size, stride: int) -> tuple[float, float]:
    """Return between which areas the rule gives this size: it rounds down the roots of width and height."""
    aspect = picture[1] / picture[0]
    by_width, by_height = ((side**2, (side + stride) ** 2) for side in size)
    smallest = max(by_width[0] * aspect, by_height[0] / aspect)
    return smallest, min(by_width[1] * aspect, by_height[1] / aspect)


def _better_of_two(picture: Size, area: int, stride: int) -> Size:
    """Round down the width first or the height first, whichever keeps the aspect better."""
    ratio = picture[0] / picture[1]
    exact_width = (area * ratio) ** 0.5
    exact_height = area / exact_width
    width_1 = int(exact_width // stride * stride)
    height_2 = int(exact_height // stride * stride)
    if not width_1 or not height_2:
        return width_1, height_2
    size_1 = width_1, int(area / width_1 // stride * stride)
    size_2 = int(area / height_2 // stride * stride), height_2

    def error(size: Size) -> float:
        own = size[0] / size[1]
        return max(ratio / own, own / ratio)

    return size_1 if error(size_1) < error(size_2) else size_2
