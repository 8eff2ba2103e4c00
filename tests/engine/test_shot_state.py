"""Shots that are stopped or killed in progress: no saved step is taken again."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import start
from jobs import (
    CAT,
    FISH,
    KEPT,
    CommandResult,
    count_forwards,
    files_in,
    forbid_calls,
    latents_of,
    manifest_of,
    rule,
    shell_exit_code,
    tiny_job,
    write_job,
)
from torch import Tensor

from wancli.engine.denoise_stage import next_segment
from wancli.engine.shot_state import ShotState, Status, link_dependents, propagate_state
from wancli.errors import ErrorCapture, NotFinite
from wancli.job.loader import load
from wancli.models.dit import WanModel
from wancli.plan.planner import build_plan
from wancli.sampling.solvers import State
from wancli.text import encoder
from wancli.text.embedding import Embedding
from wancli.video import mp4

Render = Callable[..., CommandResult]
STREAMED = {"residency": "streamed"}


def signalled(number: signal.Signals, forward: int) -> Callable[[int], None]:
    """Sends this process a signal at the start of the n-th forward."""

    def send(call: int) -> None:
        if call == forward:
            signal.raise_signal(number)

    return send


def stopped(
    render: Render, forward: int, number: signal.Signals = signal.SIGTERM
) -> Callable[..., CommandResult]:
    """Renders until a signal comes in the n-th forward."""

    def rendered(*options: str, **changes: Any) -> CommandResult:
        with pytest.MonkeyPatch.context() as patched:
            count_forwards(patched, signalled(number, forward))
            return render(*options, **changes)

    return rendered


# ---- a stop at every step ----


@pytest.mark.parametrize(("solver", "steps"), [("unipc", 20), ("dpm++", 20), ("euler", 20), ("distill4", 4)])
def test_a_run_stopped_in_every_step_ends_with_the_latent_of_an_unstopped_run(
    render: Render, tmp_path: Path, solver: str, steps: int
) -> None:
    said = {
        "sampler": {"steps": steps, "solver": solver},
        "video": KEPT,
        "inject": [rule(blocks="late", region=[0, 0, 0.4, 1])],
        **({"frames": 5, "prompt": [CAT, FISH]} if solver == "distill4" else {}),
    }
    assert render(folder=tmp_path / "whole", **said).code == 0
    for step in range(steps):
        ended = stopped(render, 0)(**said)
        if step < steps - 1:
            assert ended.code == 75, ended.err
            assert files_in(tmp_path) == ["clip.state.safetensors", "job.report.json"]
            assert "stopped by SIGTERM; 1 shot is saved in progress, 0 not started" in ended.err
    assert ended.code == 75  # sampled, and not decoded
    assert files_in(tmp_path) == ["clip.latents.safetensors", "job.report.json"]
    with pytest.MonkeyPatch.context() as patched:
        forbid_calls(patched)
        assert render(**said).code == 0
    assert torch.equal(latents_of(tmp_path), latents_of(tmp_path / "whole"))
    found, whole = (manifest_of(folder) for folder in (tmp_path, tmp_path / "whole"))
    assert found["injection"] == whole["injection"]
    names = [phase["name"] for phase in found["phases"]]
    assert names == ["encode", *["load", "sample"] * steps, "decode"]
    assert files_in(tmp_path) == files_in(tmp_path / "whole")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
def test_a_stopped_batch_says_what_is_saved_and_how_to_resume(
    render: Render, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    items = [{"id": name, "seed": ord(name)} for name in "abc"]
    rendered = partial(render, output="out/{id}.mp4", items=items, video=KEPT)
    said = stopped(rendered, 4, number)("--json")
    assert said.code == code
    assert said.err.splitlines() == [
        f"wancli: stopped by {number.name}; 1 shot is saved in progress, 1 not started; 1 of 3 done",
        f"  resume: wancli render {tmp_path}/job.yaml -q --json",
    ]
    expected = ["rendered", "stopped", "not started"]
    assert [shot["status"] for shot in json.loads(said.out)["shots"]] == expected
    report = json.loads((tmp_path / "out/job.report.json").read_text())
    assert [shot["status"] for shot in report["shots"]] == expected
    with pytest.MonkeyPatch.context() as patched:
        calls = count_forwards(patched)
        assert rendered().code == 0
        assert len(calls) == 2 + 4
    assert rendered(folder=tmp_path / "whole").code == 0
    for name in "abc":
        assert torch.equal(latents_of(tmp_path, name), latents_of(tmp_path / "whole", name))


def test_a_stopped_batch_is_saved_whole_and_shots_that_are_behind_catch_up(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [{"id": name, "seed": ord(name)} for name in "abcd"]
    sampler = {"steps": 5}
    rendered = partial(render, output="out/{id}.mp4", memory=STREAMED, video=KEPT, sampler=sampler)
    ended = stopped(rendered, 3 * 2 * 2)(items=items[:3])
    assert ended.code == 75
    assert files_in(tmp_path) == [*(f"{name}.state.safetensors" for name in "abc"), "job.report.json"]
    calls = count_forwards(monkeypatch)
    assert rendered(items=items).code == 0
    assert len(calls) == 2 * (3 * 2 + 5)
    assert rendered(items=items, folder=tmp_path / "whole").code == 0
    for name in "abcd":
        assert torch.equal(latents_of(tmp_path, name), latents_of(tmp_path / "whole", name))


def test_a_stop_request_after_the_last_step_leaves_nothing_undone(render: Render, tmp_path: Path) -> None:
    real = mp4.write_mp4

    def write(*arguments: Any, **options: Any) -> None:
        real(*arguments, **options)
        signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mp4, "write_mp4", write)
        assert render().code == 0


# ---- a stop elsewhere ----


def test_a_stop_while_decoding_leaves_the_latent_and_no_partial_video(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = mp4.to_rgb24

    def converted(frames: Tensor) -> memoryview:
        signal.raise_signal(signal.SIGTERM)
        return real(frames)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mp4, "to_rgb24", converted)
        said = render(frames=9)
    assert said.code == 75
    assert files_in(tmp_path) == ["clip.latents.safetensors", "job.report.json"]
    assert not list(tmp_path.rglob(".wancli-*"))
    forbid_calls(monkeypatch)
    assert render(frames=9).code == 0


def test_a_stop_while_encoding_keeps_the_encoded_prompts(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [f"A prompt that nobody has asked for, number {n} of the stopped." for n in range(3)]
    real, kept = encoder.pack, []

    def pack(embeddings: Sequence[Embedding]) -> bytes:
        kept.append(embeddings[0].text)
        if len(kept) == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(embeddings)

    monkeypatch.setattr(encoder, "pack", pack)
    items = [{"id": f"{n}", "prompt": prompt} for n, prompt in enumerate(prompts)]
    rendered = partial(render, output="out/{id}.mp4", items=items)
    with pytest.MonkeyPatch.context() as patched:
        forbid_calls(patched, (WanModel, "predict_velocities"))
        said = rendered()
    assert said.code == 75
    assert said.err.startswith(
        "wancli: stopped by SIGTERM; 0 shots are saved in progress, 3 not started; 0 of 3 done\n"
    )
    assert len({*kept} & {*prompts}) == 2
    assert rendered().code == 0
    assert sorted(kept) == prompts


# ---- killed ----


def test_a_killed_run_repeats_at_most_the_steps_since_its_last_save(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"sampler": {"steps": 10}, "video": KEPT, "inject": [rule(blocks="late")], "measure": True}
    assert render("--save-every", "3", folder=tmp_path / "whole", **said).code == 0

    def killed(call: int) -> None:
        if call == 3 * 8:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        count_forwards(patched, killed)
        assert render("--save-every", "3", **said).code == 130
    assert files_in(tmp_path) == ["clip.state.safetensors"]
    calls = count_forwards(monkeypatch)
    assert render(**said).code == 0
    assert len(calls) == 3 * (10 - 6)
    assert torch.equal(latents_of(tmp_path), latents_of(tmp_path / "whole"))
    found, whole = (manifest_of(folder) for folder in (tmp_path, tmp_path / "whole"))
    assert found["effects"] == whole["effects"]
    sampled = [phase for phase in found["phases"] if phase["name"] == "sample"]
    assert len(sampled) == 2  # what the first run took until it saved, and the second


def test_steps_of_an_earlier_run_are_marked_and_count_in_no_total(render: Render) -> None:
    assert stopped(render, 4)(sampler={"steps": 5}).code == 75
    report = json.loads(render("--json", sampler={"steps": 5}).out)
    sampled = [phase for phase in report["shots"][0]["phases"] if phase["name"] == "sample"]
    assert [phase.get("earlier", False) for phase in sampled] == [True, False]
    (total,) = [phase for phase in report["memory"] if phase["name"] == "sample"]
    assert total["seconds"] == pytest.approx(sampled[1]["seconds"], abs=0.002)


def test_a_measured_shot_does_not_resume_from_unmeasured_steps(
    render: Render, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said: dict[str, Any] = {"inject": [rule(blocks="1-2")], "sampler": {"steps": 4}}
    assert stopped(render, 4)(**said).code == 75
    assert render(measure=True, **said).code == 0
    measured = {effect["step"] for effect in manifest_of(tmp_path)["effects"]}
    assert measured == {0, 1, 2, 3}


@pytest.mark.parametrize(("often", "saves"), [("0s", 4), ("1h", 0), (2, 2), (10, 0)])
def test_states_are_saved_as_often_as_save_every_says(
    render: Render, monkeypatch: pytest.MonkeyPatch, often: str | int, saves: int
) -> None:
    from wancli.engine import denoise_stage, shot_state

    real, seen = shot_state.save_state, []

    def save(one: shot_state.ShotState, phases: Sequence[Any] = ()) -> None:
        seen.append(one.step)
        real(one, phases)

    monkeypatch.setattr(denoise_stage, "save_state", save)
    assert render(save_every=often, sampler={"steps": 5}).code == 0
    assert len(seen) == saves


def three_states(tmp_path: Path, quick: Path, warm: Path) -> list[ShotState]:
    """A shot of four steps, one that forks from it after two, and one that forks from that after three."""
    late, later = {"blocks": 0, "steps": "2-3"}, {"blocks": 1, "steps": "3-3"}
    items = [{}, {"inject": [rule(**late)]}, {"inject": [rule(**late), rule(**later)]}]
    job = tiny_job(quick, output="{item}.mp4", items=items, sampler={"steps": 4})
    plan = build_plan(load(write_job(tmp_path, job)), warm / "memo.json")
    states = [ShotState(shot) for shot in plan.shots]
    link_dependents(states)
    return states


def test_a_shot_waits_for_its_fork_and_resumes_from_there(tmp_path: Path, quick: Path, warm: Path) -> None:
    first, second, third = three_states(tmp_path, quick, warm)
    assert [state.status for state in (first, second, third)] == [
        Status.RUNNING,
        Status.WAITING,
        Status.WAITING,
    ]
    segment = next_segment((first, second, third), "only")
    assert segment is not None
    assert (segment.states, segment.steps) == ((first,), range(2))
    first.step, first.solver_state = 2, State(torch.zeros(1))
    propagate_state(first)
    assert (second.status, second.step, second.solver_state) == (Status.RUNNING, 2, first.solver_state)
    assert third.status is Status.WAITING
    segment = next_segment((first, second, third), "only")
    assert segment is not None
    assert (segment.states, segment.steps) == ((first, second), range(2, 3))


def test_a_failure_takes_along_all_shots_that_wait_and_no_others(
    tmp_path: Path, quick: Path, warm: Path
) -> None:
    first, second, third = three_states(tmp_path, quick, warm)
    failure = ErrorCapture()
    failure.record(NotFinite("NaN"))
    second.fail(failure)
    assert [state.status for state in (first, second, third)] == [
        Status.RUNNING,
        Status.FAILED,
        Status.FAILED,
    ]
    assert third.failure is failure
    segment = next_segment((first, second, third), "only")
    assert segment is not None
    assert segment.states == (first,)


@pytest.mark.parametrize("often", [0, "soon", "3 days", 1.5, True])
def test_save_every_is_a_time_or_a_number_of_steps(render: Render, often: Any) -> None:
    said = render(save_every=often)
    assert said.code == 2
    assert "save_every" in said.err


def test_only_shots_that_an_edit_changed_are_sampled_from_the_start(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items: list[dict[str, Any]] = [{"id": name, "seed": ord(name)} for name in "abc"]
    sampler = {"steps": 4}
    rendered = partial(render, output="out/{id}.mp4", memory=STREAMED, sampler=sampler)
    assert stopped(rendered, 3 * 2 * 2)(items=items).code == 75
    items[1]["prompt"] = FISH
    calls = count_forwards(monkeypatch)
    said = rendered(items=items)
    assert said.code == 0
    assert len(calls) == 2 * (1 + 4 + 1)
    assert [name for name in files_in(tmp_path) if "state" in name] == ["b.state.old-1.safetensors"]


def test_a_damaged_state_is_moved_aside_with_a_warning(
    tmp_path: Path, render: Render, quick: Path, warm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs import run_wancli

    assert stopped(render, 2)(sampler={"steps": 3}).code == 75
    state = tmp_path / "out/clip.state.safetensors"
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    said = run_wancli(capsys, "render", tmp_path / "job.yaml", "--progress", "plain", "--cache-dir", warm)
    assert said.code == 0
    assert f"warning: {state}: the state is damaged: its checksum differs; moved aside" in said.err
    assert "clip.state.old-1.safetensors" in files_in(tmp_path)


def test_a_shot_that_resumes_with_other_threads_says_so_and_its_manifest_has_both_numbers(
    tmp_path: Path,
    render: Render,
    warm: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from jobs import run_wancli

    assert stopped(render, 2)(sampler={"steps": 3}).code == 75
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    said = run_wancli(capsys, "render", tmp_path / "job.yaml", "--progress", "plain", "--cache-dir", warm)
    assert said.code == 0
    assert "warning: shot 0000: sampled with 1 thread so far and with 3 from here on" in said.err
    assert "OMP_NUM_THREADS=1 keeps them" in said.err
    sampled = [phase for phase in manifest_of(tmp_path)["phases"] if phase["name"] == "sample"]
    assert [phase["threads"] for phase in sampled] == [1, 3]


# ---- a real process ----


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stopped_process_exits_cleanly_and_another_resumes(
    render: Render, tmp_path: Path, quick: Path, warm: Path, number: signal.Signals, code: int
) -> None:
    said = {"sampler": {"steps": 40}, "video": KEPT, "frames": 5}
    path = write_job(tmp_path, tiny_job(quick, **said))
    with start("render", path, "-q", "--cache-dir", warm, "--save-every", "1") as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out/clip.state.safetensors").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert shell_exit_code(process.returncode) == code, err
    assert f"stopped by {number.name}" in err
    assert render(**said).code == 0
    assert render(folder=tmp_path / "whole", **said).code == 0
    assert torch.equal(latents_of(tmp_path), latents_of(tmp_path / "whole"))


def test_a_stopped_force_continues_with_the_shots_it_has_not_rendered(
    render: Callable[..., CommandResult], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "output": "out/{id}.mp4",
        "items": [{"id": id, "seed": ord(id)} for id in "abc"],
    }
    assert render(**changes).code == 0
    with monkeypatch.context() as patch:
        count_forwards(patch, lambda n: signal.raise_signal(signal.SIGTERM) if n == 5 else None)
        said = render("--force", **changes)
    assert said.code == 75
    command = f"wancli render {tmp_path}/job.yaml --force --quiet --items 1-2"
    assert said.err.endswith(
        f"\n  --force starts shots in progress again from the first step\n  resume: {command}\n"
    )
    assert render("--force", "--items", "1-2", **changes).code == 0
    assert len(list((tmp_path / "out").glob("*.old-1.mp4"))) == 3
    assert not list((tmp_path / "out").glob("*.old-2.mp4"))
