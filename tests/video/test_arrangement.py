"""Videos arranged by the labels of a sweep, and the sheet that shows them so."""

from __future__ import annotations

import io
import itertools
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from plain_video import plain_video

from wancli.errors import JobError
from wancli.video import clip as clips
from wancli.video import contact_sheet, grid_sheet, mp4, side_by_side
from wancli.video.arrangement import Grid, arrange, find_axes, require_axes, split_grid

SEEDS, BLOCKS, STRENGTHS = (23, 7), ("late", "early", "middle"), (0.9, 0.4)


def sweep() -> dict[str, dict[str, Any]]:
    """The labels of a sweep of three axes and of its plain shots, by id, out of order."""
    made: dict[str, dict[str, Any]] = {
        f"{seed}-{blocks}-{strength}": {"seed": seed, "blocks": blocks, "strength": strength}
        for seed, blocks, strength in itertools.product(SEEDS, BLOCKS, STRENGTHS)
    }
    return made | {f"{seed}-plain": {"seed": seed} for seed in SEEDS}


def grid_of(labels: dict[str, dict[str, Any]], axes: list[str]) -> Grid:
    info = mp4.VideoInfo(9, Fraction(8), 64, 64)
    return arrange([clips.Clip(Path(f"{id}.mp4"), id, None, info) for id in labels], labels, axes)


def shown(grid: Grid) -> list[tuple[str, str, list[str]]]:
    return [(row.group, row.title, [clip.id if clip else "" for clip in row.clips]) for row in grid.rows]


def test_the_last_axis_goes_across_and_a_plain_video_begins_its_group() -> None:
    grid = grid_of(sweep(), ["seed", "blocks", "strength"])
    assert grid.columns == ("strength 0.4", "strength 0.9")
    assert shown(grid)[:4] == [
        ("seed 7", "without blocks", ["7-plain", ""]),
        ("seed 7", "early", ["7-early-0.4", "7-early-0.9"]),
        ("seed 7", "middle", ["7-middle-0.4", "7-middle-0.9"]),
        ("seed 7", "late", ["7-late-0.4", "7-late-0.9"]),
    ]
    assert [row.group for row in grid.rows[4:]] == ["seed 23"] * 4
    assert grid.titles[2] == "seed 7, early, strength 0.4"
    across = grid.with_groups_across
    assert across.columns[1:3] == ("seed 7, strength 0.9", "seed 23, strength 0.4")
    assert shown(across)[1] == ("", "early", ["7-early-0.4", "7-early-0.9", "23-early-0.4", "23-early-0.9"])


def test_with_two_axes_a_plain_video_has_a_column_and_further_videos_of_a_cell_have_rows_below() -> None:
    grid = grid_of(sweep(), ["seed", "blocks"])
    assert grid.columns == ("without blocks", "early", "middle", "late")
    assert shown(grid)[:2] == [
        ("", "seed 7", ["7-plain", "7-early-0.9", "7-middle-0.9", "7-late-0.9"]),
        ("", "seed 7", ["", "7-early-0.4", "7-middle-0.4", "7-late-0.4"]),
    ]


def test_with_one_axis_videos_stand_in_its_order() -> None:
    grid = grid_of({id: own for id, own in sweep().items() if "late" in id}, ["strength"])
    assert grid.columns == ("",)
    assert shown(grid)[0] == ("", "strength 0.4", ["23-late-0.4"])
    assert [row.title for row in grid.rows] == ["strength 0.4"] * 2 + ["strength 0.9"] * 2


def test_axes_are_labels_that_tell_videos_apart() -> None:
    assert find_axes([*sweep().values()]) == ["seed", "blocks", "strength"]
    zipped = [{"width": 64, "height": 64, "take": 1}, {"width": 96, "height": 32, "take": 1}]
    assert find_axes(zipped) == ["width"]
    assert find_axes([{}, {}]) == []
    assert find_axes([{"a": i, "b": i} for i in range(5)]) == ["a"]
    assert find_axes([{"a": i // 2, "b": i} for i in range(20)]) == []  # its grid would be mostly empty


def test_a_grid_is_divided_between_groups_if_these_fit() -> None:
    grid = grid_of(sweep(), ["seed", "blocks", "strength"])
    assert [{row.group for row in part.rows} for part in split_grid(grid, 8)] == [{"seed 7"}, {"seed 23"}]
    assert [len(part.clips) for part in split_grid(grid, 60)] == [14]
    small = split_grid(grid, 3)
    assert all(len(part.clips) <= 3 for part in small)
    assert [clip for part in small for clip in part.clips] == grid.clips


@pytest.mark.parametrize(
    ("axes", "message", "hint"),
    [
        (["sed"], "no video has the label 'sed'", "did you mean 'seed'?"),
        (["colour"], "no video has the label 'colour'", "labels: seed, blocks, strength"),
        (["seed", "seed"], "names an axis twice", ""),
    ],
)
def test_an_axis_that_no_video_has_is_refused(axes: list[str], message: str, hint: str) -> None:
    with pytest.raises(JobError) as caught:
        require_axes(axes, [*sweep().values()], "--by")
    assert (str(caught.value), caught.value.hint) == (f"--by: {message}", hint)


def test_sheet_and_video_show_a_video_where_its_labels_are(tmp_path: Path) -> None:
    colours = {"a": (200, 30, 30), "b": (30, 160, 30), "c": (30, 30, 200)}
    labels = {"a": {"x": 1, "y": 1}, "b": {"x": 2, "y": 1}, "c": {"x": 2, "y": 2}}
    made = clips.read_clips([plain_video(tmp_path / f"{id}.mp4", [colours[id]] * 2) for id in labels])
    grid = arrange(made, labels, ["y", "x"])
    sheet = Image.open(io.BytesIO(grid_sheet.draw_grid_sheet(grid, dict.fromkeys(labels, "note"))))
    found = [[_nearest(sheet, colours, row, column) for column in (0, 1)] for row in (0, 1)]
    assert found == [["a", "b"], ["", "c"]]
    side = tmp_path / "side.mp4"
    side_by_side.write(side, grid.clips, ["", "", ""], grid)
    layout = side_by_side.choose_layout(made, 1, 2, 4)
    frame = next(iter(mp4.read_frames(side)))
    picture = Image.frombytes("RGB", (frame.width, frame.height), frame.rgb)
    for id, cell in (("a", 0), ("b", 1), ("c", 3)):
        top, left = side_by_side.cell_origin(layout, cell)
        pixel: Any = picture.getpixel((left + 50, top + layout.label_height + 50))
        assert all(abs(a - b) <= 6 for a, b in zip(pixel, colours[id], strict=True))


def _nearest(sheet: Image.Image, colours: dict[str, Any], row: int, column: int) -> str:
    """The video whose colour is in a quarter of the sheet below its headings; `` for paper."""
    strip = 2 * 128 + contact_sheet.FRAME_GAP + contact_sheet.GAP
    x = contact_sheet.GAP + grid_sheet.SIDE + column * strip + 40
    height = sheet.height - (top := 2 * contact_sheet.GAP + 16)
    pixel: Any = sheet.convert("RGB").getpixel((x, top + row * height // 2 + 40))
    near = [
        id for id, rgb in colours.items() if max(abs(a - b) for a, b in zip(pixel, rgb, strict=True)) <= 6
    ]
    return near[0] if near else ""
