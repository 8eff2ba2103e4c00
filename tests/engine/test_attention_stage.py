"""Attention maps through the command line: files, manifests, resumption, shared steps and damage."""

from __future__ import annotations

import io
import json
import re
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import (
    FISH,
    KEPT,
    CommandResult,
    count_forwards,
    files_in,
    forbid_calls,
    latents_of,
    manifest_of,
    rule,
    run_wancli,
    tiny_job,
    write_job,
)

from wancli.engine import verify
from wancli.video import mp4

Render = Callable[..., CommandResult]
MAPS = {"words": ["cat", "sunlit garden"], "blocks": ["all", [0, "3"]], "steps": ["0-50%", "50-100%"]}
SAID = {"attention": MAPS, "sampler": {"steps": 4}, "frames": 5, "video": KEPT}


def bytes_of(folder: Path, name: str = "clip", suffix: str = "attention.npz") -> bytes:
    return (folder / "out" / f"{name}.{suffix}").read_bytes()


def test_a_shot_with_maps_has_the_same_video_and_further_files(render: Render, tmp_path: Path) -> None:
    plain = {key: value for key, value in SAID.items() if key != "attention"}
    assert render(folder=tmp_path / "plain", **plain).code == 0
    assert render(**SAID).code == 0
    assert torch.equal(latents_of(tmp_path), latents_of(tmp_path / "plain"))
    assert bytes_of(tmp_path, suffix="mp4") == bytes_of(tmp_path / "plain", suffix="mp4")
    added = {*files_in(tmp_path)} - {*files_in(tmp_path / "plain")}
    assert added == {"clip.attention.npz", "clip.attention.mp4"}
    found, without = manifest_of(tmp_path), manifest_of(tmp_path / "plain")
    assert found["key"] == without["key"]
    assert "attention" not in without
    pieces = found["prompts"][0]["pieces"]
    spelled = ["".join(pieces[row] for row in rows) for rows in found["attention"]["rows"]]
    assert spelled == ["▁cat", "▁sunlit▁garden"]
    assert [group["members"] for group in found["attention"]["blocks"]] == [[0, 1, 2, 3], [0, 3]]
    assert [group["label"] for group in found["attention"]["steps"]] == ["0-50%", "50-100%"]


def test_the_arrays_and_their_axes_can_be_read_by_numpy_alone(render: Render, tmp_path: Path) -> None:
    assert render(**SAID).code == 0
    with np.load(io.BytesIO(bytes_of(tmp_path))) as file:
        assert file["maps"].shape == (2, 2, 2, 2, 4, 4)
        assert file["maps"].dtype == np.float32
        assert (file["maps"] > 0).all()
        assert (file["maps"].sum(axis=0) < 1).all()
        assert file["words"].tolist() == MAPS["words"]
        assert file["blocks"].tolist() == ["all", "0, 3"]
        assert file["steps"].tolist() == ["0-50%", "50-100%"]
        assert file["frames"].tolist() == [[0, 0], [1, 4]]
        about = json.loads(file["attention.json"])
    assert about["schema"] == "wancli/attention/1"
    assert [(axis["name"], axis["length"]) for axis in about["axes"]] == [
        ("word", 2), ("block group", 2), ("step group", 2), ("latent frame", 2), ("row", 4), ("column", 4),
    ]  # fmt: skip
    assert "".join(about["pieces"][row] for row in about["rows"][0]) == "▁cat"


def test_the_overlay_has_the_frames_of_the_video_and_a_cell_for_each_word(
    render: Render, tmp_path: Path
) -> None:
    assert render(**SAID).code == 0
    info = mp4.read_info(tmp_path / "out/clip.attention.mp4")
    assert info.frame_count == 5
    assert info.width > 2 * 320


