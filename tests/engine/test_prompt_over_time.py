"""Prompts over time, rendered: bits, manifests, reruns, and differences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import CAT, FISH, KEPT, CommandResult, latents_of, rule, run_wancli, tiny_job, write_job

from wancli.engine.output_diff import describe_record
from wancli.job.loader import load
from wancli.plan.planner import build_plan
from wancli.plan.shot import Shot
from wancli.report.html.injection_entries import injected_shares
from wancli.report.html.rerun_job import build_job
from wancli.storage import manifest

Render = Callable[..., CommandResult]
BLENDS: dict[str, Any] = {
    "cut": [{"text": CAT, "frames": 0}, {"text": FISH, "frames": "1-4"}],
    "crossfade": {"segments": [CAT, FISH], "blend": "crossfade", "fade": 2},
    "relay": {"text": "In a garden,", "segments": ["a cat sleeps.", "a dog digs."], "blend": "relay"},
}


@pytest.fixture
def decide(tmp_path: Path, warm: Path) -> Callable[[dict[str, Any]], Shot]:
    def decided(job: dict[str, Any]) -> Shot:
        return build_plan(load(write_job(tmp_path, job, "again.yaml")), warm / "h.json").shots[0]

    return decided


def test_one_text_for_all_frames_gives_the_bits_of_that_prompt(render: Render, tmp_path: Path) -> None:
    for name, prompt in (
        ("plain", CAT),
        ("cut", [CAT, CAT]),
        ("fade", BLENDS["crossfade"] | {"segments": [CAT, CAT]}),
    ):
        assert render(folder=tmp_path / name, prompt=prompt, frames=5, video=KEPT).code == 0
    plain, *others = (latents_of(tmp_path / name) for name in ("plain", "cut", "fade"))
    assert all(torch.equal(plain, other) for other in others)


@pytest.mark.parametrize("blend", BLENDS)
def test_the_record_makes_the_same_shot_again(
    render: Render, tmp_path: Path, decide: Callable[[dict[str, Any]], Shot], blend: str
) -> None:
    assert render(prompt=BLENDS[blend], frames=5, inject=[rule(blocks=0, frames="1-4")]).code == 0
    record = manifest.read(tmp_path / "out/clip.manifest.json")
    assert record
    assert record.timeline
    assert record.negative
    assert (record.negative.text, record.timeline.blend) == ("fog", blend)
    assert [segment.frames for segment in record.timeline.segments] == [(0, 0), (1, 4)]
    assert [other.text for other in record.injected if hasattr(other, "text")] == [FISH]
    assert record.injection[0].hits == record.injection[0].planned == 2
    again = decide(build_job(record, "again.mp4"))
    assert (again.key, describe_record(record, again)) == (record.key, "")
    shares = injected_shares(record)
    assert [row["blocks"] for row in shares if row["branch"] == "cond"] == [[0.6, 0, 0, 0]]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (CAT, "another prompt"),
        ([{"text": CAT, "frames": "0-3"}, {"text": FISH, "frames": 4}], "prompt.0.frames 0-0, now 0-3"),
        ([{"text": CAT, "frames": 0}, {"text": CAT, "frames": "1-4"}], "another prompt.1.text"),
        (BLENDS["crossfade"], "prompt.blend cut, now crossfade; prompt.fade 0, now 2"),
    ],
)
def test_a_difference_is_named_by_its_key(
    render: Render,
    tmp_path: Path,
    known: Path,
    decide: Callable[[dict[str, Any]], Shot],
    changed: Any,
    expected: str,
) -> None:
    assert render(prompt=BLENDS["cut"], frames=5).code == 0
    record = manifest.read(tmp_path / "out/clip.manifest.json")
    assert record
    assert expected in describe_record(record, decide(tiny_job(known, prompt=changed, frames=5)))


def test_plan_draws_the_segments_over_the_latent_frames(
    tmp_path: Path, quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = {"segments": [CAT, FISH], "blend": "crossfade", "fade": 8}
    job = write_job(tmp_path, tiny_job(quick, prompt=prompt, frames=17))
    lines = run_wancli(capsys, "plan", "-v", job).out.splitlines()
    start = next(i for i, line in enumerate(lines) if "2 segments" in line)
    assert [line.split() for line in (lines[start], *lines[start + 3 : start + 6])] == [
        ["prompt", "2", "segments,", "crossfade", "over", "8", "frames"],
        ["latent", "frame", "0...."],
        ["frames", "0-8", "██▆▂·"],
        ["frames", "9-16", "··▂▆█"],
    ]
    assert max(map(len, lines[start : start + 6])) <= 80
