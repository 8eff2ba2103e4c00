"""--force: files from before the render do not count, files made since do."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jobs import KEPT, CommandResult, count_forwards, files_in

from wancli import errors
from wancli.engine.context import Force
from wancli.models.dit import WanModel
from wancli.storage import atomic


def test_a_file_is_outdated_until_it_is_written_even_with_the_same_bytes(tmp_path: Path) -> None:
    parts = {name: tmp_path / name for name in ("manifest", "state", "latents")}
    shot: Any = SimpleNamespace(index=7, **parts)
    parts["manifest"].write_bytes(b"as it was")
    force = Force.snapshot([shot])
    assert [force.is_outdated(shot, part) for part in ("manifest", "state", "latents")] == [True] * 3
    atomic.replace(parts["manifest"], b"as it was")
    atomic.replace(parts["latents"], b"new")
    assert [force.is_outdated(shot, part) for part in ("manifest", "state", "latents")] == [
        False,
        True,
        False,
    ]


def test_a_retry_does_not_mistake_the_latent_of_an_earlier_run_for_its_own(
    render: Callable[..., CommandResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert render(video=KEPT).code == 0
    calls = count_forwards(monkeypatch)
    counted, full = WanModel.predict_velocities, [errors.OutOfMemory("full")]

    def velocities(self: WanModel, *arguments: Any) -> Any:
        if full:
            raise full.pop()
        return counted(self, *arguments)

    monkeypatch.setattr(WanModel, "predict_velocities", velocities)
    assert render("--force", "--retries", "1", video=KEPT).code == 0
    assert (full, len(calls)) == ([], 4)


@pytest.mark.parametrize("again", [(), ("--force",)])
def test_the_state_of_a_stopped_force_goes_with_the_next_render(
    render: Callable[..., CommandResult],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    again: tuple[str, ...],
) -> None:
    assert render().code == 0
    with monkeypatch.context() as patch:
        count_forwards(patch, lambda n: signal.raise_signal(signal.SIGTERM) if n == 0 else None)
        assert render("--force").code == 75
    assert "clip.state.safetensors" in files_in(tmp_path)
    assert render(*again).code == 0
    assert [name for name in files_in(tmp_path) if "state" in name] == []


def test_a_state_of_something_else_stays(render: Callable[..., CommandResult], tmp_path: Path) -> None:
    assert render().code == 0
    (tmp_path / "out/clip.state.safetensors").write_bytes(b"mine")
    assert render().code == 0
    assert (tmp_path / "out/clip.state.safetensors").read_bytes() == b"mine"
