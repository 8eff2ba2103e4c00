"""`wancli status`: where a batch stands, shot by shot."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from jobs import NETWORKS, CommandResult, count_forwards, run_wancli, tiny_job, write_job
from rich.cells import cell_len

from wancli.job.loader import load
from wancli.models.dit import WanModel
from wancli.plan.planner import build_plan
from wancli.report import status
from wancli.storage import tensor_file
from wancli.storage.claims import Claims

ITEMS = [{"id": "a"}, {"id": "b", "seed": 2}, {"id": "c", "seed": 3}]
CHANGES: dict[str, Any] = {"items": ITEMS, "output": "out/{id}.mp4", "sampler": {"steps": 4}}


@pytest.fixture
def states(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], warm: Path
) -> Callable[..., dict[str, dict[str, Any]]]:
    def asked(*options: str) -> dict[str, dict[str, Any]]:
        result = run_wancli(capsys, "status", tmp_path / "job.yaml", "--json", "--cache-dir", warm, *options)
        assert (result.code, result.err) == (0, "")
        return {shot["id"]: shot for shot in json.loads(result.out)["shots"]}

    return asked


def test_before_during_and_after(
    render: Callable[..., CommandResult],
    states: Any,
    quick: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_job(tmp_path, tiny_job(quick, **CHANGES))
    assert [shot["state"] for shot in states().values()] == ["to do"] * 3
    with monkeypatch.context() as patch:
        # 8 forwards a shot; in the second step of the second somebody asks for an end
        count_forwards(patch, lambda n: signal.raise_signal(signal.SIGTERM) if n == 10 else None)
        assert render(**CHANGES).code == 75
    found = states()
    assert [shot["state"] for shot in found.values()] == ["done", "half done", "to do"]
    assert (found["b"]["step"], found["b"]["steps"]) == (2, 4)
    age = datetime.now(UTC) - datetime.fromisoformat(found["b"]["saved"])
    assert timedelta(seconds=-1) < age < timedelta(minutes=5)
    assert render(**CHANGES).code == 0
    assert [shot["state"] for shot in states().values()] == ["done"] * 3


def test_a_failed_shot_has_its_reason_until_it_is_done(
    render: Callable[..., CommandResult], states: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        real = WanModel.predict_velocities
        patch.setattr(
            WanModel, "predict_velocities", lambda *a, **k: [v * float("nan") for v in real(*a, **k)]
        )
        assert render(**CHANGES).code == 1
    found = states()["a"]
    assert (found["state"], found["error"]["code"]) == ("failed", "shot.not_finite")
    assert render(**CHANGES).code == 0
    assert (states()["a"]["state"], states()["a"]["error"]) == ("done", None)


def test_a_latent_alone_and_a_video_in_the_way_are_told_apart(
    render: Callable[..., CommandResult], states: Any, tmp_path: Path
) -> None:
    changes = CHANGES | {"video": {"keep_latents": True}}
    render(**changes)
    for name in ("a.mp4", "a.manifest.json"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out/b.manifest.json").unlink()
    (tmp_path / "out/b.latents.safetensors").unlink()
    found = states()
    assert [shot["state"] for shot in found.values()] == ["latent only", "in the way", "done"]
    assert found["a"]["step"] == 4


def test_the_videos_of_a_job_that_was_edited_since_are_in_the_way_and_take_no_time(
    render: Callable[..., CommandResult],
    states: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    warm: Path,
) -> None:
    assert render(**CHANGES).code == 0
    edited = ("--set", "sampler.shift=4")
    assert [shot["state"] for shot in states(*edited).values()] == ["in the way"] * 3
    reason = "made with sampler.shift 5.0, now 4.0"
    assert [shot["why"] for shot in states(*edited).values()] == [reason] * 3
    told = {
        asked: run_wancli(capsys, asked, tmp_path / "job.yaml", "--cache-dir", warm, *edited).out
        for asked in ("status", "plan")
    }
    assert f"    0 a  already exists  {reason}\n" in told["status"]
    assert f"0-2 already exists: {reason}\n" in told["plan"]
    assert re.search(r"\n0  a +\d+ +already exists", told["plan"])
    for asked in ("status", "plan"):
        result = run_wancli(capsys, asked, tmp_path / "job.yaml", "--json", "--cache-dir", warm, *edited)
        assert json.loads(result.out)["time"]["seconds"] == 0


def test_a_video_that_lacks_only_its_manifest_is_one_that_its_latent_is_there_for(
    render: Callable[..., CommandResult], states: Any, tmp_path: Path
) -> None:
    changes = CHANGES | {"video": {"keep_latents": True}}
    assert render(**changes).code == 0
    (tmp_path / "out/a.manifest.json").unlink()
    assert states()["a"]["state"] == "latent only"
    assert render(**changes).code == 0  # which makes the same bytes, and that is no overwriting
    assert states()["a"]["state"] == "done"


def test_a_shot_that_a_worker_holds_names_it(states: Any, quick: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path, tiny_job(quick, **CHANGES))
    shots = build_plan(load(job), tmp_path / "memo").shots
    for shot in shots:
        shot.output.parent.mkdir(exist_ok=True)
    with Claims() as claims:
        claims.take(shots[1:2])
        found = states()
        assert [shot["state"] for shot in found.values()] == ["to do", "claimed", "to do"]
        assert found["b"]["claim"].keys() == {"host", "pid", "since"}
    assert states()["b"]["state"] == "to do"


@pytest.mark.parametrize("content", ["", "{", '{"host": "far", "pid": 7, "started": "yesterday"}'])
def test_a_claim_that_is_torn_is_a_claim(
    capsys: pytest.CaptureFixture[str], quick: Path, tmp_path: Path, content: str
) -> None:
    job = write_job(tmp_path, tiny_job(quick, **CHANGES))
    claim = tmp_path / "out/.wancli/claims/a.json"
    claim.parent.mkdir(parents=True)
    claim.write_text(content)
    result = run_wancli(capsys, "status", job)
    assert (result.code, "1 rendering" in result.out) == (0, True)
    assert ("by far:7" if "far" in content else "by unknown:0") in result.out


def test_the_time_left_counts_what_is_left(
    render: Callable[..., CommandResult], capsys: pytest.CaptureFixture[str], tmp_path: Path, warm: Path
) -> None:
    NETWORKS.clear()  # a process that has the networks measures no loading
    render(**CHANGES | {"video": {"keep_latents": True}})

    def left() -> float:
        result = run_wancli(capsys, "status", tmp_path / "job.yaml", "--json", "--cache-dir", warm)
        return float(json.loads(result.out)["time"]["seconds"])

    assert left() == 0
    for name in ("a.mp4", "a.manifest.json"):
        (tmp_path / "out" / name).unlink()
    decode = left()
    (tmp_path / "out/a.latents.safetensors").unlink()
    assert 0 < decode < left()


def test_steps_that_are_on_disk_need_no_time_any_more(
    render: Callable[..., CommandResult],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    warm: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = CHANGES | {"items": ITEMS[:1]}
    NETWORKS.clear()  # a process that has the networks measures no loading

    def left(*options: str) -> float:
        asked = ["status", tmp_path / "job.yaml", "--json", "--cache-dir", warm]
        return float(json.loads(run_wancli(capsys, *asked, *options).out)["time"]["seconds"])

    assert render(**changes | {"seed": 9, "output": "other/{id}.mp4"}).code == 0  # which tells the rates
    with monkeypatch.context() as patch:
        count_forwards(patch, lambda n: signal.raise_signal(signal.SIGTERM) if n == 2 else None)
        assert render(**changes).code == 75
    begun, fresh = left(), left("--set", "seed=3")
    (tmp_path / "out/a.state.safetensors").unlink()
    assert 0 < begun < left() == pytest.approx(fresh)


def test_a_watch_shows_the_status_again_until_nothing_is_left_to_do(
    capsys: pytest.CaptureFixture[str], shallow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = write_job(tmp_path, tiny_job(shallow, **CHANGES))
    found = [{"done": done, "to do": 3 - done} for done in (0, 2, 3)]
    real = status.status_document

    def look(*arguments: Any) -> dict[str, Any]:
        document = real(*arguments)
        return document | {"counts": document["counts"] | found.pop(0)}

    naps: list[float] = []
    monkeypatch.setattr(status, "status_document", look)
    monkeypatch.setattr("wancli.commands.status.time.sleep", naps.append)
    result = run_wancli(capsys, "status", job, "--watch")
    told = [line for line in result.out.splitlines() if line.startswith("job, 3 shots")]
    assert told == [
        "job, 3 shots: 3 to do",
        "job, 3 shots: 2 done, 1 to do",
        "job, 3 shots: 3 done",
    ]
    assert (result.code, found, len(naps)) == (0, [], 2)
    refused = run_wancli(capsys, "status", job, "--watch", "--json")
    assert (refused.code, refused.out) == (2, "")


@pytest.fixture
def tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("tokyo")
def test_a_thousand_shots_are_a_screen_of_80_columns() -> None:
    errors = {
        "failed": {"message": "NaN or Inf\nin block 7 " * 9},
        "unreadable": {"message": "cannot be read: Input/output error", "where": "/out/a.mp4"},
    }

    def row(index: int) -> dict[str, Any]:
        state = status.STATES[index % len(status.STATES)] if index < 100 else "to do"
        return {
            "index": index,
            "id": f"{index:03}-猫-a-very-long-name-of-a-shot",
            "state": state,
            "step": 3,
            "steps": 50,
            "saved": "2026-11-23T10:00:00+00:00" if state in ("half done", "claimed") else None,
            "claim": {"host": "node-17.farm.example.org", "pid": 12345, "since": "2026-11-23T09:00:00+00:00"}
            if state == "claimed"
            else None,
            "why": "made with inject.0.strength 0.9, now 0.6" if state == "in the way" else "",
            "error": errors.get(state),
        }

    rows = [row(index) for index in range(1000)]
    counts = {state: sum(r["state"] == state for r in rows) for state in status.STATES}
    document = {"job": "sweep", "counts": counts, "shots": rows, "time": {"seconds": 7300}}
    shown = [*status.format_status(document, datetime(2026, 11, 23, 10, 3, tzinfo=UTC))]
    assert len(shown) < 25
    assert shown[0].startswith("sweep, 1,000 shots: 13 done, 13 rendering, 13 half done")
    assert shown[1] == "done by manifest and size alone; `wancli check` reads the videos"
    assert shown[2].startswith("time left: about 2.0 h")
    assert all(cell_len(line) <= 80 for line in shown[1:]), max(shown[1:], key=cell_len)
    assert shown[3] == "    1 001-猫-a-very-long-name-of-a-shot  rendering"
    assert shown[4] == "        by node-17:12345 since 2026-11-23 18:00:00 JST; step 3 of 50,"
    assert shown[5] == "        saved 3 min 0 s ago"
    assert shown[-2] == "      and 69 more; --json lists all"
    assert re.match(r"to do: 7,15,23", shown[-1])


def test_it_needs_no_torch(tmp_path: Path, quick: Path) -> None:
    job = write_job(tmp_path, tiny_job(quick, **CHANGES))
    program = f"import sys; from wancli.cli import run; run(['status', {str(job)!r}])"
    program += "; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-2:] == ["to do: 0-2 (a, b, c)", "False"]


def test_a_state_that_goes_while_it_is_looked_at_is_no_error(
    render: Callable[..., CommandResult], states: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        count_forwards(patch, lambda n: signal.raise_signal(signal.SIGTERM) if n == 2 else None)
        assert render(**CHANGES).code == 75
    real = tensor_file.read_record

    def peek(path: Path, form: Any) -> Any:
        found = real(path, form)
        path.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(tensor_file, "read_record", peek)
    found = states()["a"]
    assert (found["state"], found["saved"]) == ("half done", None)
