"""`prompt` as a list: which frames read which text, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import CAT, FISH, rule, tiny_job, write_job

from wancli.errors import JobError
from wancli.injection.timeline import Timeline
from wancli.job.loader import load
from wancli.plan.planner import build_plan
from wancli.plan.shot import Shot

DOG = "A dog digs a hole."
Decide = Callable[..., Shot]


@pytest.fixture
def decide(tmp_path: Path, quick: Path, warm: Path) -> Decide:
    """A shot of 81 frames, 16 a second, with this prompt."""

    def decided(prompt: Any, **changes: Any) -> Shot:
        job = tiny_job(quick, frames=81, prompt=prompt, **changes)
        return build_plan(load(write_job(tmp_path, job)), warm / "hashes.json").shots[0]

    return decided


@pytest.fixture
def problem(decide: Decide, tmp_path: Path) -> Callable[..., str]:
    def found(prompt: Any, **changes: Any) -> str:
        with pytest.raises(JobError) as caught:
            decide(prompt, **changes)
        return str(caught.value).replace(f"{tmp_path}/", "").removeprefix("job.yaml:")

    return found


def timeline_of(shot: Shot) -> Timeline:
    assert shot.timeline
    return shot.timeline


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([{"frames": "0-40"}, {"frames": "41-end"}], [(0, 40), (41, 80)]),
        ([{"during": "0s-2.5s"}, {"during": "2.5s-end"}], [(0, 39), (40, 80)]),
        ([{"frames": "0-25%"}, {"frames": "25-100%"}], [(0, 20), (21, 80)]),
    ],
)
def test_segments_have_frames_as_rules_do(
    decide: Decide, places: list[dict[str, Any]], expected: list[tuple[int, int]]
) -> None:
    shot = decide([{"text": text} | place for text, place in zip((CAT, FISH), places)])
    assert [segment.frames for segment in timeline_of(shot).segments] == expected
    assert [prompt.tokens.text for prompt in shot.prompts] == [CAT, "fog", FISH]
    assert (timeline_of(shot).blend, shot.prompt_text) == ("cut", f"{CAT} | {FISH}")


def test_segments_are_sorted_by_time(decide: Decide) -> None:
    shot = decide([{"text": FISH, "frames": "41-80"}, {"text": CAT, "frames": "0-40"}])
    assert [segment.text for segment in timeline_of(shot).segments] == [CAT, FISH]
    assert shot.prompt.tokens.text == CAT


@pytest.mark.parametrize(
    ("count", "starts"),  # each of the form 4j-3, near 81 i / count
    [(2, [0, 41]), (3, [0, 29, 53]), (4, [0, 21, 41, 61]), (21, [0, *range(1, 81, 4)])],
)
def test_texts_alone_share_the_video_evenly(decide: Decide, count: int, starts: list[int]) -> None:
    segments = timeline_of(decide([CAT, FISH] * (count // 2) + [DOG] * (count % 2))).segments
    assert [segment.frames[0] for segment in segments] == starts
    assert [segment.frames[1] + 1 for segment in segments] == [*starts[1:], 81]


def test_a_list_of_one_is_that_prompt(decide: Decide) -> None:
    plain = decide(CAT)
    for prompt in ([CAT], [{"text": CAT, "frames": "0-80"}], {"segments": [CAT], "blend": "relay"}):
        assert (decide(prompt).key, decide(prompt).timeline) == (plain.key, None)


def test_a_text_for_all_frames_stands_before_each_segment(decide: Decide) -> None:
    shot = decide({"text": "In a garden,", "segments": ["a cat sleeps.", "a dog digs."]})
    assert [segment.text for segment in timeline_of(shot).segments] == [
        "In a garden, a cat sleeps.",
        "In a garden, a dog digs.",
    ]


@pytest.mark.parametrize(("fps", "expected"), [(16, 8), (24, 12), ("24000/1001", 12), (1, 1)])
def test_a_crossfade_takes_half_a_second_by_default(decide: Decide, fps: Any, expected: int) -> None:
    shot = decide({"segments": [CAT, FISH], "blend": "crossfade"}, video={"fps": fps})
    assert timeline_of(shot).fade == expected


def test_a_relay_is_one_text_and_knows_the_rows_of_each_segment(decide: Decide) -> None:
    segments = ["a cat  sleeps.", "a dog digs."]
    shot = decide({"text": "In a garden,", "segments": segments, "blend": "relay"})
    pieces = shot.prompt.tokens.pieces
    assert shot.prompt.tokens.text == "In a garden, a cat sleeps. a dog digs."
    assert [prompt.id for prompt in shot.prompts] == [shot.prompt.id, shot.prompts[1].id]
    found = ["".join(pieces[slice(*segment.rows or ())]) for segment in timeline_of(shot).segments]
    assert found == ["▁a▁cat▁sleeps.", "▁a▁dog▁digs."]
    assert shot.prompt_text == "In a garden, a cat sleeps. | a dog digs."


@pytest.mark.parametrize(
    "changed",
    [
        [{"text": CAT, "frames": "0-39"}, {"text": FISH, "frames": "40-80"}],
        [FISH, CAT],
        CAT,
        {"segments": [CAT, FISH], "blend": "crossfade"},
        {"segments": [CAT, FISH], "blend": "relay"},
    ],
)
def test_every_part_of_it_counts_for_the_key(decide: Decide, changed: Any) -> None:
    plain = decide([CAT, FISH])
    assert decide(changed).key != plain.key
    assert (
        decide({"segments": [{"text": CAT, "frames": "0-40"}, {"text": FISH, "frames": "41-80"}]}).key
        == plain.key
    )


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (
            [{"text": CAT, "frames": "0-40"}, {"text": FISH, "frames": "38-80"}],
            "8: prompt.1.frames: two prompts in frames 38-40: this one and prompt.0 (job.yaml:4)",
        ),
        (
            [{"text": CAT, "frames": "0-30"}, {"text": FISH, "frames": "33-80"}],
            "8: prompt.1.frames: no prompt in frames 31-32 before it",
        ),
        ([{"text": CAT, "frames": "0-30"}], "5: prompt.0.frames: no prompt in frames 31-80 after it"),
        ([{"text": CAT, "frames": "0-90"}], "5: prompt.0.frames: 90 is past the last frame (80)"),
        (
            [{"text": CAT, "frames": "0-40"}, FISH],
            "6: prompt.1: has no frames, and other segments have some",
        ),
        (
            [{"text": CAT, "frames": "0-40", "during": "0s-1s"}, {"text": FISH, "frames": "41-80"}],
            "6: prompt.0.during: has both `frames` and `during`",
        ),
        ([CAT, " "], "5: prompt.1: is empty"),
        ([], "3: prompt: expected at least 1 values, got 0"),
        ([CAT] * 22, "3: prompt: has 22 segments, and a video of 81 frames has 21 latent frames"),
        ([CAT, {"txt": FISH}], "5: prompt.1.txt: unknown key; did you mean 'text'?"),
        ({"segmnts": [CAT]}, "4: prompt.segmnts: unknown key; did you mean 'segments'?"),
        (
            {"segments": [CAT, FISH], "fade": 8},
            "8: prompt.fade: only a crossfade has one",
        ),
        (
            {"segments": [CAT, FISH], "fade": 82, "blend": "crossfade"},
            "8: prompt.fade: is 82 frames, and the video has 81",
        ),
        (
            {"segments": [CAT, {"text": {"embedding": "x.safetensors"}}], "blend": "relay"},
            "6: prompt.segments.1.text: is an embedding, which cannot be joined with a text",
        ),
        (
            {"segments": [CAT, "&nbsp;"], "blend": "relay"},
            "6: prompt.segments.1: has no words",
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_line(problem: Callable[..., str], prompt: Any, expected: str) -> None:
    assert problem(prompt) == expected


def test_all_problems_of_a_list_are_told(problem: Callable[..., str]) -> None:
    found = problem(
        {"segments": [{"text": " ", "frames": "0-30"}, {"text": CAT, "frames": "5-90"}], "fade": 3}
    )
    assert [line.partition(": ")[2].partition(":")[0] for line in found.splitlines()] == [
        "prompt.segments.0.text",
        "prompt.segments.1.frames",
        "prompt.fade",
    ]


def test_a_cut_off_segment_of_a_relay_is_refused(problem: Callable[..., str]) -> None:
    text = {"max_tokens": 256, "truncate": True}
    found = problem({"segments": ["cat " * 300, DOG], "blend": "relay"}, text=text)
    assert found.endswith(": prompt.segments.1: is cut off: 255 tokens are kept")


def test_a_gain_needs_one_prompt(problem: Callable[..., str]) -> None:
    found = problem([CAT, DOG], inject=[rule(blocks=0, gain=2.0)])
    assert "inject.0.gain: extrapolates from the prompt" in found


def test_shots_with_equal_lists_share_their_steps_and_others_none(
    tmp_path: Path, quick: Path, warm: Path
) -> None:
    lists = [
        [CAT, FISH],
        [{"text": CAT, "frames": "0-40"}, {"text": FISH, "frames": "41-80"}],
        [{"text": CAT, "frames": "0-44"}, {"text": FISH, "frames": "45-80"}],
        CAT,
    ]
    items = [{"id": f"s{i}", "prompt": prompt, "output": f"{i}.mp4"} for i, prompt in enumerate(lists)]
    job = tiny_job(quick, frames=81, items=items)
    plan = build_plan(load(write_job(tmp_path, job)), warm / "hashes.json")
    shared = plan.schedule.shared_steps()
    assert [shared.get(shot.index, 0) for shot in plan.shots] == [0, 2, 0, 0]


def test_attention_maps_need_one_prompt(problem: Callable[..., str]) -> None:
    found = problem([CAT, DOG], attention={"words": ["cat"]})
    assert found.endswith("attention: is of one prompt, and that of the shot changes over the frames")


@pytest.mark.parametrize(("border", "named"), [(13, ["0-12"]), (25, ["25-40"]), (20, []), (17, [])])
def test_a_warning_names_the_segments_that_are_too_short_for_a_relay(
    tmp_path: Path, quick: Path, warm: Path, border: int, named: list[str]
) -> None:
    """Those of four latent frames or fewer: 13 frames at the beginning, 16 elsewhere."""
    segments = [{"text": CAT, "frames": f"0-{border - 1}"}, {"text": DOG, "frames": f"{border}-end"}]
    job = tiny_job(quick, frames=41, prompt={"segments": segments, "blend": "relay"})
    warnings = build_plan(load(write_job(tmp_path, job)), warm / "hashes.json").warnings
    assert [line.partition("that of ")[2].partition(" hardly")[0] for line in warnings] == named
