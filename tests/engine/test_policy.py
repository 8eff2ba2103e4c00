"""What follows from a failed shot: the batch continues, some errors are retried, or the batch ends."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import (
    FISH,
    KEPT,
    NETWORKS,
    SPIECE,
    CommandResult,
    break_videos_of_5_frames,
    count_forwards,
    files_in,
    latents_of,
    manifest_of,
    rule,
    run_wancli,
    tiny_job,
    write_job,
)

from wancli import errors
from wancli.commands._render_options import RenderOptions
from wancli.engine.decode_stage import decode_attempts
from wancli.engine.outcome import FailurePolicy, exit_status
from wancli.errors import ErrorCapture
from wancli.models import t5
from wancli.models.dit import WanModel
from wancli.models.vae import VAE
from wancli.storage import atomic
from wancli.text.tokenizer import Tokenizer
from wancli.video import mp4
from wancli.weights import loader

Render = Callable[..., CommandResult]
ABC: dict[str, Any] = {
    "output": "out/{id}.mp4",
    "items": [{"id": "a"}, {"id": "b", "seed": 1}, {"id": "c", "seed": 2}],
}


def statuses(folder: Path) -> list[str]:
    report = json.loads((folder / "out" / "job.report.json").read_text())
    return [shot["status"] for shot in report["shots"]]


def failing(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, at: Mapping[int, BaseException]
) -> None:
    """The n-th call of a function raises instead of working."""
    real, count = getattr(owner, name), [0]

    def called(*arguments: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] - 1 in at:
            raise at[count[0] - 1]
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, called)


# ---- the pure part ----


def test_fail_fast_is_one_failure_and_excludes_another_number() -> None:
    assert RenderOptions(fail_fast=True).failure_policy == FailurePolicy(1, 0)
    policy = RenderOptions(max_failures=3, retries=2).failure_policy
    assert [policy.should_stop(n) for n in (2, 3, 4)] == [False, True, True]
    assert not FailurePolicy().should_stop(10_000)
    with pytest.raises(errors.JobError, match="give one of them"):
        _ = RenderOptions(fail_fast=True, max_failures=3).failure_policy


def test_only_retryable_errors_are_retried_and_not_for_ever() -> None:
    policy = FailurePolicy(retries=2)
    assert [policy.should_retry(errors.FfmpegError("x"), n) for n in (1, 2, 3)] == [True, True, False]
    assert not policy.should_retry(errors.NotFinite("x"), 1)
    assert not FailurePolicy().should_retry(errors.FfmpegError("x"), 1)
    retryable = {
        kind for kind in errors.error_types() if kind.retryable and not issubclass(kind, errors.Stopped)
    }
    assert {kind.__name__ for kind in retryable} == {
        "DiskError",
        "FfmpegError",
        "HubError",
        "OutOfMemory",
        "UnreadableNow",
    }


def test_the_exit_code_is_that_of_the_worst_failure() -> None:
    kinds = [errors.ShotError, errors.OutputExists, errors.OutOfMemory, errors.FfmpegError, errors.EntryError]
    found = [exit_status([kind("x") for kind in kinds[: n + 1]]) for n in range(5)]
    assert (exit_status([]), found) == (0, [1, 1, 5, 3, 4])


def test_an_error_is_kept_without_the_tensors_of_its_frames() -> None:
    def deep() -> weakref.ref[Any]:
        tensor = torch.zeros(2, 3)
        held.append(weakref.ref(tensor))
        try:
            raise MemoryError
        except MemoryError as error:
            raise errors.OutOfMemory("no room") from error

    held: list[weakref.ref[Any]] = []
    gc.disable()
    try:
        with ErrorCapture() as attempt:
            deep()
        assert "tensor: [2, 3] torch.float32" in attempt.stack
        assert held[0]() is None
    finally:
        gc.enable()
    assert (str(attempt.error), attempt.error and attempt.error.__traceback__) == ("no room", None)


@pytest.mark.parametrize("error", [errors.NoSpace("x"), errors.Stopped("x"), ZeroDivisionError()])
def test_errors_that_end_the_batch_are_not_captured(error: Exception) -> None:
    with pytest.raises(type(error)), ErrorCapture():
        raise error


# ---- running out of memory ----


class Hog:
    """Raises as torch does when memory runs out, with a tensor in the frame; knows whether it was dropped."""

    def __init__(self, real: Callable[..., Any], at: int, kind: type[Exception]) -> None:
        self.real, self.at, self.kind = real, at, kind
        self.calls, self.held = 0, [lambda: None]
        self.dropped: list[bool] = []

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls > self.at + 1:
            self.dropped.append(self.held[-1]() is None)
        if self.calls - 1 == self.at:
            activation = torch.zeros(5)
            self.held.append(weakref.ref(activation))  # type: ignore[arg-type]
            raise self.kind(
                "CUDA out of memory. Tried to allocate 2.00 GiB" if self.kind is not MemoryError else ""
            )
        return self.real(*arguments, **options)


def hog(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int, kind: type[Exception] = MemoryError
) -> Hog:
    found = Hog(getattr(owner, name), at, kind)
    monkeypatch.setattr(owner, name, lambda *a, **k: found(*a, **k))
    return found


PHASES = {
    "encode": (t5, "encode_batch", 0),
    "load": (loader, "load_transformer", 0),
    "sample": (WanModel, "predict_velocities", 1),
    "decode": (VAE, "decode_chunk", 0),
}


@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError])
@pytest.mark.parametrize("phase", PHASES)
def test_a_shot_that_runs_out_of_memory_says_where_frees_it_and_the_next_continues(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, kind: type[Exception]
) -> None:
    NETWORKS.clear()  # all is loaded
    found = hog(monkeypatch, *PHASES[phase], kind=kind)
    prompts = [f"{phase} {kind.__name__} {n}" for n in range(2)]
    items = [{"id": "a", "prompt": prompts[0]}, {"id": "b", "prompt": prompts[1]}]
    gc.disable()  # nothing is left to the collector's mood
    try:
        said = render("--json", output="out/{id}.mp4", items=items)
    finally:
        gc.enable()
    shots = json.loads(said.out)["shots"]
    assert (said.code, [shot["status"] for shot in shots]) == (5, ["failed", "rendered"])
    assert shots[0]["error"]["code"] == "memory.exhausted"
    named = "sample" if phase == "load" else phase
    assert f"out of memory: {named}, at a peak of " in shots[0]["error"]["message"]
    assert found.dropped
    assert all(found.dropped)
    assert render(output="out/{id}.mp4", items=items).code == 0


def test_steps_before_memory_ran_out_are_on_disk_and_a_retry_resumes_from_them(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: dict[str, Any] = {"sampler": {"steps": 4}, "video": KEPT}
    assert render(folder=tmp_path / "whole", **said).code == 0
    with pytest.MonkeyPatch.context() as patched:
        hog(patched, WanModel, "predict_velocities", 2)
        assert render(**said).code == 5
    assert files_in(tmp_path) == ["clip.state.safetensors", "job.report.json"]
    found = hog(monkeypatch, WanModel, "predict_velocities", 1)
    assert render("--retries", "1", **said).code == 0
    assert torch.equal(latents_of(tmp_path), latents_of(tmp_path / "whole"))
    assert files_in(tmp_path) == files_in(tmp_path / "whole")
    assert found.calls == 2 + 1  # two of four steps were on disk, then one more


@pytest.mark.parametrize("chunk", [2, 3])
def test_a_decode_that_runs_out_of_memory_continues_in_smaller_chunks_and_the_manifest_says_so(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, capsys: Any, known: Path
) -> None:
    real = VAE.decode_chunk

    def hungry(self: VAE, z_CTYX: torch.Tensor, stream: Any) -> torch.Tensor:
        if z_CTYX.shape[1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, z_CTYX, stream)

    monkeypatch.setattr(VAE, "decode_chunk", hungry)
    job = write_job(tmp_path, tiny_job(known, frames=9, memory={"decode_chunk": chunk}))
    said = run_wancli(capsys, "render", job, "--progress", "plain")
    assert said.code == 0
    assert "warning: shot 0000: out of memory: decode, at a peak of " in said.err
    assert "; decoding on cpu with decode_chunk 1 instead, which may round pixels otherwise\n" in said.err
    body = manifest_of(tmp_path)
    assert body["decoded"] == {"device": "cpu", "chunk": 1, "fallback": True}
    assert (body["shot"]["decode_chunk"], mp4.count_frames(tmp_path / "out" / "clip.mp4")) == (chunk, 9)
    assert run_wancli(capsys, "render", job, "-q").code == 0


def test_each_decode_fallback_takes_less_memory_than_the_one_before() -> None:
    assert decode_attempts("cpu", 4) == [("cpu", 4), ("cpu", 1)]
    assert decode_attempts("cpu", 1) == [("cpu", 1)]
    assert decode_attempts("cuda", 4) == [("cuda", 4), ("cuda", 1), ("cpu", 1)]
    assert decode_attempts("cuda", 1) == [("cuda", 1), ("cpu", 1)]


# ---- one bad shot ----


def test_a_prompt_that_encodes_to_nan_fails_only_the_shots_that_use_it(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = t5.encode_batch
    bad = Tokenizer(SPIECE).to_ids("a bad one")

    def rows(model: Any, prompts: Any) -> list[torch.Tensor]:
        return [
            rows_NE * (float("nan") if list(ids) == bad else 1)
            for ids, rows_NE in zip(prompts, real(model, prompts))
        ]

    monkeypatch.setattr(t5, "encode_batch", rows)
    items = [
        {"id": "a"},
        {"id": "b", "prompt": "a bad one"},
        {"id": "c", "inject": [rule(prompt="a bad one", blocks="late")]},
        {"id": "d", "inject": [rule(prompt=FISH, blocks="late")]},
    ]
    said = render(output="out/{id}.mp4", items=items)
    assert said.code == 1
    assert statuses(tmp_path) == ["rendered", "failed", "failed", "rendered"]
    assert said.err.count("UMT5 gives NaN or Inf for 'a bad one'") == 2


def test_a_shot_that_fails_in_a_batch_is_reported_before_the_others_are_sampled(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_videos_of_5_frames(monkeypatch)
    items = [{"id": "a", "frames": 5}, {"id": "b"}]
    said = {"output": "out/{id}.mp4", "items": items, "memory": {"residency": "streamed"}}
    assert render("--fail-fast", sampler={"steps": 5}, **said).code == 1
    assert statuses(tmp_path) == ["failed", "stopped"]
    assert files_in(tmp_path) == ["b.state.safetensors", "job.report.json"]
    calls = count_forwards(monkeypatch)
    assert render(sampler={"steps": 5}, **said).code == 1
    assert statuses(tmp_path) == ["failed", "rendered"]
    assert len(calls) == 2 + 2 * 4


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), ["failed", "failed", "rendered"]),
        (("--fail-fast",), ["failed", "not started", "not started"]),
        (("--max-failures", "2"), ["failed", "failed", "not started"]),
    ],
)
def test_a_batch_continues_or_ends_as_its_policy_says(
    render: Render,
    tmp_path: Path,
    flags: tuple[str, ...],
    expected: list[str],
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        failing(patched, mp4, "write_mp4", {n: errors.FfmpegError("died") for n in (0, 1)})
        assert render(*flags, **ABC).code == 3
    assert statuses(tmp_path) == expected
    assert render(**ABC).code == 0


def test_a_retry_decodes_the_latent_that_is_on_disk_also_with_force(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert render().code == 0
    failing(monkeypatch, mp4, "write_mp4", {0: errors.FfmpegError("died"), 1: errors.DiskError("EIO")})
    calls = count_forwards(monkeypatch)
    assert render("--force", "--retries", "2").code == 0
    assert len(calls) == 4
    assert files_in(tmp_path) == [
        "clip.manifest.json",
        "clip.manifest.old-1.json",
        "clip.mp4",
        "clip.old-1.mp4",
        "job.report.json",
    ]


def test_a_full_disk_leaves_the_states_of_shots_in_progress(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [{"id": "a"}, {"id": "b", "inject": [rule(blocks="2-3", steps="2-3")]}]
    said = {"output": "out/{id}.mp4", "items": items, "sampler": {"steps": 4}}
    with pytest.MonkeyPatch.context() as patched:
        failing(patched, mp4, "write_mp4", {0: errors.NoSpace("No space left on device")})
        assert render(**said).code == 3
    assert {"a.latents.safetensors", "b.state.safetensors"} <= set(files_in(tmp_path))
    calls = count_forwards(monkeypatch)
    assert render(**said).code == 0
    assert len(calls) == 2 * 2


def test_shots_of_a_batch_are_retried_alone(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, groups = WanModel.predict_velocities, []

    def at_most_two(self: WanModel, requests: Any, forwards_per_pass: Any = None) -> Any:
        groups.append(len(requests))
        if len(requests) > 2:  # the two branches of one shot
            raise MemoryError
        return real(self, requests, forwards_per_pass)

    monkeypatch.setattr(WanModel, "predict_velocities", at_most_two)
    items = [{"id": "a"}, {"id": "b", "seed": 1}]
    said = {"output": "out/{id}.mp4", "items": items, "batch": 2, "memory": {"residency": "streamed"}}
    assert render(**said).code == 5
    assert render("--retries", "1", **said).code == 0
    assert groups == [4, 4, *[2] * 4]


def test_the_state_of_a_shot_that_met_nan_is_removed_for_it_would_lead_there_again(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, state = WanModel.predict_velocities, tmp_path / "out/clip.state.safetensors"
    there: list[bool] = []

    def sick(self: WanModel, requests: Any, forwards_per_pass: Any = None) -> Any:
        there.append(state.exists())
        return [v * (float("nan") if there[-1] else 1) for v in real(self, requests, forwards_per_pass)]

    monkeypatch.setattr(WanModel, "predict_velocities", sick)
    assert render(save_every=1, sampler={"steps": 4}).code == 1
    assert there[-1]
    assert not state.exists()


def test_errors_that_no_retry_can_mend_are_not_retried(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, mp4, "write_mp4", {0: errors.NotFinite("NaN")})
    assert render("--retries", "5").code == 1


def test_the_report_counts_no_time_and_hits_of_a_latent_of_an_earlier_run(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "never asked for before this test"
    with pytest.MonkeyPatch.context() as patched:
        failing(patched, mp4, "write_mp4", {0: errors.FfmpegError("died")})
        assert render(prompt=prompt).code == 3
    report = json.loads(render("--json", prompt=prompt).out)
    assert [phase["name"] for phase in report["shots"][0]["phases"]] == ["encode", "load", "sample", "decode"]
    assert [phase.get("earlier", False) for phase in report["shots"][0]["phases"]] == [
        True,
        True,
        True,
        False,
    ]
    took = {phase["name"]: phase["seconds"] for phase in report["memory"]}
    assert (took["encode"], took["sample"], took["decode"] > 0) == (0, 0, True)
    assert report["cache"] == {"hits": 0, "misses": 0, "encoder_loaded": False}
    assert report["first_step_after"] is None


def test_the_summary_of_a_render_that_only_decoded_says_nothing_of_a_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], known: Path
) -> None:
    job = write_job(tmp_path, tiny_job(known))
    with pytest.MonkeyPatch.context() as patched:
        failing(patched, mp4, "write_mp4", {0: errors.FfmpegError("died")})
        assert run_wancli(capsys, "render", job, "-q").code == 3
    said = run_wancli(capsys, "render", job)
    assert (said.code, "first step" in said.err) == (0, False)


def test_failures_end_in_a_table_and_the_command_that_retries_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], known: Path
) -> None:
    folder = tmp_path / "my jobs"
    many = [{"id": f"{n}", "seed": n} for n in range(6)]
    job = write_job(folder, tiny_job(known, output="out/{id}.mp4", items=many))
    died = errors.FfmpegError("it went wrong " * 20 + "at last")
    failing(monkeypatch, mp4, "write_mp4", {1: died, 2: died, 4: died})
    flags = ("--set", "negative=a b", "--progress", "plain", "--save-every", "5", "--items", "0-4")
    said = run_wancli(capsys, "render", job, *flags)
    assert said.code == 3
    *_, first, second, third, again = map(str.rstrip, said.err.splitlines())
    assert [line.split()[:2] for line in (first, second, third)] == [[n, "machine.ffmpeg"] for n in "124"]
    assert all(len(line) <= 80 and line.endswith("…") for line in (first, second, third))
    assert again == (
        f"try again: wancli render '{folder}/job.yaml' --set 'negative=a b' --save-every 5 --progress plain"
        " --items 1-2,4"
    )
    report = json.loads((folder / "out" / "job.report.json").read_text())
    assert report["shots"][1]["error"]["message"].endswith("at last")
    words = ["render", str(job), *flags[:-1], "1-2,4"]
    assert run_wancli(capsys, *words).code == 0


def test_a_failure_that_another_try_cannot_help_is_not_offered_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = write_job(tmp_path, tiny_job(output="out/{id}.mp4", items=[{"id": id} for id in "abc"]))
    refused = errors.MachineError("this user may not write there")
    failing(monkeypatch, mp4, "write_mp4", {0: refused, 2: errors.FfmpegError("died")})
    said = run_wancli(capsys, "render", job)
    assert said.code == 3
    *_, again, later = said.err.splitlines()
    assert again == f"try again: wancli render {job} --items 2"
    assert later == (
        f"another try alone does not help; once the cause is gone: wancli render {job} --items 0"
    )


def test_a_force_that_ended_early_comes_with_the_command_for_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], known: Path
) -> None:
    job = write_job(tmp_path, tiny_job(known, output="out/{id}.mp4", items=[{"id": id} for id in "abc"]))
    failing(monkeypatch, mp4, "write_mp4", {1: errors.FfmpegError("died")})
    said = run_wancli(capsys, "render", job, "--force", "--fail-fast")
    assert said.code == 3
    assert said.err.splitlines()[-1] == f"try again: wancli render {job} --fail-fast --force --items 1-2"


def test_an_output_that_already_exists_is_not_retried_but_comes_with_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], known: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0.mp4").write_bytes(b"holiday")
    many = [{"id": f"{n}", "seed": n} for n in range(3)]
    job = write_job(tmp_path, tiny_job(known, output="out/{id}.mp4", items=many))
    failing(monkeypatch, mp4, "write_mp4", {0: errors.FfmpegError("died")})
    said = run_wancli(capsys, "render", job, "--progress", "plain")
    assert said.code == 3
    *_, again, taken = said.err.splitlines()
    assert again == f"try again: wancli render {job} --progress plain --items 1"
    assert taken.startswith("already exists: choose another `output`, or move the existing files aside: ")
    way_out = taken.rpartition(": wancli ")[2].split()
    assert way_out == ["render", str(job), "--progress", "plain", "--items", "0", "--force"]
    assert run_wancli(capsys, *way_out).code == 0
    said = run_wancli(capsys, "render", job, "--set", "seed=9")
    assert (said.code, "again:" in said.err) == (1, False)


def test_two_jobs_in_one_folder_have_a_report_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shallow: Path
) -> None:
    for name in ("one", "two", "n" * 230):
        job = write_job(tmp_path, tiny_job(shallow, output=f"out/{name[:9]}.mp4"), f"{name}.yaml")
        assert run_wancli(capsys, "render", job, "-q").code == 0
    short, one, two = [name for name in files_in(tmp_path) if name.endswith(".report.json")]
    assert (one, two) == ("one.report.json", "two.report.json")
    assert short.startswith("nnnn")
    assert len(short) < 100
    assert len(json.loads((tmp_path / "out" / one).read_text())["shots"]) == 1


def test_eio_is_a_disk_error_and_worth_a_retry() -> None:
    error = atomic.translate(OSError(5, "Input/output error"), Path("/x"))
    assert isinstance(error, errors.DiskError)
    assert (error.retryable, error.status) == (True, 3)
