"""The size of a video from the aspect of its picture, as the official code and diffusers' recipe find it.

Sizes are (width, height) in pixels. Pure arithmetic, without torch.
"""

from __future__ import annotations

import math

Size = tuple[int, int]


def fit_to_area(picture: Size, area: int, stride: int) -> Size:
    """Return the size that the official code gives a picture: about `area` pixels, in multiples of `stride`.

    16: Wan 2.1 and 2.2 I2V, by rounding down to an even number of latent rows and columns. 32: TI2V-5B, by
    the better of two candidates. A side may be 0 if the picture is very narrow.
    """
    return _best_of_two(picture, area, stride) if stride == 32 else _round_down(picture, area)


def fit_to_area_by_recipe(picture: Size, area: int, stride: int) -> Size:
    """Return the size of diffusers' documented recipe, which rounds before it rounds down."""
    width, height = picture
    aspect = height / width
    rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    return columns // stride * stride, rows // stride * stride


def _round_down(picture: Size, area: int) -> Size:
    width, height = picture
    aspect = height / width
    rows = int(math.sqrt(area * aspect) // 8 // 2 * 2)
    columns = int(math.sqrt(area / aspect) // 8 // 2 * 2)
    return columns * 8, rows * 8


def _best_of_two(picture: Size, area: int, stride: int) -> Size:
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
