"""Videos side by side, decoded again by ffmpeg."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_video import plain_video as plain

from wancli.errors import OutputExists
from wancli.video import clip, labels, mp4, side_by_side

RED, GREEN, BLUE, GREY = (200, 30, 30), (30, 160, 30), (30, 30, 200), (128, 128, 128)


def made(path: Path, videos: list[Path], notes: list[str] | None = None) -> list[Any]:
    clips = clip.read_clips(videos)
    side_by_side.write(path, clips, notes or [""] * len(clips))
    return [
        np.frombuffer(frame.rgb, np.uint8).reshape(frame.height, frame.width, 3)
        for frame in mp4.read_frames(path)
    ]


def shown(
    frame_YX3: Any, plan: side_by_side.Layout, place: int, *, row: float = 0.5, column: float = 0.5
) -> Any:
    top, left = side_by_side.cell_origin(plan, place)
    y = top + plan.label_height + int(row * (plan.cell_height - 1))
    return frame_YX3[y, left + int(column * (plan.cell_width - 1))].astype(int)


def near(pixel: Any, colour: tuple[int, int, int]) -> bool:
    return bool(np.abs(pixel - np.array(colour)).max() <= 6)


def test_every_cell_shows_its_own_frame_unchanged_in_brightness(tmp_path: Path) -> None:
    a = plain(tmp_path / "a.mp4", [(20, 20, 20), RED, GREY])
    b = plain(tmp_path / "b.mp4", [(240, 240, 240), GREEN, BLUE])
    frames = made(tmp_path / "side.mp4", [a, b])
    plan = side_by_side.choose_layout(clip.read_clips([a, b]), label_lines=1)
    assert (plan.columns, plan.rows) == (2, 1)
    assert plan.upscale_factor == 320 // 64
    colours = [((20, 20, 20), (240, 240, 240)), (RED, GREEN), (GREY, BLUE)]
    assert len(frames) == 3
    for frame, (left, right) in zip(frames, colours, strict=True):
        assert near(shown(frame, plan, 0), left)
        assert near(shown(frame, plan, 1), right)


def test_a_shorter_video_holds_its_last_frame(tmp_path: Path) -> None:
    long = plain(tmp_path / "long.mp4", [GREY, GREY, GREY, RED])
    short = plain(tmp_path / "short.mp4", [GREEN, BLUE])
    frames = made(tmp_path / "side.mp4", [long, short])
    plan = side_by_side.choose_layout(clip.read_clips([long, short]), label_lines=1)
    assert len(frames) == 4
    assert [near(shown(frame, plan, 1), BLUE) for frame in frames] == [False, True, True, True]
    assert near(shown(frames[3], plan, 0), RED)


def test_a_smaller_video_is_letterboxed_and_not_scaled(tmp_path: Path) -> None:
    large = plain(tmp_path / "large.mp4", [RED], width=320, height=192)
    small = plain(tmp_path / "small.mp4", [GREEN], width=160, height=96)
    (frame,) = made(tmp_path / "side.mp4", [large, small])
    plan = side_by_side.choose_layout(clip.read_clips([large, small]), label_lines=1)
    assert (plan.cell_width, plan.cell_height, plan.upscale_factor, plan.downscale_factor) == (320, 192, 1, 1)
    assert near(shown(frame, plan, 1), GREEN)
    for row, column in ((0.5, 0.1), (0.1, 0.5), (0.9, 0.9)):
        assert near(shown(frame, plan, 1, row=row, column=column), (0, 0, 0))
    assert near(shown(frame, plan, 1, row=0.3, column=0.3), GREEN)


SMALL: dict[str, Any] = {"width": 64, "height": 48, "crf": 1, "codec": "h264", "comment": ""}


def test_videos_of_other_speeds_run_in_time(tmp_path: Path) -> None:
    def at(fps: int, colours: list[Any]) -> Path:
        frames = [bytes(colour) * (64 * 48) for colour in colours]
        return mp4.write_mp4(frames, tmp_path / f"{fps}.mp4", fps=fps, frame_count=len(colours), **SMALL)

    slow, fast = at(8, [RED, GREEN]), at(16, [GREY, RED, GREEN, BLUE])
    frames = made(tmp_path / "side.mp4", [slow, fast])
    plan = side_by_side.choose_layout(clip.read_clips([slow, fast]), label_lines=1)
    assert mp4.read_info(tmp_path / "side.mp4").fps == 16
    assert [near(shown(frame, plan, 0), RED) for frame in frames] == [True, True, False, False]
    assert [near(shown(frame, plan, 1), GREEN) for frame in frames] == [False, False, True, False]


def test_the_frame_rates_of_film_and_television_are_kept_exactly(tmp_path: Path) -> None:
    film, half = (
        mp4.write_mp4([bytes(RED) * (64 * 48)] * 8, tmp_path / name, fps=fps, frame_count=8, **SMALL)
        for name, fps in (("film.mp4", "24000/1001"), ("half.mp4", "12000/1001"))
    )
    frames = made(tmp_path / "side.mp4", [film, half])
    assert mp4.read_info(tmp_path / "side.mp4").fps == Fraction(24000, 1001)
    assert len(frames) == 16  # twice the 8 frames of the slower one, and not one more


def test_names_and_metrics_are_drawn_above_the_cells(tmp_path: Path) -> None:
    one = plain(tmp_path / "one.mp4", [GREY])
    clips = clip.read_clips([one])
    plan = side_by_side.choose_layout(clips, label_lines=2)
    page = side_by_side.draw_empty_grid(plan, ["one"], ["SSIM 0.5"])
    top, left = side_by_side.cell_origin(plan, 0)
    for line, words in enumerate(["one", "SSIM 0.5"]):
        wanted = labels.draw_line(words, plan.cell_width, plan.letter_scale)
        there = page[top + line * len(wanted) :, left:][: len(wanted), : plan.cell_width]
        assert (there == wanted).all()
        assert there.min() < 100


@pytest.mark.parametrize(
    ("size", "count", "columns"),
    [((832, 480), 2, 2), ((832, 480), 9, 3), ((480, 832), 3, 3), ((64, 64), 16, 6), ((1280, 720), 16, 4)],
)
def test_the_grid_is_near_16_to_9_and_no_larger_than_4k(
    size: tuple[int, int], count: int, columns: int
) -> None:
    one = clip.Clip(Path("x.mp4"), "x", None, mp4.VideoInfo(81, 16, *size))
    plan = side_by_side.choose_layout([one] * count, label_lines=2)
    assert plan.columns == columns
    assert plan.columns * plan.rows >= count
    width, height = plan.grid_size
    assert width <= 3840
    assert height <= 2160
    assert width % 2 == height % 2 == 0


def test_many_large_videos_are_averaged_down(tmp_path: Path) -> None:
    halves = np.zeros((720, 1280, 3), np.uint8)
    halves[:, ::2] = 200  # columns, which become their mean
    path = tmp_path / "large.mp4"
    mp4.write_mp4(
        [halves.tobytes()],
        path,
        width=1280,
        height=720,
        fps=8,
        frame_count=1,
        crf=1,
        codec="h264",
        comment="",
    )
    clips = clip.read_clips([path]) * 9
    side_by_side.write(tmp_path / "side.mp4", clips, [""] * 9)
    plan = side_by_side.choose_layout(clips, label_lines=1)
    (frame,) = mp4.read_frames(tmp_path / "side.mp4")
    picture = np.frombuffer(frame.rgb, np.uint8).reshape(frame.height, frame.width, 3)
    assert plan.downscale_factor == 2
    assert near(shown(picture, plan, 4), (100, 100, 100))


def test_an_earlier_grid_is_replaced_and_another_video_is_moved_aside(tmp_path: Path) -> None:
    one = plain(tmp_path / "one.mp4", [RED])
    target = tmp_path / "side.mp4"
    before = plain(target, [GREEN]).read_bytes()
    made(target, [one])
    made(target, [one], ["another note"])
    assert (tmp_path / "side.old-1.mp4").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.mp4", "side.mp4", "side.old-1.mp4"]


def test_a_shot_whose_id_is_our_mark_is_not_taken_for_ours(tmp_path: Path) -> None:
    size: dict[str, Any] = {"width": 64, "height": 48, "fps": 8, "frame_count": 1, "crf": 1, "codec": "h264"}
    target = tmp_path / "side.mp4"
    mp4.write_mp4(
        [bytes(64 * 48 * 3)], target, **size, comment=f"wancli {side_by_side.COMMENT} 0123456789abcdef"
    )
    made(target, [plain(tmp_path / "one.mp4", [RED])])
    assert (tmp_path / "side.old-1.mp4").exists()


def test_a_folder_of_that_name_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "side.mp4").mkdir()
    with pytest.raises(OutputExists, match="a folder"):
        made(tmp_path / "side.mp4", [plain(tmp_path / "one.mp4", [RED])])


def test_a_grid_never_has_all_its_frames_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead: list[int] = []
    sent: list[int] = []
    real = mp4.read_frames

    def counted(path: Path) -> Any:
        for frame in real(path):
            ahead.append(1)
            assert len(ahead) <= 2 * (len(sent) + 1)
            yield frame

    write = mp4.Mp4Encoder.write
    clips = clip.read_clips([plain(tmp_path / f"{name}.mp4", [RED] * 12) for name in "ab"])
    monkeypatch.setattr(mp4.Mp4Encoder, "write", lambda self, data: sent.append(1) or write(self, data))
    monkeypatch.setattr(mp4, "read_frames", counted)
    side_by_side.write(tmp_path / "side.mp4", clips, ["", ""])
    assert len(sent) == 12
