from __future__ import annotations

import pytest

from wancli.injection.area import Area
from wancli.injection.exprs import AreaWeight, Concat, Image, Lerp, Text
from wancli.injection.injected_share import injected_share, injected_share_by_block
from wancli.injection.selectors import pair_strengths
from wancli.injection.table import Rule, Table

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


def test_the_injected_share_of_a_block_is_between_0_and_1() -> None:
    table = Table([rule([1], 0.5), rule([2], 1.0), rule([3], 0.25, blend="output-mix")], BASE, 4, 1)
    assert injected_share_by_block(table.row(0, "cond"), MAIN) == (0.0, 0.5, 1.0, 0.25)
    assert injected_share(Concat(MAIN, OTHER, 1.0), MAIN) == 0.5


def test_a_thousand_steps_share_their_rows() -> None:
    table = Table([rule(list(range(40)), steps=range(500))], BASE, depth=40, steps=1000)
    assert len({id(table.row(s, b)) for s in range(1000) for b in table.branches}) == 3


# ---- what blocks read of pictures ----

PICTURE, OTHER_PICTURE = Image("picture"), Image("other")


def test_a_picture_is_read_by_all_blocks_in_both_branches() -> None:
    table = Table([], BASE, depth=2, steps=1, image="picture")
    assert table.row(0, "cond") == (((MAIN, 1.0), (PICTURE, 1.0)),) * 2
    assert table.row(0, "uncond") == (((Text("negative"), 1.0), (PICTURE, 1.0)),) * 2


@pytest.mark.parametrize(
    ("blend", "strength", "gain", "expected"),
    [
        ("context-lerp", 0.5, 1.0, ((Lerp(PICTURE, OTHER_PICTURE, 0.5), 1.0),)),
        ("context-lerp", 0.5, 3.0, ((Lerp(PICTURE, Lerp(PICTURE, OTHER_PICTURE, 3.0), 0.5), 1.0),)),
        ("replace", 1.0, 1.0, ((OTHER_PICTURE, 1.0),)),
        ("output-mix", 0.25, 1.0, ((PICTURE, 0.75), (OTHER_PICTURE, 0.25))),
        ("concat", 0.5, 1.0, ((Concat(PICTURE, OTHER_PICTURE, 0.5), 1.0),)),
    ],
)
def test_an_injected_picture_changes_what_blocks_read_of_pictures(
    blend: str, strength: float, gain: float, expected: object
) -> None:
    table = Table([rule([0], strength, blend=blend, gain=gain, image=True)], BASE, 1, 1, image="picture")
    assert table.row(0, "cond")[0] == ((MAIN, 1.0), *expected)  # type: ignore[misc]
    assert table.row(0, "uncond")[0] == ((Text("negative"), 1.0), (PICTURE, 1.0))
    assert table.changed_cells == ([(0, "cond", 0)],)


def test_prompts_and_pictures_are_injected_into_one_cell_independently() -> None:
    rules = [rule([0], 0.5), rule([0, 1], 0.25, image=True)]
    table = Table(rules, BASE, 2, 1, image="picture")
    blended = (Lerp(PICTURE, OTHER_PICTURE, 0.25), 1.0)
    assert table.row(0, "cond") == (((Lerp(MAIN, OTHER, 0.5), 1.0), blended), ((MAIN, 1.0), blended))
    assert injected_share_by_block(table.row(0, "cond"), MAIN) == (0.5, 0.0)
    assert injected_share_by_block(table.row(0, "cond"), PICTURE) == (0.25, 0.25)


def test_a_picture_is_not_injected_into_a_model_that_reads_none() -> None:
    with pytest.raises(ValueError, match="attend to none"):
        Table([rule([0], image=True)], BASE, 1, 1)


LEFT, EARLY = Area(region=(0.0, 0.0, 0.5, 1.0)), Area(frames=(0, 8))


def test_outside_of_its_area_a_rule_changes_nothing() -> None:
    cell = Table([rule([0], area=LEFT)], BASE, 1, 1).row(0, "cond")[0]
    assert cell == (
        (MAIN, AreaWeight(1.0, outside=(LEFT,))),
        (Lerp(MAIN, OTHER, 0.5), AreaWeight(1.0, inside=(LEFT,))),
    )


def test_a_rule_changes_what_the_area_of_another_left() -> None:
    mixed = rule([0], 0.25, blend="output-mix", text="third", area=EARLY)
    cell = Table([rule([0], 1.0, blend="replace", area=LEFT), mixed], BASE, 1, 1).row(0, "cond")[0]
    assert cell == (
        (MAIN, AreaWeight(1.0, outside=(LEFT, EARLY))),
        (OTHER, AreaWeight(1.0, inside=(LEFT,), outside=(EARLY,))),
        (MAIN, AreaWeight(0.75, inside=(EARLY,), outside=(LEFT,))),
        (OTHER, AreaWeight(0.75, inside=(LEFT, EARLY))),
        (THIRD, AreaWeight(0.25, inside=(EARLY,))),
    )


def test_the_injected_share_is_that_inside_the_area() -> None:
    rules = [rule([0], 0.5, area=LEFT), rule([0, 1], 0.25, text="third")]
    row = Table(rules, BASE, 2, 1).row(0, "cond")
    assert injected_share_by_block(row, MAIN) == (0.625, 0.25)
