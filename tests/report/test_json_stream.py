"""The events of `render --json-stream`: every line fits the published schema, however the command ends."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from forked import run, start
from jobs import CAT, FISH, CommandResult, count_forwards, manifest_of, rule, run_wancli, tiny_job, write_job
from unread import small_pipe

from wancli import stdio
from wancli.engine import batch, outcome
from wancli.errors import FfmpegError, error_types
from wancli.models.dit import WanModel
from wancli.progress import Progress
from wancli.report import event_schema, json_stream

SCHEMA = event_schema.build_event_schema()
_ = jsonschema.Draft202012Validator.check_schema(SCHEMA)
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def events(text: str) -> list[dict[str, Any]]:
    """Parse the lines, and check each against the schema; the last is the only envelope."""
    found = [json.loads(line) for line in text.splitlines()]
    known = {one["properties"]["type"]["const"]: one["required"] for one in SCHEMA["oneOf"]}
    for event in found:
        VALIDATOR.validate(event)
        assert event.keys() == {*known[event["type"]]}
    assert [event["type"] for event in found].count("envelope") == 1
    assert found[-1]["type"] == "envelope"
    assert [event["time"] for event in found] == sorted(event["time"] for event in found)
    return found


def of(kind: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in found if event["type"] == kind]


def test_a_gap_counts_the_steps_that_were_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "_STEP_SECONDS", 0.0)
    reader, fd = small_pipe()
    out = stdio.open_writer(fd, encoding="utf-8", write_through=False, patient=False)
    stream = json_stream.JsonStream(out)
    for done in range(3000):
        stream.on_step("sample", ["a"], done, 3000)
    stream.note("the end")
    said = b""
    while b"the end" not in said:
        said += os.read(reader, 1 << 16)
    found = [json.loads(line) for line in said.splitlines()]
    for event in found:
        VALIDATOR.validate(event)
    (gap,) = of("gap", found)
    assert gap["lines"] + len(of("step", found)) == 3000
    assert of("step", found)[-1]["done"] == 2999
    stdio.close_writer(out)
    for end in (reader, fd):
        os.close(end)


@pytest.fixture
def say(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., CommandResult]:
    """Return a function that runs one command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run_wancli(capsys, *arguments)


ITEMS = [{"id": "one", "labels": {"take": 1}}, {"id": "two", "seed": 2}]


def test_a_batch_is_reported_event_by_event(render: Callable[..., CommandResult], tmp_path: Path) -> None:
    result = render("--json-stream", items=ITEMS, output="out/{id}.mp4", inject=[rule(blocks="2-3")])
    found = events(result.out)
    assert (result.code, result.err) == (0, "")
    plan, envelope = found[0], found[-1]
    assert [shot["id"] for shot in plan["shots"]] == ["one", "two"]
    assert (plan["steps"], plan["shared_steps"]) == (4, 0)
    for name, shot in zip(("one", "two"), plan["shots"]):
        story = [(e["type"], e.get("state")) for e in found if name in (e.get("id"), *e.get("shots", []))]
        kinds_of = [kind for kind in story if kind != ("step", None)]
        assert kinds_of == [
            ("shot-started", None),
            ("phase", "begin"),
            ("phase", "end"),
            ("phase", "begin"),
            ("phase", "end"),
            ("shot-finished", None),
        ]
        finished = next(e for e in of("shot-finished", found) if e["id"] == name)
        body = manifest_of(tmp_path, name)
        assert finished["key"] == shot["key"] == body["key"]
        assert finished["path"] == str(tmp_path / f"out/{name}.mp4")
        assert finished["sha256"] == body["files"][0]["sha256"]
        assert finished["status"] == "rendered"
        assert finished["seconds"] > 0
        assert finished["labels"] == shot["labels"] == ({"take": 1} if name == "one" else {})
    assert (envelope["ok"], envelope["exit_code"], envelope["error"]) == (True, 0, None)
    assert envelope["data"]["counts"] | {"shots": 2, "rendered": 2} == envelope["data"]["counts"]
    assert Path(envelope["data"]["report"]).exists()
    assert CAT not in result.out
    assert FISH not in result.out


def test_a_finished_shot_is_reported_as_already_done(render: Callable[..., CommandResult]) -> None:
    first = of("shot-finished", events(render("--json-stream").out))
    again = events(render("--json-stream").out)
    (finished,) = of("shot-finished", again)
    assert (finished["status"], finished["seconds"]) == ("already done", None)
    assert finished["sha256"] == first[0]["sha256"]
    assert [event["type"] for event in again] == ["plan", "shot-finished", "envelope"]
    assert again[-1]["data"]["counts"]["already_done"] == 1


