"""A partial run of a job, and an edited job, do not take the other shots out of its pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import CommandResult, rule, run_wancli, tiny_job, write_job

from wancli.video import side_by_side

JOB: dict[str, Any] = {
    "output": "out/{id}.mp4",
    "compare": True,
    "matrix": {"seed": [1, 2], "inject.0.strength": [0.4, 0.9]},
    "inject": [rule(blocks="late")],
}
ALL = [f"seed{seed}-{what}" for seed in (1, 2) for what in ("strength0.4", "strength0.9", "plain")]


@pytest.fixture
def run(tmp_path: Path, known: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., CommandResult]:
    def ran(*options: str, **changes: Any) -> CommandResult:
        result = run_wancli(capsys, "render", write_job(tmp_path, tiny_job(known, **JOB | changes)), *options)
        assert result.code == 0, result.err
        return result

    return ran


def shown(folder: Path, name: str = "compare") -> list[str]:
    return sorted(shot["id"] for shot in json.loads((folder / f"out/job.{name}.json").read_text())["shots"])


def test_a_partial_run_keeps_the_others_in_the_pictures_and_says_so(
    run: Callable[..., CommandResult], tmp_path: Path
) -> None:
    said = run().err
    assert "compared 6 of 6 shots: " in said
    names = ["job.report.json", "job.compare.png", "job.compare.mp4", "job.report.html"]
    what = ["report", "sheet", "side by side", "page"]
    assert said.splitlines()[-4:] == [f"{one}: {tmp_path}/out/{name}" for one, name in zip(what, names)]
    before = json.loads((tmp_path / "out/job.compare.json").read_text())["shots"]
    partial = run("--sweep", "seed=2", "--sweep", "inject.0.strength=0.6", matrix={"frames": [1]})
    assert "compared 2 of 2 shots, and 6 of earlier runs of this job that are still there: " in partial.err
    new = ["frames1-seed2-strength0.6", "frames1-seed2-plain"]
    assert shown(tmp_path) == shown(tmp_path, "report") == sorted([*ALL, *new])
    document = json.loads((tmp_path / "out/job.compare.json").read_text())
    after = {shot["id"]: shot for shot in document["shots"]}
    assert [after[shot["id"]] for shot in before] == before
    (tmp_path / "out/seed1-plain.mp4").unlink()
    (tmp_path / "out/seed1-plain.manifest.json").unlink()
    run("--sweep", "seed=2", "--sweep", "inject.0.strength=0.7", matrix={"frames": [1]})
    assert "seed1-plain" not in shown(tmp_path) + shown(tmp_path, "report")
    assert "frames1-seed2-strength0.6" in shown(tmp_path)


def test_a_piece_that_no_longer_belongs_is_removed_and_check_names_strays(
    run: Callable[..., CommandResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(side_by_side, "MAX_VIDEOS", 4)
    run()
    out = tmp_path / "out"
    assert (out / "job.compare-2.mp4").exists()
    for path in out.glob("seed2-*"):
        path.unlink()
    run(matrix={"seed": [1], "inject.0.strength": [0.4, 0.9]})
    assert not (out / "job.compare-2.mp4").exists()
    assert run_wancli(capsys, "check", out).out.startswith("verified: ")
    (out / "job.compare-2.mp4").write_bytes((out / "job.compare.mp4").read_bytes())
    result = run_wancli(capsys, "check", out)
    assert (result.code, result.out.splitlines()[0]) == (
        0,
        f"stray, of no comparison: {out}/job.compare-2.mp4",
    )
    assert json.loads(run_wancli(capsys, "check", out, "--json").out)["strays"] == [
        str(out / "job.compare-2.mp4")
    ]


def test_a_rerun_says_what_is_done_and_what_is_new(run: Callable[..., CommandResult]) -> None:
    run(compare=False, matrix={"inject.0.strength": [0.4, 0.9]})
    again = run(compare=False, matrix={"inject.0.strength": [0.4, 0.6]})
    assert "1 of 2 shots are done already; to render: 1 (strength 0.6)\n" in again.err
    assert "are done already" not in run(compare=False, matrix={"inject.0.strength": [0.4, 0.6]}).err


def test_a_video_that_is_gone_is_told_once(
    run: Callable[..., CommandResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(compare=False)
    (tmp_path / "out/seed1-strength0.4.mp4").unlink()
    result = run_wancli(capsys, "check", tmp_path / "out")
    first, last = result.out.splitlines()
    gone = "seed1-strength0.4.mp4: is gone; job.report.json has it as rendered"
    assert (result.code, first.endswith(gone), last.endswith("problems: 1")) == (4, True, True)
