"""Pictures of every kind, made by Pillow, and files that are not pictures."""

from __future__ import annotations

import io
import itertools
import struct
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import damaged_copies
from PIL import Image, ImageOps

from wancli.errors import JobError, Unreadable
from wancli.pictures.read import Orient, inspect_picture, read_pixels

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def plain(mode: str = "RGB", colour: Any = RED, size: tuple[int, int] = (6, 4)) -> Image.Image:
    return Image.new(mode, size, colour)


def corner(path: Path, **options: Any) -> list[int]:
    pixels = read_pixels(path, options.get("orient", "ignore"), options.get("alpha", "drop"))
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    return [int(value) for value in pixels[0, 0]]


def problem(path: Path) -> JobError:
    with pytest.raises(JobError) as caught:
        inspect_picture(path, "exif", "white")
    with pytest.raises(JobError):
        read_pixels(path, "exif", "white")
    return caught.value


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif", "gif", "bmp", "tiff", "ppm", "jp2"])
def test_every_format_is_read_by_its_content_whatever_its_name(suffix: str, tmp_path: Path) -> None:
    made = save(tmp_path / f"a.{suffix}", plain(size=(32, 16)))
    renamed = made.rename(tmp_path / "a.wrong")
    assert inspect_picture(renamed, "exif", "drop").size == (32, 16)
    assert np.abs(np.array(corner(renamed)) - RED).max() < 12


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_a_picture_as_pillow_does_only_if_it_is_asked_to(
    orientation: int, suffix: str, tmp_path: Path
) -> None:
    image = Image.fromarray(np.arange(6 * 4 * 3, dtype=np.uint8).reshape(4, 6, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"turned.{suffix}", image, exif=exif)
    with Image.open(path) as stored:
        turned = np.asarray(ImageOps.exif_transpose(stored))
    assert (read_pixels(path, "exif", "drop") == turned).all()
    assert read_pixels(path, "ignore", "drop").shape == (4, 6, 3)
    upright = inspect_picture(path, "exif", "drop")
    assert (upright.size, upright.notes) == ((turned.shape[1], turned.shape[0]), ())
    stored_facts = inspect_picture(path, "ignore", "drop")
    assert stored_facts.size == (6, 4)
    assert ["EXIF orientation" in note for note in stored_facts.notes] == [True] * (orientation > 1)


@pytest.mark.parametrize("orient", ["exif", "ignore"])
def test_a_tiff_is_turned_once_as_everything_that_uses_pillow_sees_it(orient: Orient, tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(6 * 4 * 3, dtype=np.uint8).reshape(4, 6, 3))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = save(tmp_path / "turned.tiff", image, exif=exif)
        with Image.open(path) as stored:
            seen = np.asarray(ImageOps.exif_transpose(stored))
        assert (read_pixels(path, orient, "drop") == seen).all()
        facts = inspect_picture(path, orient, "drop")
        assert (facts.size, facts.notes) == ((seen.shape[1], seen.shape[0]), ())


def test_transparent_parts_are_dropped_or_filled(tmp_path: Path) -> None:
    half = save(tmp_path / "half.png", plain("RGBA", (*RED, 128)))
    assert corner(half) == [255, 0, 0]
    assert corner(half, alpha="white") == pytest.approx([255, 127, 127], abs=1)
    assert corner(half, alpha="black") == pytest.approx([128, 0, 0], abs=1)
    assert "alpha: white" in inspect_picture(half, "exif", "drop").notes[0]
    assert inspect_picture(half, "exif", "white").notes == ()
    opaque = save(tmp_path / "opaque.png", plain("RGBA", (*RED, 255)))
    assert inspect_picture(opaque, "exif", "drop").notes == ()


def test_grey_palette_cmyk_and_16_bits_become_rgb(tmp_path: Path) -> None:
    assert corner(save(tmp_path / "l.png", plain("L", 77))) == [77] * 3
    assert corner(save(tmp_path / "la.png", plain("LA", (77, 0))), alpha="white") == [255] * 3
    assert corner(save(tmp_path / "1.png", plain("1", 1))) == [255] * 3
    palette = plain().convert("P", palette=Image.Palette.ADAPTIVE)
    assert corner(save(tmp_path / "p.png", palette)) == [255, 0, 0]
    assert corner(save(tmp_path / "pt.png", palette, transparency=0), alpha="black") == [0, 0, 0]
    assert corner(save(tmp_path / "pb.png", palette, transparency=b"\x80"), alpha="black")[0] == 128
    cmyk = save(tmp_path / "cmyk.jpg", plain("CMYK", (0, 255, 255, 0), (16, 16)))
    assert np.abs(np.array(corner(cmyk)) - RED).max() < 12
    assert "CMYK" in inspect_picture(cmyk, "exif", "drop").notes[0]
    grey = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16) + 255
    for name in ("deep.png", "deep.tiff"):
        path = save(tmp_path / name, Image.fromarray(grey))
        assert (read_pixels(path, "exif", "drop")[..., 1] == np.arange(256).reshape(16, 16)).all()
    (tmp_path / "deep.ppm").write_bytes(b"P6\n1 1\n65535\n" + struct.pack(">3H", 65535, 0x1234, 0))
    assert corner(tmp_path / "deep.ppm") == pytest.approx([255, 0x12, 0], abs=1)


