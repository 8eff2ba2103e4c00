"""What a rule may write for blocks, steps and strengths, and the numbers it means."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wancli.injection.selectors import Curve, pair_strengths, parse_blocks, parse_steps
from wancli.sampling.solvers import build_sigma_schedule


@pytest.mark.parametrize(
    ("spec", "depth", "expected"),
    [
        ("27-39", 40, range(27, 40)),
        ("0-39:4", 40, range(0, 40, 4)),
        ("7", 40, [7]),
        (7, 40, [7]),
        ("early", 40, range(14)),
        ("middle", 40, range(14, 27)),
        ("late", 40, range(27, 40)),
        ("early", 30, range(10)),
        ("middle", 30, range(10, 20)),
        ("late", 30, range(20, 30)),
        ("first_half", 40, range(20)),
        ("second_half", 30, range(15, 30)),
        ("alternating", 6, [0, 2, 4]),
        ("sparse", 9, [0, 4, 8]),
        ("all", 3, [0, 1, 2]),
        (["late", 3, "0-1", 3], 6, [4, 5, 3, 0, 1]),
    ],
)
def test_block_sets_select_their_blocks(spec: object, depth: int, expected: object) -> None:
    assert parse_blocks(spec, depth) == tuple(expected)  # type: ignore[arg-type, call-overload]


@given(st.integers(1, 200))
def test_thirds_tile_any_depth(depth: int) -> None:
    parts = [block for name in ("early", "middle", "late") for block in parse_blocks(name, depth)]
    assert parts == list(range(depth))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("27-40", "40 is past the last block (39)"),
        ("9-3", "empty"),
        ("0-9:0", "empty"),
        ("lat", "is not a block set"),
        ("-3", "is not a block set"),
        ("", "is not a block set"),
        (["early", "41"], "41 is past"),
    ],
)
def test_an_invalid_block_set_is_refused(spec: object, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        parse_blocks(spec, 40)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("all", range(10)),
        ("2-4", [2, 3, 4]),
        ("3", [3]),
        (3, [3]),
        ("0-40%", range(4)),
        ("40-100%", range(4, 10)),
        ("0-39.9%", range(4)),
        ("0-5%", [0]),
        ("91-99%", []),
    ],
)
def test_step_ranges_select_their_steps(spec: object, expected: object) -> None:
    assert parse_steps(spec, build_sigma_schedule("euler", 10, 1.0).sigmas) == tuple(expected)  # type: ignore[arg-type, call-overload]


def test_a_sigma_range_selects_the_steps_whose_noise_is_in_it() -> None:
    sigmas = build_sigma_schedule("euler", 10, 1.0).sigmas
    assert parse_steps((0.5, 1.0), sigmas) == (0, 1, 2, 3, 4, 5)
    assert parse_steps((0.0, 0.2), sigmas) == (8, 9)


@pytest.mark.parametrize("spec", ["4-2", "10", "40-20%", "0-140%", "first", "1-2-3"])
def test_an_invalid_step_range_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=r"step|empty|range of the steps"):
        parse_steps(spec, build_sigma_schedule("euler", 10, 1.0).sigmas)


def test_a_list_of_strengths_is_in_the_order_of_the_blocks() -> None:
    assert pair_strengths([0.1, 0.2], parse_blocks(["late", 0], 3)) == ((2, 0.1), (0, 0.2))
    with pytest.raises(ValueError, match="2 strengths for 3 positions"):
        pair_strengths([0.1, 0.2], [1, 2, 3])


def test_curves_run_from_start_to_end() -> None:
    assert Curve("linear", 1.0, 0.0).values(3) == (1.0, 0.5, 0.0)
    gaussian = Curve("gaussian", 0.0, 0.8).values(5)
    assert gaussian[2] == pytest.approx(0.8)
    assert gaussian[0] == gaussian[4] < gaussian[1]
    assert Curve("step", every=2).values(6) == (1, 1, 0, 0, 1, 1)
    assert Curve("sine").values(5) == pytest.approx((0.5, 1, 0.5, 0, 0.5))
    assert Curve("random", seed=3).values(4) == Curve("random", seed=3).values(4)
    assert Curve("random", seed=3).values(4) != Curve("random", seed=4).values(4)
    assert Curve("random", 0.2, 0.4, seed=3).values(2)[0] == pytest.approx(
        0.2 + 0.2 * random.Random(3).random()
    )
