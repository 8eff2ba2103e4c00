"""The contact sheet, read back by Pillow."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jobs import run_wancli
from PIL import Image
from plain_video import plain_video as clip

from wancli.storage.prompt_schema import LinkRecord, PictureRecord
from wancli.video import clip as clips
from wancli.video import contact_sheet, labels


def test_a_row_shows_first_to_last_frame_and_the_name_above(tmp_path: Path) -> None:
    colours = [(20 * i, 60, 200 - 20 * i) for i in range(9)]
    made = [clip(tmp_path / "one.mp4", colours), clip(tmp_path / "two.mp4", colours)]
    data = contact_sheet.draw_contact_sheet(clips.read_clips(made), ["", ""])
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    cell = 2 * 64  # as often as it fits into 160
    assert picture.width == 5 * cell + 4 * contact_sheet.FRAME_GAP + 2 * contact_sheet.GAP
    line = labels.LINE_HEIGHT + contact_sheet.CAPTION_GAP
    assert picture.height == 2 * (line + 2 * 48) + 3 * contact_sheet.GAP
    row = contact_sheet.GAP + line + 48
    for place, index in enumerate((0, 2, 4, 6, 8)):
        left = contact_sheet.GAP + place * (cell + contact_sheet.FRAME_GAP)
        found = picture.getpixel((left + cell // 2, row))
        assert isinstance(found, tuple)
        assert all(abs(a - b) <= 4 for a, b in zip(found, colours[index], strict=True))
    name = picture.crop(
        (
            contact_sheet.GAP,
            contact_sheet.GAP,
            contact_sheet.GAP + 20,
            contact_sheet.GAP + labels.LINE_HEIGHT,
        )
    )
    shades = [pixel[0] for pixel in name.get_flattened_data()]
    assert max(shades) == labels.PAPER
    assert min(shades) < 100


def test_the_lines_above_a_video_name_the_pictures_that_it_was_made_from(tmp_path: Path) -> None:
    shared = {
        "sha256": "", "width": 8, "height": 8, "preprocess": "official", "orient": "ignore", "alpha": "drop",
        "cached": False, "fit": "crop",
    }  # fmt: skip
    first = PictureRecord.model_validate(shared | {"role": "first", "path": "/photos/cat.png"})
    last = first.model_copy(update={"role": "last", "link": LinkRecord(shot="a", frame=4)})
    body: Any = SimpleNamespace(
        prompt_text="It yawns | It sleeps", pictures=[first, last], injection=[], injected=[]
    )
    info = clips.read_clips([clip(tmp_path / "one.mp4", [(1, 2, 3)])])[0].info
    made = clips.Clip(tmp_path / "one.mp4", "one", body, info)
    assert [*contact_sheet._caption_lines(made, "note")] == [
        "one: It yawns | It sleeps", "  from cat.png and frame 4 of shot a", "  note",
    ]  # fmt: skip


def test_large_frames_are_averaged_down(tmp_path: Path) -> None:
    path = clip(tmp_path / "large.mp4", [(250, 10, 10)], width=832, height=480)
    picture = Image.open(
        io.BytesIO(contact_sheet.draw_contact_sheet(clips.read_clips([path]), [""]))
    ).convert("RGB")
    assert picture.width <= contact_sheet.MAX_CELL_WIDTH + 2 * contact_sheet.GAP


def test_many_videos_form_columns_so_that_the_sheet_is_about_square(tmp_path: Path) -> None:
    one = clips.read_clips([clip(tmp_path / "one.mp4", [(0, 0, 0)] * 5)])
    notes = ["", *["figures"] * 59]  # the columns are not of one height
    picture = Image.open(io.BytesIO(contact_sheet.draw_contact_sheet(one * 60, notes)))
    assert 2 / 3 < picture.width / picture.height < 3 / 2
    assert max(picture.size) < 4000


@pytest.mark.parametrize("size", [(832, 2), (4, 480), (1, 1), (161, 3)])
def test_odd_sizes_are_shown(size: tuple[int, int]) -> None:
    import numpy as np

    width, height = size
    picture = np.zeros((height, width, 3), np.uint8)
    assert 1 <= contact_sheet._fit_to_cell(picture).shape[1] <= contact_sheet.MAX_CELL_WIDTH


def test_metrics_are_under_the_name_and_a_long_name_is_cut(tmp_path: Path) -> None:
    (one,) = clips.read_clips([clip(tmp_path / f"{'n' * 200}.mp4", [(0, 0, 0)])])
    bare = Image.open(io.BytesIO(contact_sheet.draw_contact_sheet([one], [""])))
    noted = Image.open(io.BytesIO(contact_sheet.draw_contact_sheet([one], ["SSIM 0.5"])))
    assert noted.height == bare.height + labels.LINE_HEIGHT + contact_sheet.CAPTION_GAP
    assert noted.width == bare.width


def test_an_earlier_sheet_is_replaced_and_another_picture_is_moved_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = clip(tmp_path / "one.mp4", [(0, 0, 0)])
    output = tmp_path / "sheet.png"
    output.write_bytes(b"a picture of mine")
    for _ in range(2):
        result = run_wancli(capsys, "compare", one, "-o", output)
        assert (result.code, result.out.strip()) == (0, str(output))
    assert (tmp_path / "sheet.old-1.png").read_bytes() == b"a picture of mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.mp4", "sheet.old-1.png", "sheet.png"]


def test_a_file_that_is_not_a_video_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.mp4").write_text("no video")
    result = run_wancli(capsys, "compare", tmp_path / "bad.mp4", "-o", tmp_path / "sheet.png")
    assert result.code == 2
    assert result.err.startswith(f"wancli: {tmp_path}/bad.mp4: is not an MP4\n")
    assert not (tmp_path / "sheet.png").exists()


def test_a_missing_video_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_wancli(capsys, "compare", tmp_path / "nope.mp4", "-o", tmp_path / "sheet.png")
    assert (result.code, result.err) == (2, f"wancli: {tmp_path}/nope.mp4: no such file\n")
