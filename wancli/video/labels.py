"""Draw lines of text for pictures of videos: in the font that Pillow carries, or in one of the system if that
has more of the letters. A letter of no font becomes its plain form or a question mark.

Letters: Y rows, X columns, 3 colours; pictures are uint8 [Y, X, 3]. A `scale` of 2 doubles the letters.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from wancli.errors import WancliError
from wancli.storage import disk

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.ImageFont import FreeTypeFont

LINE_HEIGHT = 16  # rows of a line at scale 1, with room for the tails of g and y
PAPER, INK = 250, 40
_FONT_SIZE = 13
_ELLIPSIS = "..."
_SYSTEM_FONTS = tuple(
    Path("/usr/share/fonts") / name
    for name in (
        "truetype/dejavu/DejaVuSans.ttf",
        "dejavu-sans-fonts/DejaVuSans.ttf",
        "TTF/DejaVuSans.ttf",
        "opentype/noto/NotoSansCJK-Regular.ttc",
        "google-noto-sans-cjk-fonts/NotoSansCJK-Regular.ttc",
        "noto-cjk/NotoSansCJK-Regular.ttc",
        "truetype/wqy/wqy-microhei.ttc",
    )
)
_NO_LETTER = "\U0010ffff"  # every font draws its sign for missing letters


def draw_line(text: str, width: int, scale: int = 1) -> NDArray[np.uint8]:
    """Draw a line of text at the left of a strip of `width` columns. What does not fit is cut off."""
    import numpy as np
    from PIL import Image, ImageDraw

    line = Image.new("L", (width, LINE_HEIGHT * scale), PAPER)
    letters, font = _typeset(text, scale)
    ImageDraw.Draw(line).text((0, 0), letters, fill=INK, font=font)
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
    most = width // scale  # no letter is narrower than a column
    if len(text) <= most and _measure(text, scale) <= width:
        return text
    fitting, too_many = 0, min(len(text), most) + 1
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        if _measure(cut(middle), scale) <= width:
            fitting = middle
        else:
            too_many = middle
    return cut(fitting)


def _measure(text: str, scale: int) -> float:
    letters, font = _typeset(text, scale)
    return font.getlength(letters)


def _typeset(text: str, scale: int) -> tuple[str, FreeTypeFont]:
    """Return the letters to draw, and the first font that has the most of them."""
    letters = "".join(letter if letter.isprintable() else " " for letter in text)
    distinct = {*letters}
    if all(map(str.isascii, distinct)):
        return letters, _built_in_font(scale)
    lacks = [(sum(not _has(font, letter) for letter in distinct), font) for font in _fonts(scale)]
    font = min(lacks, key=lambda pair: pair[0])[1]
    drawn = {letter: letter if _has(font, letter) else _plain_form(font, letter) for letter in distinct}
    return "".join(drawn[letter] for letter in letters), font


def _plain_form(font: FreeTypeFont, letter: str) -> str:
    """Return a letter without its accents, or a question mark if the font lacks that, too."""
    parts = unicodedata.normalize("NFKD", letter)
    plain = "".join(part for part in parts if not unicodedata.combining(part))
    return plain if plain and all(_has(font, part) for part in plain) else "?"


@lru_cache(maxsize=10_000)
def _has(font: FreeTypeFont, letter: str) -> bool:
    if letter.isascii():
        return True
    mask, missing = font.getmask(letter), font.getmask(_NO_LETTER)
    return (mask.size, bytes(mask)) != (missing.size, bytes(missing))


def _fonts(scale: int) -> Iterator[FreeTypeFont]:
    yield _built_in_font(scale)
    yield from _system_fonts(scale)


@lru_cache
def _built_in_font(scale: int) -> FreeTypeFont:
    from PIL import ImageFont

    font = ImageFont.load_default(_FONT_SIZE * scale)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


@lru_cache
def _system_fonts(scale: int) -> tuple[FreeTypeFont, ...]:
    """Load the known fonts that this system has; one that cannot be read is left out."""
    from PIL import ImageFont

    found = []
    for path in _SYSTEM_FONTS:
        with suppress(WancliError, OSError):  # OSError: FreeType does not know the file
            found.append(ImageFont.truetype(io.BytesIO(disk.read_bytes(path)), _FONT_SIZE * scale * 9 // 10))
    return tuple(found)
