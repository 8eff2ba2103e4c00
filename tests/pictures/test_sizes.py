"""Sizes against those that the official code gave, and against its own words and those of diffusers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from wancli.pictures.sizes import default_fit, fit_to_area


@pytest.mark.parametrize(
    ("area", "stride", "size"),
    [
        (4096, 16, (64, 48)),
        (3072, 16, (64, 32)),
        (1700, 16, (48, 32)),
        (6144, 32, (96, 64)),
        (9216, 32, (128, 64)),  # decided by 3 parts in 10,000
        (4096, 32, (64, 64)),
    ],
)
def test_the_sizes_of_a_picture_of_157x111_are_those_of_the_official_code(
    area: int, stride: int, size: tuple[int, int]
) -> None:
    assert fit_to_area((157, 111), area, "official", stride) == size


def test_diffusers_recipe_rounds_first_which_can_be_one_step_more() -> None:
    assert fit_to_area((188, 156), 480 * 832, "official", 16) == (688, 560)
    assert fit_to_area((188, 156), 480 * 832, "diffusers", 16) == (688, 576)


@pytest.mark.parametrize("stride", [16, 32])
@pytest.mark.parametrize("area", [832 * 480, 1280 * 720, 704 * 1280])
def test_sizes_are_multiples_below_the_area_and_near_the_aspect(area: int, stride: int) -> None:
    for width, height in itertools.product((100, 481, 1080, 3024, 4032), repeat=2):
        columns, rows = fit_to_area((width, height), area, "official", stride)
        assert columns % stride == rows % stride == 0
        assert 0 < columns * rows <= area
        assert abs(np.log(columns / rows) - np.log(width / height)) < 2.2 * stride / min(columns, rows)


def test_a_picture_of_exactly_the_area_loses_a_step_to_rounding_as_in_the_official_code() -> None:
    assert float(np.sqrt(832 * 480 * (480 / 832))) < 480
    assert fit_to_area((832, 480), 832 * 480, "official", 16) == (832, 464)
    assert fit_to_area((832, 480), 832 * 480, "diffusers", 16) == (832, 480)
    assert fit_to_area((1280, 720), 1280 * 720, "official", 16) == (1280, 720)
    assert fit_to_area((1280, 704), 1280 * 704, "official", 32) == (1280, 704)


def test_a_size_that_the_official_code_gives_for_some_area_is_stretched_and_every_other_is_cropped() -> None:
    given = {fit_to_area((157, 111), area, "official", 16) for area in range(300, 40_000)}
    for width, height in itertools.product(range(16, 192, 16), repeat=2):
        fit = default_fit((157, 111), (width, height), "official", 16)
        assert (fit == "stretch") == ((width, height) in given), (width, height)
        assert default_fit((157, 111), (width, height), "official", 32) == "crop"
        assert default_fit((157, 111), (width, height), "diffusers", 16) == "stretch"
        assert default_fit((157, 111), (width, height), "comfy", 16) == "crop"
