"""Draw lines of text for pictures of videos, in the font that Pillow carries.

Letters: Y rows, X columns, 3 colours; pictures are uint8 [Y, X, 3]. A `scale` of 2 doubles the letters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.ImageFont import FreeTypeFont

LINE_HEIGHT = 12  # rows of a line at scale 1, with room for the tails of g and y
PAPER, INK = 250, 40
_FONT_SIZE = 10
_ELLIPSIS = "..."


def draw_line(text: str, width: int, scale: int = 1) -> NDArray[np.uint8]:
    """Draw a line of text at the left of a strip of `width` columns. What does not fit is cut off."""
    import numpy as np
    from PIL import Image, ImageDraw

    line = Image.new("L", (width, LINE_HEIGHT * scale), PAPER)
    ImageDraw.Draw(line).text((0, 0), _printable(text), fill=INK, font=_font(scale))
    return np.asarray(line)[..., None].repeat(3, axis=2)


def shorten_end(text: str, width: int, scale: int = 1) -> str:
    """Shorten a text to `width` columns by cutting its end."""
    return _shorten(text, width, scale, lambda kept: text[:kept] + _ELLIPSIS)


def shorten_middle(text: str, width: int, scale: int = 1) -> str:
    """Shorten a text to `width` columns by cutting its middle: the ids of a sweep differ at the end."""
    return _shorten(
        text,
        width,
        scale,
        lambda kept: text[: kept // 2] + _ELLIPSIS + text[len(text) - (kept - kept // 2) :],
    )


def _shorten(text: str, width: int, scale: int, cut: Callable[[int], str]) -> str:
    """Return the text, or `cut(letters)` of the most letters that fit."""
    font = _font(scale)
    most = width // scale  # no letter is narrower than a column
    if len(text) <= most and font.getlength(_printable(text)) <= width:
        return text
    fitting, too_many = 0, min(len(text), most) + 1
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        if font.getlength(_printable(cut(middle))) <= width:
            fitting = middle
        else:
            too_many = middle
    return cut(fitting)


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


@lru_cache
def _font(scale: int) -> FreeTypeFont:
    from PIL import ImageFont

    font = ImageFont.load_default(_FONT_SIZE * scale)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
