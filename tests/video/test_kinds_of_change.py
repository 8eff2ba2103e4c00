"""What changed between two videos, on videos in which only one thing does."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from wancli.video.kinds_of_change import measure_kinds


def video(background: int = 60, speed: int = 1, texture: int = 0) -> NDArray[np.uint8]:
    """Six frames [T, Y, X, 3] of a bright square of 8x8 that moves to the right over a plain wall."""
    frames = np.full((6, 48, 64, 3), background, np.uint8)
    frames[:, ::2] += np.uint8(texture)
    for t in range(6):
        left = 8 + speed * t
        frames[t, 20:28, left : left + 8] = 200
    return frames


def test_the_same_video_changes_in_nothing() -> None:
    plain = video()
    assert set(measure_kinds(lambda: plain, lambda: plain).values()) == {0.0}


def test_another_wall_is_background_and_colour_and_no_motion_of_its_own() -> None:
    plain, other = video(), video(background=90)
    found = measure_kinds(lambda: plain, lambda: other)
    still, of_the_square = 48 * 64 - 10 * 8, 3 * 8  # its inner columns are bright in every frame
    assert found["background"] == pytest.approx(30 / 255 * (1 - of_the_square / still))
    square = 64 / (48 * 64)  # of a frame, which stays
    assert found["colour"] == pytest.approx(30 / 255 * (1 - square))
    assert found["motion"] < found["background"] / 50


def test_a_faster_square_is_motion_and_leaves_the_wall() -> None:
    plain, other = video(), video(speed=4)
    found = measure_kinds(lambda: plain, lambda: other)
    # A step of n pixels changes n columns before and n behind the square.
    assert found["motion"] == pytest.approx((4 - 1) * 2 * 8 * 140 / 255 / (48 * 64), rel=1e-3)
    assert found["colour"] == pytest.approx(0, abs=1e-6)


def test_a_texture_is_structure() -> None:
    plain, striped, tinted = video(), video(texture=30), video(background=75)
    stripes = measure_kinds(lambda: plain, lambda: striped)
    tint = measure_kinds(lambda: plain, lambda: tinted)
    assert stripes["structure"] > 0.5 > 10 * tint["structure"]
    assert stripes["colour"] == pytest.approx(tint["colour"], rel=0.01)


def test_a_single_small_frame_has_neither_motion_nor_structure() -> None:
    plain, other = video()[:1, :8, :8], video(background=90)[:1, :8, :8]
    found = measure_kinds(lambda: plain, lambda: other)
    assert (found["motion"], found["structure"]) == (0.0, 0.0)
    assert found["background"] == pytest.approx(30 / 255)
