"""What is written down: manifest, report, summary, and the video itself."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import (
    CAT,
    CommandResult,
    files_in,
    manifest_of,
    rule,
    run_wancli,
    tiny_job,
    words,
    write_job,
)
from rich.table import Table

from wancli.job.loader import load
from wancli.models.vae import WanVAE
from wancli.plan.planner import build_plan
from wancli.report import render_summary
from wancli.sampling.solvers import build_sigma_schedule
from wancli.video import mp4


def test_the_manifest_says_what_was_decided_and_what_was_read(
    render: Callable[..., CommandResult], tmp_path: Path
) -> None:
    assert (
        render(
            id="one",
            labels={"take": 3},
            prompt=f"  {CAT}&amp;",
            negative="",
            sampler={"steps": 3, "solver": "dpm++"},
        ).code
        == 0
    )
    body = manifest_of(tmp_path)
    shot, official = body["shot"], build_sigma_schedule("dpm++", 3, 5.0)
    assert (shot["id"], shot["labels"], shot["output"]) == ("one", {"take": 3}, "clip.mp4")
    assert shot["timesteps"] == list(official.timesteps)
    assert shot["sigmas"] == list(official.sigmas)
    assert [text["text"] for text in body["prompts"]] == [f"{CAT}&", ""]
    assert body["prompts"][1]["tokens"] == 1
    sizes = {"dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "text_dim", "freq_dim"}
    assert body["model"]["sizes"].keys() == sizes | {"text_len", "eps"}  # earlier versions stop at any other
    assert set(body["model"]["sha256"]) == {"transformer", "text_encoder", "vae"}
    assert {"wancli", "torch", "ffmpeg"} <= body["versions"].keys()
    assert {phase["name"] for phase in body["phases"]} == {"encode", "load", "sample", "decode"}
    assert {phase["name"] for phase in body["predicted"]} == {"encode", "sample", "decode"}
    (file,) = body["files"]
    assert (file["path"], file["bytes"]) == ("clip.mp4", (tmp_path / "out/clip.mp4").stat().st_size)
    decided = build_plan(load(tmp_path / "job.yaml"), tmp_path / "memo.json").shots[0]
    assert (body["key"], body["latents_key"]) == (decided.key, decided.latents_key)


def test_the_report_holds_every_shot_and_the_memory_of_every_phase(
    render: Callable[..., CommandResult], tmp_path: Path
) -> None:
    items = [{"id": "a", "inject": [rule(blocks="late")]}, {"id": "b"}]
    result = render("--json", output="out/{id}.mp4", items=items)
    report = json.loads(result.out)
    assert report == json.loads((tmp_path / "out" / "job.report.json").read_text())
    assert report["schema"] == "wancli/report/1"
    first, second = report["shots"]
    assert first["output"] == str(tmp_path / "out" / "a.mp4")
    assert first["injection"][0]["hits"] == 2
    assert 0 <= first["injection"][0]["difference"]["verdict"]["percent"] <= 100
    assert second["injection"] == []
    assert second["shot"]["sigmas"] == first["shot"]["sigmas"]
    memory_of = {phase["name"]: phase for phase in report["memory"]}
    assert memory_of.keys() == {"encode", "load", "sample", "decode"}
    for name in ("encode", "sample", "decode"):
        phase = memory_of[name]
        assert phase["total"] == phase["model"] + phase["activation"] + phase["buffer"] > 0
        assert phase["measured"] >= 0
        assert phase["seconds"] >= 0
    assert report["cache"]["hits"] + report["cache"]["misses"] == 3
    assert first["files"][0]["sha256"]


def test_a_report_replaces_a_report_and_nothing_else(
    render: Callable[..., CommandResult], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "job.report.json").write_text('{"holiday": true}')
    for _ in range(2):
        assert render().code == 0
    reports = ["job.report.json", "job.report.old-1.json"]
    assert files_in(tmp_path) == ["clip.manifest.json", "clip.mp4", *reports]
    assert (tmp_path / "out" / "job.report.old-1.json").read_text() == '{"holiday": true}'


def test_a_folder_whose_name_is_not_utf8_can_be_rendered_into(
    render: Callable[..., CommandResult], tmp_path: Path
) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    assert render("--json", folder=folder).code == 0
    report = json.loads((folder / "out" / "job.report.json").read_text())
    assert Path(report["shots"][0]["output"]) == folder / "out" / "clip.mp4"


def test_the_summary_tells_hits_difference_and_memory(
    tmp_path: Path, warm: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANCLI_CACHE", str(warm))
    job = write_job(tmp_path, tiny_job(inject=[rule()]))
    result = run_wancli(capsys, "render", job)
    assert result.code == 0
    for part in ("27-39", "26/26", "context-lerp", "sample", "decode", "1 rendered", "report: "):
        assert part in result.err, part
    silent = run_wancli(capsys, "render", job, "-q")
    assert silent.err == ""


def test_a_phase_that_an_earlier_run_did_has_no_measure_in_the_summary() -> None:
    ran = {"name": "decode", "peak": 2**30, "measured": 2**29, "seconds": 2.0, "expected": 1.0}
    left = {"name": "sample", "peak": 2**30, "measured": 0, "seconds": 0.0, "expected": 1.0}
    table = render_summary.build_memory_table([ran, left])
    assert isinstance(table, Table)
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert columns["measured"] == ["512 MiB", "-"]
    assert columns["time"] == ["2.0 s", "-"]


def test_every_frame_of_the_plan_is_in_the_video(
    render: Callable[..., CommandResult], tmp_path: Path
) -> None:
    items = [{"id": "a", "frames": 9, "size": "80x48"}, {"id": "b", "video": {"codec": "h265", "fps": 24}}]
    assert render(output="out/{id}.mp4", items=items, memory={"decode_chunk": 2}).code == 0
    assert mp4.count_frames(tmp_path / "out" / "a.mp4") == 9
    (frame,) = mp4.read_frames(tmp_path / "out" / "b.mp4")
    assert (frame.width, frame.height) == (64, 64)


def test_the_decode_chunk_changes_no_pixel(
    render: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    real = WanVAE.decode

    def watched(self: WanVAE, z_CTYX: torch.Tensor, chunk: int) -> Any:
        seen.append([])
        for frames in real(self, z_CTYX, chunk):
            seen[-1].append(frames.shape[1])
            yield frames

    monkeypatch.setattr(WanVAE, "decode", watched)
    for chunk in (1, 2):
        assert render(folder=tmp_path / str(chunk), frames=5, memory={"decode_chunk": chunk}).code == 0
    assert [sum(counts) for counts in seen] == [5, 5]
    assert max(seen[0]) <= 4
    one, two = (mp4.read_frames(tmp_path / str(chunk) / "out/clip.mp4") for chunk in (1, 2))
    assert all(abs(a - b) <= 1 for f, g in zip(one, two, strict=True) for a, b in zip(f.rgb, g.rgb))


def test_a_prompt_at_the_edge_of_its_256_tokens_renders_and_one_more_does_not(
    render: Callable[..., CommandResult], tmp_path: Path
) -> None:
    assert render(prompt=words(256)).code == 0
    assert manifest_of(tmp_path)["prompts"][0]["tokens"] == 256
    result = render(prompt=words(257))
    assert result.code == 2
    assert "job.yaml:3: prompt: the prompt has 257 tokens, text.max_tokens is 256" in result.err
    assert "text.max_tokens: 512" in result.err
    assert render(folder=tmp_path / "cut", prompt=words(600), text={"truncate": True}).code == 0
    assert manifest_of(tmp_path / "cut")["prompts"][0]["truncated"]


def test_shots_that_were_not_asked_for_have_what_their_manifests_say(
    render: Callable[..., CommandResult], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "output": "out/{id}.mp4",
        "items": [{"id": id, "seed": ord(id)} for id in "abc"],
    }
    assert render("--items", "0-1", **changes).code == 0
    path = tmp_path / "out/job.report.json"
    path.unlink()
    assert render("--items", "0", **changes).code == 0
    shots = json.loads(path.read_text())["shots"]
    assert [shot["status"] for shot in shots] == ["already done", "already done", "not started"]
    assert shots[1]["key"] == manifest_of(tmp_path, "b")["key"]