def test_of_a_moving_picture_or_of_pages_the_first_is_taken_with_a_word(tmp_path: Path) -> None:
    later = [plain(colour=GREEN), plain(colour=BLUE)]
    for name in ("a.gif", "a.png", "a.webp", "a.tiff"):
        path = save(tmp_path / name, plain(), save_all=True, append_images=later)
        assert np.abs(np.array(corner(path)) - RED).max() < 12
        assert "the first is taken" in inspect_picture(path, "exif", "drop").notes[0]
    phone = save(
        tmp_path / "phone.jpg", plain(size=(16, 16)), format="MPO", save_all=True, append_images=later
    )
    assert inspect_picture(phone, "exif", "drop").notes == ()


def test_a_digest_is_of_pixels_and_shape_not_of_the_file(tmp_path: Path) -> None:
    digests = [
        inspect_picture(save(tmp_path / name, image), "exif", "drop").sha256
        for name, image in (
            ("a.png", plain()),
            ("b.bmp", plain()),
            ("c.png", plain(size=(4, 6))),
            ("d.png", plain(colour=GREEN)),
        )
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        (b"", "is empty", "again"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC", "heif-convert"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "is a video", "ffmpeg -i"),
        (b"\x1aE\xdf\xa3\1\2\3", "is a video", "ffmpeg -i"),
        (b"%PDF-1.7\n", "is a PDF", "PNG"),
        (b"\n <SVG width='3'>", "is an SVG drawing", "PNG"),
        (b"<!DOCTYPE html><html>", "is a web page", "Download"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS", "git lfs pull"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "is a PostScript drawing", "PNG"),
        (b"a cat on a wall\n", "is not a picture", "PNG, JPEG"),
    ],
)
def test_another_file_is_named_with_a_way_out(
    content: bytes, message: str, hint: str, tmp_path: Path
) -> None:
    path = tmp_path / "cat.png"
    path.write_bytes(content)
    error = problem(path)
    assert message in error.message
    assert hint in error.hint


def test_missing_files_folders_and_devices_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path, Path("/dev/null")):
        for read in (inspect_picture, read_pixels):
            with pytest.raises(Unreadable, match="cannot be read"):
                read(path, "exif", "drop")


def test_32_bits_of_grey_are_refused(tmp_path: Path) -> None:
    assert "32 bits" in problem(save(tmp_path / "f.tiff", plain("F", 0.5))).message


def bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def test_a_picture_that_would_fill_the_memory_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(60_000, 60_000))
    assert "pixels" in problem(path).message
    path.write_bytes(bomb(10_000, 10_000))  # a camera's size; it is decoded, as far as it goes
    assert "damaged" in problem(path).message


def test_damaged_pictures_are_refused_and_never_crash(tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8))
    for name in ("PNG", "JPEG", "WEBP", "GIF", "TIFF"):
        file = io.BytesIO()
        noise.save(file, name)
        whole = file.getvalue()
        path.write_bytes(whole[: len(whole) // 2])
        assert "damaged" in problem(path).message, name
        for damaged in itertools.islice(damaged_copies(whole), 0, None, 401):
            path.write_bytes(damaged)
            with warnings.catch_warnings(), suppress(JobError):
                warnings.simplefilter("error")
                inspect_picture(path, "exif", "white")