def test_comparing_is_reported_and_starts_no_finished_shot(
    render: Callable[..., CommandResult], tmp_path: Path
) -> None:
    for state in ("rendered", "already done"):
        found = events(render("--json-stream", items=ITEMS, output="out/{id}.mp4", compare=True).out)
        assert [event["status"] for event in of("shot-finished", found)] == [state] * 2
        assert len(of("shot-started", found)) == (2 if state == "rendered" else 0)
        ended = [event for event in of("phase", found) if event["state"] == "end"][-2:]
        told = [(event["name"], event["done"], event["total"]) for event in ended]
        assert told == [("compare", 2, 2), ("draw", 2, 2)]
        (tmp_path / "out/job.compare.json").unlink()


def test_the_plan_reports_shared_steps(render: Callable[..., CommandResult]) -> None:
    items = [{"id": "plain"}, {"id": "late", "inject": [rule(blocks="2-3", steps="1-1")]}]
    found = events(render("--json-stream", items=items, output="out/{id}.mp4").out)
    assert (found[0]["steps"], found[0]["shared_steps"]) == (4, 1)


def test_a_note_is_not_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    with json_stream.JsonStream(sys.stdout) as display:
        display.note("shot a: to worker 1 of 2")
        display.warn("worker 1 died for good")
    told = [(event["type"], event["message"]) for event in events(capsys.readouterr().out)[:-1]]
    assert told == [("note", "shot a: to worker 1 of 2"), ("warning", "worker 1 died for good")]


def test_a_failed_shot_has_its_error_and_the_envelope_the_exit_code(
    render: Callable[..., CommandResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = WanModel.predict_velocities

    def sick(self: WanModel, requests: Any, riders: Any = None) -> Any:
        return [v * float("nan") for v in real(self, requests, riders)]

    monkeypatch.setattr(WanModel, "predict_velocities", sick)
    result = render("--json-stream")
    found = events(result.out)
    (failed,) = of("shot-failed", found)
    assert failed["error"]["code"] == "shot.not_finite"
    assert (result.code, found[-1]["exit_code"]) == (1, 1)
    assert found[-1]["error"] == failed["error"]
    assert found[-1]["data"]["counts"]["failed"] == 1
    assert "shot-finished" not in [event["type"] for event in found]


def test_a_wrong_job_leaves_only_the_envelope(say: Callable[..., CommandResult], tmp_path: Path) -> None:
    result = say("render", write_job(tmp_path, tiny_job(frames=4)), "--json-stream")
    (envelope,) = events(result.out)
    assert (result.code, envelope["exit_code"], envelope["ok"]) == (2, 2, False)
    assert envelope["error"]["code"] == "job"
    assert "4 is not 4n+1" in envelope["error"]["message"]
    assert envelope["data"]["counts"]["shots"] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["render", "--json-stream", "--farce"],
        ["render", "a.yaml", "--json-stream", "--json"],
        ["render", "a.yaml", "--json-stream", "--progress", "openjd"],
        ["render", "a.yaml", "--json-stream", "--log-level", "loud"],
        ["--json-stream", "render", "a.yaml"],
    ],
    ids=" ".join,
)
def test_so_does_a_command_line_that_is_wrong(
    say: Callable[..., CommandResult], arguments: list[str]
) -> None:
    result = say(*arguments)
    (envelope,) = events(result.out)
    assert (result.code, envelope["exit_code"], envelope["command"]) == (2, 2, "render")
    assert (envelope["ok"], envelope["error"]["code"]) == (False, "usage")


