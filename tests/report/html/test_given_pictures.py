"""The pictures of a video on its page: as they are, and as the model saw them."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pages
import pytest
from PIL import Image

from wancli.pictures.read import digest_pixels, read_pixels
from wancli.report.html import given_pictures, page
from wancli.report.html.collect import ReportInputs


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, quick: Path) -> Path:
    return pages.render(tmp_path_factory.mktemp("pages"), quick, items=[{"id": "plain"}])


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """The left half is red, the right half blue."""
    pixels = np.zeros((64, 192, 3), np.uint8)
    pixels[:, :96, 0] = pixels[:, 96:, 2] = 255
    path = tmp_path / "half & half.png"
    Image.fromarray(pixels).save(path)
    return path


def inputs(out: Path, picture: Path, **changes: Any) -> ReportInputs:
    """The shot of `out` as if it began with a picture."""
    pixels = read_pixels(picture, "ignore", "drop")
    height, width, _ = pixels.shape
    first = {
        "role": "first", "path": str(picture), "sha256": digest_pixels(pixels), "width": width,
        "height": height, "preprocess": "official", "fit": "crop", "orient": "ignore", "alpha": "drop",
        "cached": False,
    } | changes  # fmt: skip
    last = first | {"role": "last", "fit": "pad"}
    entry = pages.entries(out, "plain") | {"pictures": [first, last]}
    return ReportInputs("job", [("job", pages.typed(entry))] * 2)


def pictures_of(found: ReportInputs, out: Path, kept: Path) -> list[dict[str, Any]]:
    document = pages.Page(page.render_page(found, out / "x.html", kept, make=False)).document
    assert [shot["pictures"] for shot in document["shots"]] == [[0, 1]] * 2  # stored once
    pictures: list[dict[str, Any]] = document["pictures"]
    return pictures


def pixels_of(uri: str) -> np.ndarray:
    head, _, data = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_a_page_shows_each_picture_and_the_frame_that_the_model_saw(
    out: Path, picture: Path, tmp_path: Path
) -> None:
    first, last = pictures_of(inputs(out, picture), out, tmp_path / "kept")
    assert [one["role"] for one in (first, last)] == ["first", "last"]
    assert (first["name"], first["size"], first["how"]) == (picture.name, [192, 64], "crop as official")
    assert pixels_of(first["picture"]).shape == (64, 192, 3)
    cropped, padded = pixels_of(first["frame"]), pixels_of(last["frame"])
    assert cropped.shape == padded.shape == (64, 64, 3)
    assert cropped[32, 8] == pytest.approx([255, 0, 0], abs=12)
    assert cropped[32, 56] == pytest.approx([0, 0, 255], abs=12)
    assert padded[4, 32] == pytest.approx([128, 128, 128], abs=3)
    assert padded[32, 8] == pytest.approx([255, 0, 0], abs=12)


def test_small_copies_are_made_once(
    out: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = inputs(out, picture)
    made = pictures_of(found, out, tmp_path / "kept")
    monkeypatch.setattr(given_pictures, "read_pixels", lambda *_: pytest.fail("read again"))
    assert pictures_of(found, out, tmp_path / "kept") == made


def test_another_picture_of_that_name_is_not_shown(out: Path, picture: Path, tmp_path: Path) -> None:
    found = inputs(out, picture)
    Image.new("RGB", (192, 64)).save(picture)
    for _ in range(2):
        for one in pictures_of(found, out, tmp_path / "kept"):
            assert (one["name"], one["picture"], one["frame"]) == (picture.name, None, None)
        picture.unlink(missing_ok=True)


def test_a_frame_of_another_shot_is_named_by_it(out: Path, picture: Path, tmp_path: Path) -> None:
    found = inputs(out, picture, path=str(out / "a.frame4.png"), link={"shot": "a", "frame": 4})
    first, _ = pictures_of(found, out, tmp_path / "kept")
    assert (first["name"], first["picture"]) == ("frame 4 of shot a", None)
