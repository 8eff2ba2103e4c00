"""--engine ray: workers of a cluster of this machine; one dies, all are stopped, Ray is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jobs import KEPT, CommandResult, files_in, latents_of, rule, tiny_job, write_job

from wancli.engine.context import Force
from wancli.errors import Bug, InjectionMissed, MachineError, NoSpace, WancliError
from wancli.farm.ray_driver import _ActorSlot, _match, _read_outcomes
from wancli.farm.ray_worker import Task, Worker, error_from_dict, error_to_dict
from wancli.job.cli_overrides import NO_OVERRIDES
from wancli.job.loader import load
from wancli.plan.planner import build_plan
from wancli.plan.render_plan import Plan

Render = Callable[..., CommandResult]
IDS = "abcdefgh"
JOB: dict[str, Any] = {
    "output": "out/{id}.mp4",
    "items": [{"id": id, "seed": ord(id)} for id in IDS],
    "inject": [rule(blocks="all", region=[0, 0, 0.4, 1])],
    "sampler": {"steps": 40},
    "video": KEPT,
    "save_every": 1,
}


@pytest.fixture
def start_driver(tmp_path: Path, quick: Path, warm: Path) -> Iterator[subprocess.Popen[str]]:
    """Start the command with two workers, in a process of its own: Ray warns, and keeps global state."""
    job = write_job(tmp_path, tiny_job(quick, **JOB))
    short = tempfile.mkdtemp(prefix="r", dir="/tmp")
    program = "import os; os.cpu_count = lambda: 2; from wancli.__main__ import main; main()"
    arguments = ["render", job, "--engine", "ray", "--cpus-per-worker", "1", "--cache-dir", warm]
    with subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"RAY_TMPDIR": short},
    ) as child:
        yield child
        child.kill()
    shutil.rmtree(short, ignore_errors=True)


def find_busy_worker(folder: Path, driver: subprocess.Popen[str]) -> int:
    """Return the process of a worker that has saved a step and is not done."""
    while driver.poll() is None:
        for claim in (folder / "out/.wancli/claims").glob("*.json"):
            try:
                pid = int(json.loads(claim.read_bytes())["pid"])
            except (OSError, ValueError):
                continue
            if (folder / "out" / f"{claim.stem}.state.safetensors").exists():
                return pid
        time.sleep(0.005)
    raise AssertionError(driver.communicate())


def test_a_worker_that_is_killed_is_started_again_and_no_shot_is_rendered_twice(
    start_driver: subprocess.Popen[str], tmp_path: Path, render: Render
) -> None:
    victim = find_busy_worker(tmp_path, start_driver)
    assert victim != start_driver.pid
    os.kill(victim, signal.SIGKILL)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.manifest.json")}
    out, err = start_driver.communicate()
    assert start_driver.returncode == 0, err
    assert sorted(out.split()) == [f"{tmp_path}/out/{id}.mp4" for id in IDS]
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    made = {f"{id}{end}" for id in IDS for end in (".mp4", ".manifest.json", ".latents.safetensors")}
    (report,) = set(files_in(tmp_path)) - made
    shots = json.loads((tmp_path / "out" / report).read_text())["shots"]
    assert {shot["status"] for shot in shots} <= {"rendered", "already done"}
    assert all(shot["key"] for shot in shots)
    assert render(folder=tmp_path / "alone", **JOB | {"items": JOB["items"][:2]}).code == 0
    for id in "ab":
        assert torch.equal(latents_of(tmp_path, id), latents_of(tmp_path / "alone", id))


def test_a_stopped_driver_lets_its_workers_save_and_prints_how_to_resume(
    start_driver: subprocess.Popen[str], tmp_path: Path, render: Render
) -> None:
    find_busy_worker(tmp_path, start_driver)
    start_driver.terminate()
    out, err = start_driver.communicate()
    assert start_driver.returncode == 75, err
    assert "  resume: wancli render " in err
    done = {Path(line).stem for line in out.split()}
    assert len(done) < len(IDS)
    saved = {path.name[0] for path in (tmp_path / "out").glob("?.*.safetensors")} - done
    assert re.search(rf"stopped by SIGTERM; {len(saved)} shots? (is|are) saved in progress", err), err
    assert not (tmp_path / "out/.wancli").exists()  # claims were given up, not left
    assert "h" not in done | saved
    rest = saved | {"h"}  # and one that was not started
    said = render(**JOB | {"items": [item for item in JOB["items"] if item["id"] in rest]})
    assert said.code == 0, said.err
    assert {path.stem for path in (tmp_path / "out").glob("*.mp4")} == done | rest


def test_without_ray_the_message_names_what_to_install(
    render: Render, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    said = render("--engine", "ray")
    assert said.code == 3
    assert said.err == (
        "wancli: --engine ray needs Ray, which is not installed\n  pip install 'wancli[ray]'\n"
    )


def test_options_of_the_engine_and_jobs_that_no_worker_can_read_are_usage_errors(render: Render) -> None:
    assert render("--address", "auto").code == 2
    assert render("--cpus-per-worker", "2").code == 2
    assert render("--engine", "ray", "--socket", "auto").code == 2


def test_a_cluster_that_is_not_found_or_too_small_is_reported(
    render: Render, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nobody(types.ModuleType):
        def init(self, address: str, **_: Any) -> None:
            if address == "auto":
                raise ConnectionError("no running Ray instance was found")

        def nodes(self) -> list[dict[str, Any]]:
            return [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 64.0}}]

        def shutdown(self) -> None:
            pass

    monkeypatch.setitem(sys.modules, "ray", Nobody("ray"))
    said = render("--engine", "ray", "--address", "auto")
    assert said.code == 3
    assert said.err.startswith("wancli: --address auto: no Ray cluster: no running Ray instance was found\n")
    said = render("--engine", "ray", "--cpus-per-worker", "8")
    assert said.code == 3
    assert said.err.startswith("wancli: --engine ray: the cluster has no machine with 8 cores")


def test_a_worker_that_would_render_other_pixels_or_finds_no_folder_reports_it(
    tmp_path: Path, quick: Path, warm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job, whole = write_plan(tmp_path, quick)
    task = Task(str(job), str(tmp_path), NO_OVERRIDES, str(warm), False, None, 0, True)
    said = Worker(task).render({shot.index: "another key" for shot in whole.shots})
    assert said["outcomes"] == []
    assert "would render other pixels than the driver" in said["raised"]["message"]
    said = Worker(replace(task, folder=str(tmp_path / "gone"))).render({0: whole.shots[0].key})
    assert said["raised"]["where"] == str(tmp_path / "gone")
    assert "cannot open it: No such file or directory" in said["raised"]["message"]


def test_what_is_done_needs_no_cluster(render: Render, monkeypatch: pytest.MonkeyPatch) -> None:
    assert render().code == 0
    monkeypatch.setitem(sys.modules, "ray", None)
    said = render("--engine", "ray")
    assert (said.code, said.err) == (0, "")


def test_shots_go_to_the_worker_that_has_their_model() -> None:
    def wave(model: str) -> Any:
        return [SimpleNamespace(model=model)]

    def seat(number: int, model: Any) -> _ActorSlot:
        return _ActorSlot(number, None, model)

    idle, waves = [seat(1, "a"), seat(2, None), seat(3, "b")], [wave("c"), wave("b"), wave("c"), wave("c")]
    found = [_match(idle, waves) for _ in range(3)]
    # b to the one that has b; c to one that has nothing before another loses what it has
    assert [(one.number, shots[0].model) for one, shots in found] == [(3, "b"), (2, "c"), (1, "c")]
    assert (idle, len(waves)) == ([], 1)


@pytest.mark.parametrize("kind", [NoSpace, InjectionMissed, Bug])
def test_errors_come_over_the_wire_as_they_were(kind: type[WancliError]) -> None:
    error = kind("a message", where="a place", hint="a way out")
    other = error_from_dict(json.loads(json.dumps(error_to_dict(error))))
    assert (type(other), str(other), other.hint) == (kind, "a place: a message", "a way out")


def write_plan(folder: Path, model: Path, **changes: Any) -> tuple[Path, Plan]:
    job = write_job(
        folder, tiny_job(model, **JOB | {"items": JOB["items"][:2], "sampler": {"steps": 2}} | changes)
    )
    return job, build_plan(load(job), folder / "memo")


def test_an_output_that_this_host_does_not_see_has_failed(tmp_path: Path, quick: Path) -> None:
    shots = write_plan(tmp_path, quick)[1].shots
    told = [{"index": shot.index, "status": "rendered", "error": None, "stack": ""} for shot in shots]
    for outcome in _read_outcomes(shots, told):
        assert (outcome.status, outcome.record) == ("failed", None)
        assert isinstance(outcome.error, MachineError)
        assert "no manifest" in str(outcome.error)
        assert f"must share one folder {tmp_path}/out" in outcome.error.hint


def test_a_repeated_call_renders_no_forced_shot_a_second_time(
    tmp_path: Path, quick: Path, warm: Path, render: Render, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job, whole = write_plan(tmp_path, quick, video={})
    assert render(**JOB | {"items": JOB["items"][:2], "sampler": {"steps": 2}, "video": {}}).code == 0
    keys = {shot.index: shot.key for shot in whole.shots}
    task = Task(str(job), str(tmp_path), NO_OVERRIDES, str(warm), False, Force.snapshot(whole.shots), 0, True)
    for status in ("rendered", "already done"):  # by a fresh process, as Ray starts it again
        said = Worker(task).render(keys)
        assert (said["raised"], [one["status"] for one in said["outcomes"]]) == (None, [status] * 2)
    videos = [name for name in files_in(tmp_path) if name.endswith(".mp4")]
    assert videos == ["a.mp4", "a.old-1.mp4", "b.mp4", "b.old-1.mp4"]
