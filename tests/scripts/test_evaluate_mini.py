"""The judge of wan-mini, given clips whose content is known."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from scripts.mini import evaluate, word_maps
from scripts.mini.evaluate import Case
from scripts.mini.recognise import Seen, recognise
from scripts.mini.world import ATTRIBUTES, HELD_OUT, Scene, cover_all, draw_all
from wancli.storage.attention_file import AttentionFile
from wancli.video import mp4


def filmed(scene: Scene, path: Path) -> Seen:
    """What the judge sees in an MP4 of a scene."""
    clip_CTYX = draw_all([scene], evaluate.GRID)[0]
    frames = mp4.to_rgb24(clip_CTYX)
    size = {"width": 64, "height": 64, "fps": 8, "frame_count": 9}
    mp4.write_mp4([frames], path, **size, crf=16, codec="h264", comment="")
    return recognise(evaluate.frames(path))


def test_prompts_are_held_out_from_training_and_pairs_agree_in_nothing() -> None:
    prompts, pairs = evaluate.held_out_prompts(30), evaluate.injection_pairs(10)
    assert {case.scene.combination for case in prompts} <= set(HELD_OUT)
    assert len(pairs) == 10 * len(evaluate.WHERE)
    for case in pairs:
        assert case.injected is not None
        assert not any(getattr(case.scene, name) == getattr(case.injected, name) for name in ATTRIBUTES)
    assert [case.item()["inject"] for case in pairs[:2]] == [
        [],
        [{"prompt": pairs[1].other, "blocks": "all"}],
    ]


def test_what_an_mp4_shows_is_what_is_counted(tmp_path: Path) -> None:
    cases = evaluate.held_out_prompts(6)
    seen = {case.name: filmed(case.scene, tmp_path / f"{case.name}.mp4") for case in cases}
    assert evaluate.obedience(cases, seen) == dict.fromkeys((*ATTRIBUTES, "all four"), 1.0)
    # One in another colour is one wrong colour of six, and nothing else.
    first = cases[0].scene
    other = "red" if first.colour != "red" else "blue"
    seen[cases[0].name] = filmed(dataclasses.replace(first, colour=other), tmp_path / "other.mp4")
    shares = evaluate.obedience(cases, seen)
    assert shares["colour"] == shares["all four"] == pytest.approx(5 / 6)
    assert shares["shape"] == shares["direction"] == shares["background"] == 1.0


def test_each_attribute_is_that_of_the_main_prompt_of_the_injected_one_or_of_neither(tmp_path: Path) -> None:
    case = next(case for case in evaluate.injection_pairs(1) if case.blocks == "late")
    assert case.injected is not None
    third = ({"red", "green", "blue"} - {case.scene.colour, case.injected.colour}).pop()
    mixed = dataclasses.replace(case.scene, colour=third, background=case.injected.background)
    counts = evaluate.attribution([case], {case.name: filmed(mixed, tmp_path / "mixed.mp4")})["late"]
    assert counts == {
        "colour": [0, 0, 1],
        "shape": [1, 0, 0],
        "direction": [1, 0, 0],
        "background": [0, 1, 0],
    }


def test_the_chance_that_thirds_are_alike_is_pearsons() -> None:
    assert evaluate.beyond_chance([[10, 10, 10]] * 3) == pytest.approx(1.0)
    assert evaluate.beyond_chance([[10, 0, 0]] * 3) == 1.0
    # Every cell is 10 off or 5 off an expected 10, so x = 3·10 + 6·2.5 = 45.
    found = evaluate.beyond_chance([[20, 5, 5], [5, 20, 5], [5, 5, 20]])
    assert found == pytest.approx(3.976e-9, rel=1e-3)
    # Two outcomes, 2 degrees of freedom: x = 4.5.
    assert evaluate.beyond_chance([[10, 5, 0], [5, 10, 0], [10, 5, 0]]) == pytest.approx(0.1054, rel=1e-3)


def test_the_tables_say_what_was_counted() -> None:
    moved = {blocks: {name: [1, 2, 1] for name in ATTRIBUTES} for blocks in evaluate.WHERE}
    obeyed = dict.fromkeys((*ATTRIBUTES, "all four"), 0.5)
    result = {"prompts": 4, "pairs": 4, "obeyed": obeyed, "moved": moved, "psnr": {"all clips": 30.0}}
    text = "\n".join(evaluate.tables(result))
    assert "| colour | 50.0% | 95% |" in text
    assert "| late | 25 / 50 / 25 |" in text


def test_a_case_without_a_rule_injects_nothing() -> None:
    scene = evaluate.held_out_prompts(1)[0].scene
    assert Case("x", 3, scene, "red circle").item() == {
        "id": "x",
        "seed": 3,
        "prompt": "red circle",
        "inject": [],
    }


def test_a_map_on_the_shape_is_told_from_one_beside_it(tmp_path: Path) -> None:
    """The maps are the shape's own shares of the tokens, and what is left of them."""
    (case,) = evaluate.held_out_prompts(1)
    clip_CTYX = draw_all([case.scene], evaluate.GRID)[0]
    size = {"width": 64, "height": 64, "fps": 8, "frame_count": 9}
    video = tmp_path / f"{case.name}.mp4"
    mp4.write_mp4([mp4.to_rgb24(clip_CTYX)], video, **size, crf=1, codec="h264", comment="")
    covered_TYX = cover_all([case.scene], evaluate.GRID)[0]
    share_TYX = word_maps.token_shares(covered_TYX)
    maps = torch.stack((share_TYX, 1 - share_TYX))[:, None, None].numpy()
    file = AttentionFile(maps, word_maps.words_of(case), ("all",), ("all",), {})
    (tmp_path / f"{case.name}.attention.npz").write_bytes(file.to_bytes())
    found = word_maps.measure(case, tmp_path)
    assert found is not None
    assert found.shape > 2
    assert found.background < 1