def test_a_finished_shot_gets_maps_that_the_job_asks_for_later_and_keeps_its_video(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {key: value for key, value in SAID.items() if key != "attention"}
    assert render(**plain).code == 0
    video = (tmp_path / "out/clip.mp4").stat()
    assert render(**SAID).code == 0
    assert (tmp_path / "out/clip.mp4").stat().st_size == video.st_size
    assert "clip.attention.npz" in files_in(tmp_path)
    forbid_calls(monkeypatch)
    assert render(**SAID).code == 0
    renamed = MAPS | {"blocks": ["0-3", "0-3:3"]}  # the same groups, written otherwise
    assert render(**SAID | {"attention": renamed}).code == 0
    assert render(**plain).code == 0  # a job that asks for none needs none


@pytest.mark.parametrize("suffix", ["attention.npz", "attention.mp4"])
def test_maps_that_are_gone_or_damaged_are_found_and_made_again(
    render: Render, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    assert render(**SAID).code == 0
    path = tmp_path / "out" / f"clip.{suffix}"
    whole = path.read_bytes()
    for damage in (lambda: path.unlink(), lambda: path.write_bytes(whole[:-7] + b"damaged")):
        damage()
        found = verify.check_folder(tmp_path / "out")
        assert [problem.path for problem in found.problems] == [path]
        assert found.orphans == []
        said = run_wancli(capsys, "status", tmp_path / "job.yaml", "--json")
        assert json.loads(said.out)["shots"][0]["state"] != "done"
        assert render(**SAID).code == 0
        assert path.read_bytes() == whole
        assert verify.check_folder(tmp_path / "out").problems == []
        said = run_wancli(capsys, "status", tmp_path / "job.yaml", "--json")
        assert json.loads(said.out)["shots"][0]["state"] == "done"


def test_a_file_of_something_else_moves_aside(render: Render, tmp_path: Path) -> None:
    for suffix in ("npz", "mp4"):
        path = tmp_path / "out" / f"clip.attention.{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
    assert render(**SAID).code == 0
    for suffix in ("npz", "mp4"):
        assert (tmp_path / "out" / f"clip.attention.old-1.{suffix}").read_bytes() == b"mine"


def test_a_run_stopped_in_every_step_has_the_maps_of_an_unstopped_run(render: Render, tmp_path: Path) -> None:
    assert render(folder=tmp_path / "whole", **SAID).code == 0
    for _ in range(4):
        with pytest.MonkeyPatch.context() as patched:
            count_forwards(patched, lambda call: signal.raise_signal(signal.SIGTERM) if call == 0 else None)
            assert render(**SAID).code == 75
    assert files_in(tmp_path) == ["clip.attention.npz", "clip.latents.safetensors", "job.report.json"]
    assert render(**SAID).code == 0
    assert bytes_of(tmp_path) == bytes_of(tmp_path / "whole")


def test_a_step_that_failed_adds_nothing_to_the_maps(render: Render, tmp_path: Path) -> None:
    """The first forward of step 1 has run when the second one fails, and both run again."""
    assert render(folder=tmp_path / "whole", **SAID).code == 0

    def fail(call: int) -> None:
        if call == 3:
            raise MemoryError

    with pytest.MonkeyPatch.context() as patched:
        count_forwards(patched, fail)
        assert render(**SAID).code != 0
    assert "clip.state.safetensors" in files_in(tmp_path)
    assert render(**SAID).code == 0
    assert bytes_of(tmp_path) == bytes_of(tmp_path / "whole")


def test_a_state_without_the_maps_that_are_asked_for_starts_again(render: Render, tmp_path: Path) -> None:
    plain = {key: value for key, value in SAID.items() if key != "attention"}
    for said in (plain, SAID | {"attention": MAPS | {"words": ["cat"]}}):
        with pytest.MonkeyPatch.context() as patched:
            count_forwards(patched, lambda call: signal.raise_signal(signal.SIGTERM) if call == 2 else None)
            assert render(**said).code == 75
    assert render(folder=tmp_path / "whole", **SAID).code == 0
    assert render(**SAID).code == 0
    assert [name for name in files_in(tmp_path) if "state" in name] == [
        "clip.state.old-1.safetensors",
        "clip.state.old-2.safetensors",
    ]
    assert bytes_of(tmp_path) == bytes_of(tmp_path / "whole")


def test_a_shot_that_shares_steps_has_their_maps(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items: list[dict[str, Any]] = [
        {"id": "plain"},
        {"id": "late", "inject": [rule(blocks="late", steps="50-100%")]},
        {"id": "none", "inject": [rule(blocks="late", steps="50-100%")], "attention": None},
    ]
    several = partial(render, output="out/{id}.mp4", **SAID)
    assert several(folder=tmp_path / "alone", items=items[1:2]).code == 0
    calls = count_forwards(monkeypatch)
    assert several(items=items).code == 0
    assert len(calls) == 2 * (4 + 2 + 4)
    assert bytes_of(tmp_path, "late") == bytes_of(tmp_path / "alone", "late")
    assert bytes_of(tmp_path, "late") != bytes_of(tmp_path, "plain")
    assert "none.attention.npz" not in files_in(tmp_path)
    assert torch.equal(latents_of(tmp_path, "none"), latents_of(tmp_path, "late"))


def test_shots_on_one_pass_over_streamed_weights_have_the_maps_that_each_has_alone(
    render: Render, tmp_path: Path
) -> None:
    items = [{"id": "a", "seed": 1}, {"id": "b", "seed": 2, "prompt": FISH, "attention": {"words": ["fish"]}}]
    streamed = {"memory": {"residency": "streamed"}, "output": "out/{id}.mp4", "measure": True}
    assert render(**SAID, items=items, **streamed).code == 0
    for item in items:
        assert render(folder=tmp_path / "alone", **SAID, items=[item], output="out/{id}.mp4").code == 0
        assert bytes_of(tmp_path, item["id"]) == bytes_of(tmp_path / "alone", item["id"])


def test_wrong_words_and_groups_are_told_together(render: Render) -> None:
    said = render(attention={"words": ["dog", "gardens"], "blocks": ["early", 99], "steps": ["90-95%"]})
    assert said.code == 2
    lines = said.err.splitlines()
    assert "attention.words.0: the prompt has no 'dog'" in lines[0]
    assert "attention.words.1: the prompt has no 'gardens'; nearest: garden" in lines[1]
    assert "attention.blocks: 99 is past the last block (3)" in lines[2]
    assert "attention.steps: none of the 2 steps is in '90-95%'" in lines[3]
    assert any("The pieces of the prompt: ▁A ▁" in line for line in lines[4:])


@pytest.mark.parametrize(
    ("maps", "problem"),
    [
        ({}, "attention.words: is missing"),
        ({"words": []}, "attention.words: expected at least 1 values, got 0"),
        ({"words": "cat"}, "attention.words: expected a list, got 'cat'"),
        ({"words": ["cat"], "blocks": "auto:top2"}, "attention.blocks: auto chooses blocks for an injection"),
        ({"words": ["cat"], "block": 1}, "attention.block: unknown key; did you mean 'blocks'?"),
        ({"words": ["cat"], "steps": [{"sigma": [0.5]}]}, "attention.steps.0.sigma: expected at least 2"),
    ],
)
def test_a_wrong_key_is_told_with_a_way_out(render: Render, maps: dict[str, Any], problem: str) -> None:
    said = render(attention=maps)
    assert said.code == 2
    assert problem in said.err


def test_plan_shows_rows_groups_and_what_recording_adds(
    known: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tiny_job(known, **SAID)
    said = run_wancli(capsys, "plan", write_job(tmp_path, job), "-v")
    shown = " ".join(said.out.split())
    assert re.search(r"attention cat \(rows 7-8\), sunlit garden \(rows 17-23\) blocks all \| 0, 3", shown)
    document = json.loads(run_wancli(capsys, "plan", tmp_path / "job.yaml", "--json").out)
    assert document["shots"][0]["attention"]["rows"] == [[7, 8], [*range(17, 24)]]
    plain = {key: value for key, value in job.items() if key != "attention"}
    without = json.loads(run_wancli(capsys, "plan", write_job(tmp_path, plain), "--json").out)
    more, less = (
        next(row["buffer"] for row in found["memory"] if row["name"] == "sample")
        for found in (document, without)
    )
    assert more - less >= 2 * 4 * 8 * 32  # the sums of eight maps, twice
    assert without["shots"][0]["attention"] is None
