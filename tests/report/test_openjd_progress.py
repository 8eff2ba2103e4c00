"""`--progress openjd`: stdout as the filter of Open Job Description's own sessions reads it."""

from __future__ import annotations

import io
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import CommandResult, count_forwards, rule, run_wancli, tiny_job, write_job
from openjd.sessions._action_filter import ActionMessageKind, ActionMonitoringFilter

from wancli.report import openjd_progress


def read_messages(out: str) -> list[tuple[str, Any]]:
    """Return the messages that a session reads from these lines; the filter reports lines it cannot parse."""
    found: list[tuple[str, Any]] = []
    listening = ActionMonitoringFilter(
        session_id="s", callback=lambda kind, value, cancel: found.append((kind.value, value, cancel))
    )
    for line in out.splitlines():
        record = logging.LogRecord("wancli", logging.INFO, "", 0, line, (), None)
        record.session_id = "s"
        listening.filter(record)
        assert record.msg == line  # a message that is wrong gets " -- ERROR: ..."
    return [(kind, value) for kind, value, _ in found]


def progress(said: list[tuple[str, Any]]) -> list[float]:
    return [value for kind, value in said if kind == ActionMessageKind.PROGRESS.value]


ITEMS = [{"id": "one"}, {"id": "two", "seed": 2}, {"id": "long", "sampler": {"steps": 6}}]


def test_a_session_sees_the_batch_grow_to_a_hundred(
    render: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openjd_progress, "_SECONDS", 0.0)
    result = render("--progress", "openjd", items=ITEMS, output="out/{id}.mp4")
    told = read_messages(result.out)
    # 3 units for each of the short ones, 7 for the long one: the steps, and one for the rest
    assert progress(told) == [round(100 * n / 13, 1) for n in range(1, 14)]
    status = [value for kind, value in told if kind == "status"]
    assert "sample two (1 of 3 shots done)" in status
    assert {kind for kind, _ in told} == {"progress", "status"}
    paths = [line for line in result.out.splitlines() if not line.startswith("openjd_")]
    assert paths == [f"{tmp_path}/out/{item['id']}.mp4" for item in ITEMS]


def test_steps_that_shots_share_count_once(
    render: Callable[..., CommandResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openjd_progress, "_SECONDS", 0.0)
    items = [{"id": "plain"}, {"id": "late", "inject": [rule(blocks="2-3", steps="50-100%")]}]
    result = render("--progress", "openjd", items=items, output="out/{id}.mp4", sampler={"steps": 4})
    found = progress(read_messages(result.out))
    assert found == sorted(found)
    assert found[0] == round(100 / 8, 1)
    assert found[-1] == 100


def test_what_is_done_already_counts(render: Callable[..., CommandResult]) -> None:
    render(items=ITEMS, output="out/{id}.mp4")
    assert (
        progress(read_messages(render("--progress", "openjd", items=ITEMS, output="out/{id}.mp4").out))[-1]
        == 100
    )


def test_a_failure_is_reported_with_its_reason(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = run_wancli(capsys, "render", write_job(tmp_path, tiny_job(frames=4)), "--progress", "openjd")
    ((kind, reason),) = read_messages(result.out)
    assert (result.code, kind) == (2, "fail")
    assert "4 is not 4n+1" in reason


def test_being_stopped_is_not_a_failure(
    render: Callable[..., CommandResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    count_forwards(monkeypatch, lambda n: signal.raise_signal(signal.SIGTERM) if n == 2 else None)
    result = render("--progress", "openjd", sampler={"steps": 4})
    told = read_messages(result.out)
    assert result.code == 75
    assert told[-1] == (
        "status",
        "stopped by SIGTERM; 1 shot is saved in progress, 0 not started; 0 of 1 done",
    )
    assert "fail" not in [kind for kind, _ in told]


def test_no_text_of_a_job_becomes_a_message_of_its_own() -> None:
    out = io.StringIO()
    display = openjd_progress.OpenJdProgress(out)
    display.warn("so\nopenjd_env: PATH=/evil\r\nopenjd_fail: no\x1b[2J")
    ((kind, text),) = read_messages(out.getvalue())
    assert kind == "status"
    assert text.startswith("warning: so openjd_env: PATH=/evil")
