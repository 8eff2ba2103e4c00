from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wancli.injection.table import (
    Concat,
    Curve,
    Lerp,
    Rule,
    Table,
    Text,
    injected_share,
    injected_share_by_block,
    pair_strengths,
    parse_blocks,
    parse_steps,
)
from wancli.sampling.solvers import build_schedule

MAIN, OTHER, THIRD = Text("main"), Text("other"), Text("third")
BASE = {"cond": "main", "uncond": "negative"}


def rule(
    blocks: list[int],
    strength: float = 0.5,
    steps: range = range(4),
    blend: str = "context-lerp",
    **changes: object,
) -> Rule:
    fields = {"text": "other", "branches": ("cond",), "gain": 1.0} | changes
    return Rule(
        blocks=pair_strengths(strength, blocks), steps=pair_strengths(1.0, steps), blend=blend, **fields
    )  # type: ignore[arg-type]


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
def test_block_sets_mean_what_they_say(spec: object, depth: int, expected: object) -> None:
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
        ("lat", "no block set"),
        ("-3", "no block set"),
        ("", "no block set"),
        (["early", "41"], "41 is past"),
    ],
)
def test_a_block_set_that_means_nothing_is_refused(spec: object, message: str) -> None:
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
def test_step_ranges_mean_what_they_say(spec: object, expected: object) -> None:
    assert parse_steps(spec, build_schedule("euler", 10, 1.0).sigmas) == tuple(expected)  # type: ignore[arg-type, call-overload]


def test_a_sigma_range_picks_the_steps_whose_noise_is_in_it() -> None:
    sigmas = build_schedule("euler", 10, 1.0).sigmas
    assert parse_steps((0.5, 1.0), sigmas) == (0, 1, 2, 3, 4, 5)
    assert parse_steps((0.0, 0.2), sigmas) == (8, 9)


@pytest.mark.parametrize("spec", ["4-2", "10", "40-20%", "0-140%", "first", "1-2-3"])
def test_a_step_range_that_means_nothing_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=r"step|empty|part of the way"):
        parse_steps(spec, build_schedule("euler", 10, 1.0).sigmas)


def test_a_list_of_strengths_goes_to_the_blocks_in_the_order_they_were_named() -> None:
    assert pair_strengths([0.1, 0.2], parse_blocks(["late", 0], 3)) == ((2, 0.1), (0, 0.2))
    with pytest.raises(ValueError, match="2 strengths for 3 places"):
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


def test_a_rule_changes_its_own_cells_and_no_others() -> None:
    table = Table([rule([1, 2], steps=range(1, 3))], BASE, depth=4, steps=4)
    plain, blended = ((MAIN, 1.0),), ((Lerp(MAIN, OTHER, 0.5), 1.0),)
    assert table.row(0, "cond") == (plain,) * 4
    assert table.row(1, "cond") == (plain, blended, blended, plain)
    assert table.row(1, "uncond") == (((Text("negative"), 1.0),),) * 4
    assert table.changed_cells == ([(s, "cond", b) for s in (1, 2) for b in (1, 2)],)


def test_both_branches_blend_into_each_branch_s_own_prompt() -> None:
    table = Table([rule([0], branches=("cond", "uncond"))], BASE, depth=1, steps=1)
    assert table.row(0, "uncond") == (((Lerp(Text("negative"), OTHER, 0.5), 1.0),),)


def test_rules_compose_in_order() -> None:
    second = rule([0], strength=0.25, blend="output-mix", text="third")
    table = Table([rule([0]), second], BASE, depth=1, steps=1)
    assert table.row(0, "cond")[0] == ((Lerp(MAIN, OTHER, 0.5), 0.75), (THIRD, 0.25))


@pytest.mark.parametrize(
    ("blend", "strength", "expected"),
    [
        ("replace", 1.0, ((OTHER, 1.0),)),
        ("output-mix", 1.0, ((OTHER, 1.0),)),
        ("output-mix", 0.5, ((MAIN, 0.5), (OTHER, 0.5))),
        ("concat", 0.5, ((Concat(MAIN, OTHER, 0.5), 1.0),)),
    ],
)
def test_each_blend_makes_its_own_cell(blend: str, strength: float, expected: object) -> None:
    assert Table([rule([0], strength, blend=blend)], BASE, 1, 1).row(0, "cond")[0] == expected


def test_gain_extrapolates_away_from_the_main_prompt() -> None:
    cell = Table([rule([0], gain=3.0)], BASE, 1, 1).row(0, "cond")[0]
    assert cell == ((Lerp(MAIN, Lerp(MAIN, OTHER, 3.0), 0.5), 1.0),)


def test_a_strength_of_zero_leaves_the_cell_alone_and_counts_no_hit() -> None:
    table = Table([rule([0], strength=0.0)], BASE, 1, 2)
    assert table.row(0, "cond") == (((MAIN, 1.0),),)
    assert table.changed_cells == ([],)


def test_the_strip_shows_how_much_was_injected() -> None:
    table = Table([rule([1], 0.5), rule([2], 1.0), rule([3], 0.25, blend="output-mix")], BASE, 4, 1)
    assert injected_share_by_block(table.row(0, "cond"), MAIN) == (0.0, 0.5, 1.0, 0.25)
    assert injected_share(Concat(MAIN, OTHER, 1.0), MAIN) == 0.5


def test_a_thousand_steps_share_their_rows() -> None:
    table = Table([rule(list(range(40)), steps=range(500))], BASE, depth=40, steps=1000)
    assert len({id(table.row(s, b)) for s in range(1000) for b in table.branches}) == 3
