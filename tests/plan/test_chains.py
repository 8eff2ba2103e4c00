"""Chains of shots, and videos joined from them, planned with a model that is made to take pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from jobs import run_wancli
from PIL import Image

from wancli.errors import JobError
from wancli.job.loader import parse
from wancli.plan import planner
from wancli.plan.chains import order_items, split_waves
from wancli.plan.model_spec import ModelSpec
from wancli.plan.pictures import LinkedFrame
from wancli.plan.planner import build_plan
from wancli.plan.render_plan import Plan

FIRST = {"id": "a", "image": "cat.png"}


def link(id: str, shot: str, **keys: Any) -> dict[str, Any]:
    return {"id": id, "image": {"shot": shot, **keys}}


def job(*items: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"prompt": "A red circle", "output": "out/{id}.mp4", "size": "64x64", **keys, "items": list(items)}


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plans a job with wan-mini, as if it took a first frame."""
    real = planner.resolve_model

    def with_picture(*arguments: Any) -> ModelSpec:
        model = real(*arguments)
        variant = replace(model.checkpoint.variant, first_picture="optional")
        return replace(model, checkpoint=replace(model.checkpoint, variant=variant))

    monkeypatch.setattr(planner, "resolve_model", with_picture)
    Image.new("RGB", (80, 64), (200, 30, 30)).save(tmp_path / "cat.png")

    def planned(*items: dict[str, Any], **keys: Any) -> Plan:
        jobs = parse(yaml.safe_dump(job(*items, **keys)).encode(), "job.yaml", "job", tmp_path)
        return build_plan(jobs, tmp_path / "cache" / "hashes.json")

    return planned


def order(*items: dict[str, Any]) -> list[tuple[int, int | None]]:
    return order_items(parse(yaml.safe_dump(job(*items)).encode(), "job.yaml", "job", Path("/")).items)


