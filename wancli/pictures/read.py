"""Read a picture file: its pixels as 8-bit RGB, their digest, what a user should know about it.

Pillow reads the formats. Colour profiles are not applied, as in the official code.
Letters: Y rows, X columns.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from wancli.errors import JobError
from wancli.storage import disk

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image as PillowImage

    Pixels: TypeAlias = NDArray[np.uint8]  # [Y, X, 3]

Orient = Literal["exif", "ignore"]
Alpha = Literal["drop", "white", "black"]

# Other formats are not tried: that of EPS, for example, would start Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
_NAMES = "PNG, JPEG, WebP, AVIF, GIF, BMP, TIFF, PPM and JPEG 2000"
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = 1
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_CONVERT = "Convert it to PNG, for example with ImageMagick: magick IN OUT.png"
# How a file that is not a picture begins, what it is, and a way out.
_OTHER_FILES = (
    (b"\x1aE\xdf\xa3", "is a video", "Take a frame: ffmpeg -i VIDEO -frames:v 1 OUT.png"),
    (b"%PDF", "is a PDF", _CONVERT),
    (b"8BPS", "is a Photoshop document", "Export it as PNG."),
    (b"%!PS", "is a PostScript drawing", _CONVERT),
    (b"<svg", "is an SVG drawing", "Export it as PNG."),
    (b"<?xml", "is an XML file", "Export the drawing as PNG."),
    (b"<!doctype", "is a web page", "Download the picture itself."),
    (b"<html", "is a web page", "Download the picture itself."),
    (b"version https://git-lfs", "is a pointer of Git LFS", "Fetch the picture: git lfs pull"),
)  # fmt: skip


@dataclass(frozen=True)
class PictureFacts:
    """A picture that was decoded once: its size, the SHA-256 of its pixels, and notes for the user."""

    size: tuple[int, int]  # width and height, upright
    sha256: str
    notes: tuple[str, ...]


def read_pixels(path: Path, orient: Orient, alpha: Alpha) -> Pixels:
    """Decode a picture, of several frames or pages the first. Raises JobError and Unreadable.

    `orient: exif` turns it as its EXIF orientation says. Transparent pixels keep their hidden colours with
    `alpha: drop`, else they are laid over white or black. Of 16 bits the upper 8 are kept.
    """
    with _open(path) as image:
        return _decode(image, orient, alpha)


def inspect_picture(path: Path, orient: Orient, alpha: Alpha) -> PictureFacts:
    """Decode a picture for its digest, and note which choices change its look.

    Raises JobError if it is not a picture, and Unreadable.
    """
    notes = []
    with _open(path) as image:
        if orient == "ignore" and _orientation(image) > _UPRIGHT:
            notes.append(
                "its EXIF orientation is ignored, so it lies or is mirrored; `orient: exif` turns it"
            )
        if image.format != "MPO" and getattr(image, "is_animated", False):
            notes.append("it has several frames or pages; the first is taken")
        if image.mode == "CMYK":
            notes.append("its CMYK colours become RGB without a colour profile")
        if alpha == "drop" and _is_translucent(image):
            notes.append("its transparent parts show hidden colours; `alpha: white` or `black` fills them")
        pixels_YX3 = _decode(image, orient, alpha)
        height, width, _ = pixels_YX3.shape
        return PictureFacts((width, height), digest_pixels(pixels_YX3), tuple(notes))


def digest_pixels(rgb_YX3: Pixels) -> str:
    """Return the SHA-256 of a picture's size and pixels, as hex."""
    height, width, _ = rgb_YX3.shape
    digest = hashlib.sha256(f"{width}x{height}\n".encode())
    digest.update(rgb_YX3.tobytes())
    return digest.hexdigest()


@contextmanager
def _open(path: Path) -> Iterator[PillowImage]:
    """Open a picture. Every error of Pillow, also of a later decoding in the block, becomes a JobError."""
    from PIL import Image, UnidentifiedImageError

    with disk.opened(path) as file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of damaged EXIF, and of sizes that are allowed
                with Image.open(file, formats=_FORMATS) as image:
                    yield image
        except (JobError, MemoryError):
            raise
        except UnidentifiedImageError:
            file.seek(0)
            raise _describe_other_file(file.read(64)) from None
        except Image.DecompressionBombError:
            limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
            hint = "Make it smaller; a video frame has 1 million."
            raise JobError(f"has more than {limit:,} pixels", hint=hint) from None
        except Exception as error:  # decoders raise errors of many types for damaged files
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the disk
            hint = "Copy it again, or save it again as PNG."
            raise JobError(f"is a damaged picture: {error}", hint=hint) from None


def _describe_other_file(start: bytes) -> JobError:
    """Say what a file is that Pillow does not know, by its first bytes."""
    if not start:
        return JobError("is empty", hint="Copy the picture again.")
    if start[4:8] == b"ftyp":
        if start[8:12] in _HEIC_BRANDS:
            hint = "Convert it: heif-convert IN.heic OUT.png; or let the phone take pictures as JPEG."
            return JobError("is a HEIC picture, which Pillow does not read", hint=hint)
        return JobError("is a video", hint="Take a frame: ffmpeg -i VIDEO -frames:v 1 OUT.png")
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for begin, message, hint in _OTHER_FILES:
        if start.startswith(begin) or text.startswith(begin.lower()):
            return JobError(message, hint=hint)
    return JobError("is not a picture, or a damaged one", hint=f"wancli reads {_NAMES}.")


def _orientation(image: PillowImage) -> int:
    """Return the EXIF orientation that is still to be applied, 1 to 8.

    Of a PNG only what stands before its pixels is read. A TIFF is turned by Pillow itself.
    """
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return _UPRIGHT
    value = image.getexif().get(_ORIENTATION)
    return value if isinstance(value, int) and 1 <= value <= 8 else _UPRIGHT


def _decode(image: PillowImage, orient: Orient, alpha: Alpha) -> Pixels:
    import numpy as np
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn = turns.get(_orientation(image)) if orient == "exif" else None
    rgb = _to_rgb(image, alpha)
    return np.asarray(rgb if turn is None else rgb.transpose(turn))


def _is_translucent(image: PillowImage) -> bool:
    if not image.has_transparency_data:
        return False
    low, _ = image.convert("RGBA").getchannel("A").getextrema()
    return isinstance(low, int | float) and low < 255


def _to_rgb(image: PillowImage, alpha: Alpha) -> PillowImage:
    import numpy as np
    from PIL import Image

    if image.mode in ("I", "F"):
        raise JobError(f"has {image.mode} pixels: 32 bits of grey", hint="Save it with 8 or 16 bits.")
    if image.mode.startswith("I;16"):  # convert() would cut off all values above 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    if alpha == "drop":
        return rgba.convert("RGB")
    page = Image.new("RGBA", rgba.size, alpha)
    page.alpha_composite(rgba)
    return page.convert("RGB")