@pytest.mark.parametrize("kind", error_types(), ids=lambda kind: kind.code)
def test_whatever_ends_a_batch_is_in_the_envelope(
    say: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    def fails(*_: object) -> None:
        raise kind("went wrong", where="here", hint="Try there.")

    monkeypatch.setattr(batch, "render", fails)
    result = say("render", write_job(tmp_path, tiny_job()), "--json-stream", "-q")
    plan, envelope = events(result.out)
    assert (plan["type"], result.code) == ("plan", kind.status)
    assert envelope["exit_code"] == kind.status
    assert envelope["error"] == kind("went wrong", where="here", hint="Try there.").as_dict()
    assert envelope["data"]["counts"]["not_started"] == 1


def test_so_is_a_bug(
    say: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "render", lambda *_: 1 / 0)
    result = say("render", write_job(tmp_path, tiny_job()), "--json-stream")
    envelope = events(result.out)[-1]
    assert (result.code, envelope["exit_code"]) == (70, 70)
    assert envelope["error"]["code"] == "bug"
    assert envelope["error"]["message"] == "ZeroDivisionError: division by zero"


def test_ctrl_c_before_the_work_starts_is_in_the_envelope(
    say: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wancli.plan.planner.build_plan", interrupted)
    result = say("render", write_job(tmp_path, tiny_job()), "--json-stream")
    (envelope,) = events(result.out)
    assert (result.code, envelope["exit_code"]) == (130, 130)
    assert envelope["error"]["code"] == "stopped.interrupted"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("when", ["planning", "sampling"])
def test_a_signal_ends_the_stream_with_75_while_planning_as_while_sampling(
    render: Callable[..., CommandResult], monkeypatch: pytest.MonkeyPatch, number: signal.Signals, when: str
) -> None:
    before = signal.getsignal(number)
    if when == "planning":
        monkeypatch.setattr("wancli.plan.planner.build_plan", lambda *_, **__: signal.raise_signal(number))
    else:
        count_forwards(monkeypatch, lambda n: signal.raise_signal(number) if n == 2 else None)
    result = render("--json-stream", items=ITEMS, output="out/{id}.mp4")
    found = events(result.out)
    assert (result.code, found[-1]["exit_code"], found[-1]["error"]["code"]) == (75, 75, "stopped")
    assert found[-1]["error"]["retryable"]
    assert signal.getsignal(number) is before
    if when == "sampling":
        left = of("shot-left", found)
        assert [(event["id"], event["status"]) for event in left] == [("one", "stopped")]
        counts = found[-1]["data"]["counts"]
        assert (counts["stopped"], counts["not_started"]) == (1, 1)
        assert found[-1]["data"]["report"]


def test_each_line_is_there_at_once(tmp_path: Path, quick: Path, warm: Path) -> None:
    job = write_job(tmp_path, tiny_job(quick, sampler={"steps": 200}))
    with start("render", job, "--json-stream", "-q", "--cache-dir", warm) as running:
        assert running.stdout
        lines, asked = [], False
        for line in running.stdout:
            lines.append(line)
            event = json.loads(line)
            if event["type"] == "step" and event["name"] == "sample" and not asked:
                assert running.poll() is None
                running.terminate()
                asked = True
        assert running.wait(60) == 75
    assert of("shot-left", events("".join(lines)))


def test_a_reader_that_goes_away_does_not_end_the_work(tmp_path: Path, known: Path, lost_reader: int) -> None:
    result = run("render", write_job(tmp_path, tiny_job(known)), "--json-stream", stdout=lost_reader)
    assert result.returncode == 0
    assert "stdout has no reader any more; the work continues" in result.stderr
    assert manifest_of(tmp_path)["key"]


def test_the_consumer_in_the_documents_consumes_a_real_stream(tmp_path: Path, known: Path) -> None:
    root = Path(__file__).parents[2]
    (block,) = re.findall(r"```python\n(.*?)```", (root / "docs/machines.md").read_text(), re.DOTALL)
    program = tmp_path / "wancli"
    program.write_text(f"#!{sys.executable}\nfrom wancli.__main__ import main\nmain()\n")
    program.chmod(0o755)
    write_job(tmp_path, tiny_job(known))
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = subprocess.run(
        [sys.executable, "-c", block],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"0000 {tmp_path}/out/clip.mp4 {manifest_of(tmp_path)['files'][0]['sha256'][:12]}" in result.stdout


# ---- what the parts do ----


def test_at_most_ten_steps_a_second_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(json_stream.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    display: Progress = json_stream.JsonStream(out)
    with display.phase("encode", (), 1000) as phase:
        for _ in range(1000):
            now[0] += 0.01
            phase.advance()
    found = [json.loads(line) for line in out.getvalue().splitlines()]
    steps = of("step", found)
    assert 90 <= len(steps) <= 100
    assert [event["done"] for event in of("phase", found)] == [0, 1000]


def test_an_envelope_takes_its_error_from_the_shot_that_gave_the_exit_code(tmp_path: Path) -> None:
    def failed(id: str, error: Exception) -> Any:
        shot = SimpleShot(id)
        return outcome.Outcome(shot, "failed", error=error)  # type: ignore[arg-type]

    out = io.StringIO()
    with json_stream.JsonStream(out) as display:
        display.on_outcome(failed("a", error_types()[0]("first")))
        display.on_outcome(failed("b", FfmpegError("second")))
        display.on_end(FfmpegError.status, None)
    envelope = events(out.getvalue())[-1]
    assert (envelope["exit_code"], envelope["error"]["code"]) == (3, "machine.ffmpeg")


class SimpleShot:
    index, labels, key, output = 0, {}, "0" * 64, Path("a.mp4")

    def __init__(self, id: str) -> None:
        self.id = id