def test_every_shot_comes_after_the_one_it_continues() -> None:
    assert order(link("c", "b"), FIRST, link("b", "a"), {"id": "d"}) == [(1, None), (3, None), (2, 1), (0, 2)]
    assert order({"prompt": "p"}, {"image": {"shot": "0000"}}) == [(0, None), (1, 0)]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([FIRST, link("b", "aa")], "items.1.image.shot: no shot has the id 'aa'"),
        ([link("a", "a")], "image.shot: goes in a circle: a continues a"),
        ([link("a", "c"), link("b", "a"), link("c", "b")], "goes in a circle"),
    ],
)
def test_missing_shots_and_circles_are_refused(items: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(JobError) as caught:
        order(*items)
    assert message in str(caught.value)
    assert caught.value.hint


def test_a_link_has_the_size_of_the_shot_before_and_a_key_that_follows_it(plan: Any) -> None:
    items = [FIRST, link("b", "a"), link("c", "b", frame=2)]
    a, b, c = plan(*items, size={"area": 4096}).shots
    assert {(shot.width, shot.height) for shot in (a, b, c)} == {(64, 48)}
    assert a.pictures.name == "cat"
    assert (b.pictures.first.source, c.pictures.first.source) == (
        LinkedFrame(0, "a", a.output, a.frames - 1, (64, 48), a.frame_key(a.frames - 1)),
        LinkedFrame(1, "b", b.output, 2, (64, 48), b.frame_key(2)),
    )
    other = plan({**FIRST, "seed": 1}, *items[1:], size={"area": 4096}).shots
    assert all(one.key != two.key for one, two in zip((a, b, c), other))
    tail = plan(*items[:2], link("c", "b", frame=3), size={"area": 4096}).shots
    assert [one.key == two.key for one, two in zip((a, b, c), tail)] == [True, True, False]


def test_the_latent_of_a_shot_with_a_picture_depends_on_the_vae_and_that_of_a_text_does_not(
    plan: Any,
) -> None:
    for items, same in (([FIRST], False), ([{"id": "a"}], True)):
        (shot,) = plan(*items).shots
        other = replace(shot, model=replace(shot.model, vae="0" * 64))
        assert (shot.latents_key == other.latents_key, shot.key == other.key) == (same, False)


def test_a_video_of_one_frame_has_no_last_frame(plan: Any) -> None:
    with pytest.raises(JobError, match="a video of one frame has no last frame"):
        plan({"id": "a", "image": {"first": "cat.png", "last": "cat.png"}}, frames=1)


def test_a_frame_past_the_end_and_the_shots_after_a_wrong_one_are_one_problem(plan: Any) -> None:
    with pytest.raises(JobError, match="9 is past the last frame of a, which is 8"):
        plan(FIRST, link("b", "a", frame=9))
    with pytest.raises(JobError) as caught:
        plan({**FIRST, "image": "dog.png"}, link("b", "a"), link("c", "b"))
    assert str(caught.value).count("\n") == 0


def test_outputs_are_named_after_pictures_and_links(plan: Any) -> None:
    shots = plan(FIRST, link("b", "a"), output="out/{image}-{item}.mp4").shots
    assert [shot.output.name for shot in shots] == ["cat-0.mp4", "a-1.mp4"]
    with pytest.raises(JobError, match=r"no field \{image\}"):
        plan({"id": "a"}, output="out/{image}.mp4")


def test_a_chain_is_joined_in_its_order(plan: Any, tmp_path: Path) -> None:
    planned = plan(link("c", "b"), FIRST, link("b", "a"), {"id": "alone", "join": None}, join="out/all.mp4")
    (join,) = planned.joins
    assert join.path == tmp_path / "out" / "all.mp4"
    assert join.shots == (1, 2, 0)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([FIRST, {"id": "b", "image": "cat.png"}], "a and b do not continue one another"),
        ([FIRST], "a is not a chain"),
        ([FIRST, link("b", "a"), link("c", "a")], "b and c both continue a"),
        ([FIRST, link("b", "a", frame=3)], "b begins with frame 3 of a, not with the last one"),
        ([FIRST, {**link("b", "a"), "size": "32x32"}], "a is 64x64 at 8 fps, b is 32x32 at 8 fps"),
        ([FIRST, {**link("b", "a"), "join": "out/a.mp4"}], "is the output of a shot"),
        ([FIRST, {**link("b", "a"), "join": "all.mkv"}], "'all.mkv' does not end in .mp4"),
        ([FIRST, {**link("b", "a"), "join": "out/{id}.mp4"}], "no field {id}"),
        ([FIRST, {**link("b", "a"), "join": f"out/{'x' * 252}.mp4"}], "a name of 256 bytes"),
    ],
)
def test_shots_that_are_not_a_chain_are_not_joined(plan: Any, items: Any, message: str) -> None:
    with pytest.raises(JobError) as caught:
        plan(*items, join="out/all.mp4")
    assert message in str(caught.value)
    assert ".join: " in str(caught.value) or ": join: " in str(caught.value)


def test_pictures_with_choices_are_warned_of(plan: Any, tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (1, 2, 3, 0)).save(tmp_path / "cat.png")
    (warning,) = plan(FIRST).warnings
    assert "cat.png: its transparent parts show hidden colours" in warning


def test_waves_follow_the_links_and_start_with_shots_whose_link_is_not_among_them(plan: Any) -> None:
    shots = plan(link("c", "b"), FIRST, link("b", "a"), {"id": "d"}).shots
    assert [[shot.id for shot in wave] for wave in split_waves(shots)] == [["a", "d"], ["b"], ["c"]]
    assert [[shot.id for shot in wave] for wave in split_waves(shots[:1])] == [["c"]]
    assert [shot.kept_frames for shot in shots] == [(), (8,), (8,), ()]


def test_the_command_line_takes_a_picture_with_a_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = run_wancli(capsys, "render", "--prompt", "A red circle", "--image", "cat.png", "-o", "a.mp4")
    assert said.code == 2
    assert "the command line: image: wan-mini makes videos from text alone" in said.err
    said = run_wancli(capsys, "render", "--image", "cat.png")
    assert said.code == 2
    assert "--prompt" in said.err


def test_a_picture_cannot_be_injected_into_blocks_that_attend_to_text_alone(plan: Any) -> None:
    with pytest.raises(JobError, match=r"inject\.0\.image: the blocks of wan-mini attend to text alone"):
        plan({"inject": [{"image": "cat.png", "blocks": "late"}]})
    with pytest.raises(JobError, match=r"inject\.0\.prompt: does not go with the other keys here"):
        plan({"inject": [{"image": "cat.png", "prompt": "p"}]})
