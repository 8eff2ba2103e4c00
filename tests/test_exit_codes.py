"""The truth table of exit codes, through the real command line: every pair of events."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import manifests
import pytest
from failing_disk import fail_reading
from jobs import T5, TRANSFORMER, VAE, CommandResult, checkpoint, run_wancli, tiny_job, write_job

from wancli import errors
from wancli.engine import pipeline
from wancli.errors import ExitStatus

# What can happen to one shot: the error of its decoding, None where it goes well.
SHOTS: dict[str, Callable[[], BaseException | None]] = {
    "done": lambda: None,
    "failed": lambda: errors.NotFinite("NaN"),
    "in the way": lambda: errors.OutputExists("another made it meanwhile"),
    "no memory": lambda: errors.OutOfMemory("out of memory"),
    "ffmpeg died": lambda: errors.FfmpegError("died"),
    "damaged": lambda: errors.EntryError("does not verify"),
    "checkpoint": lambda: errors.CheckpointError("does not verify"),
}
# What ends a batch after a shot, and its code. It outranks what happened to shots before.
ENDS = {"TERM": 75, "USR1": 75, "INT": 130, "disk full": 3, "bug": 70}
CODES = {
    "done": 0,
    "failed": 1,
    "in the way": 1,
    "no memory": 5,
    "ffmpeg died": 3,
    "damaged": 4,
    "checkpoint": 4,
}
RANK = [0, 1, 5, 3, 4]  # the worst last


def worst(*codes: int) -> int:
    return max(codes, key=RANK.index)


@pytest.fixture
def batch(
    tmp_path: Path, known: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., CommandResult]:
    """Return a function that renders shots with these events, one after the other, without decoding."""

    def rendered(*happen: str, flags: tuple[str, ...] = ()) -> CommandResult:
        items = [{"id": f"{n}", "seed": n} for n in range(len(happen))]
        job = write_job(tmp_path, tiny_job(known, output="out/{id}.mp4", items=items, sampler={"steps": 1}))
        coming: Iterator[str] = itertools.chain(happen, itertools.repeat("done"))

        def finish(*_: Any) -> dict[str, Any]:
            what = next(coming)
            match what:
                case "TERM" | "USR1" | "INT":
                    signal.raise_signal(signal.Signals[f"SIG{what}"])
                    raise errors.Stopped("before decoding")
                case "disk full":
                    raise errors.NoSpace("No space left on device")
                case "bug":
                    raise ZeroDivisionError
            error = SHOTS[what]()
            if error:
                raise error
            return BODY

        monkeypatch.setattr(pipeline, "decode_latent", finish)
        return run_wancli(capsys, "render", job, "-q", *flags)

    return rendered


BODY = manifests.record(phases=[manifests.phase("decode", seconds=0.0)])


@pytest.mark.parametrize("two", list(itertools.product(SHOTS, repeat=2)), ids=" then ".join)
def test_a_batch_ends_with_the_worst_that_happened_to_its_shots(
    batch: Callable[..., CommandResult], two: tuple[str, str]
) -> None:
    first, second = two
    reached = [first] if first == "checkpoint" else [first, second]  # which both shots need
    assert batch(*two).code == worst(*(CODES[what] for what in reached))


@pytest.mark.parametrize("first", SHOTS)
@pytest.mark.parametrize("end", ENDS)
def test_what_ends_the_batch_outranks_what_happened_to_shots(
    batch: Callable[..., CommandResult], first: str, end: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = batch(first, end, "done")
    assert result.code == (4 if first == "checkpoint" else ENDS[end])


@pytest.mark.parametrize("first", [name for name in SHOTS if name not in ("done", "checkpoint")])
def test_fail_fast_ends_with_the_code_of_the_failure(batch: Callable[..., CommandResult], first: str) -> None:
    assert batch(first, "bug", flags=("--fail-fast",)).code == CODES[first]


def test_a_stop_that_came_when_all_was_done_is_none(batch: Callable[..., CommandResult]) -> None:
    assert batch("done", "done").code == 0


@pytest.mark.parametrize("retries", [0, 1])
def test_a_retry_that_goes_well_leaves_no_trace_in_the_code(
    batch: Callable[..., CommandResult], retries: int
) -> None:
    result = batch("ffmpeg died", "done", "done", flags=("--retries", str(retries)))
    assert result.code == (0 if retries else 3)


def test_a_shot_that_waits_for_a_retry_fails_after_a_stop_request(
    batch: Callable[..., CommandResult], tmp_path: Path
) -> None:
    result = batch("ffmpeg died", "TERM", flags=("--retries", "1"))
    assert (result.code, "shot 0: died" in result.err) == (75, True)
    report = json.loads((tmp_path / "out/job.report.json").read_text())
    assert [shot["status"] for shot in report["shots"]] == ["failed", "stopped"]


@pytest.mark.parametrize(
    ("case", "code"),
    [
        ("usage", 2),
        ("no such file", 2),
        ("all in the way", 2),
        ("some in the way", 1),
        ("all too large", 5),
        ("one too large", 5),
        ("no ffmpeg", 3),
        ("no space", 3),
        ("checkpoint", 4),
        ("fail-fast and max-failures", 2),
    ],
)
def test_what_is_found_before_the_start(
    render: Callable[..., CommandResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    case: str,
    code: int,
) -> None:
    items: list[dict[str, Any]] = [{"id": "a"}, {"id": "b", "seed": 1}]
    flags: tuple[str, ...] = ()
    changes: dict[str, Any] = {}
    out = tmp_path / "out"
    match case:
        case "usage":
            flags = ("--farce",)
        case "no such file":
            assert run_wancli(capsys, "render", tmp_path / "no.yaml").code == code
            return
        case "all in the way" | "some in the way":
            out.mkdir()
            for name in "ab" if case.startswith("all") else "a":
                (out / f"{name}.mp4").write_bytes(b"mine")
        case "all too large":
            changes = {"memory": {"budget": "1MiB"}}
        case "one too large":
            items[1] |= {"size": "1280x720", "frames": 81}
            changes = {"memory": {"budget": "900MiB"}}
        case "no ffmpeg":
            monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/no/ffmpeg")
        case "no space":
            monkeypatch.setattr("wancli.storage.disk.free_space", lambda _: 1000)
        case "checkpoint":
            (tmp_path / "model").mkdir()
            changes = {"model": str(tmp_path / "model")}
        case "fail-fast and max-failures":
            flags = ("--fail-fast", "--max-failures", "2")
    result = render(*flags, output="out/{id}.mp4", items=items, **changes)
    assert result.code == code, result.err
    started = case in ("some in the way", "one too large")
    assert sorted(path.name for path in out.glob("*.manifest.json")) == (
        [] if not started else ["b.manifest.json"] if case == "some in the way" else ["a.manifest.json"]
    )


UNREAD = {
    "job.yaml": 2,
    "base.yaml": 2,
    "prompts.txt": 2,
    "e.safetensors": 2,
    "models.yaml": 2,
    "lora.safetensors": 4,
    f"model/{TRANSFORMER}": 4,
    "model/config.json": 4,
    f"model/{T5}": 4,
    f"model/{VAE}": 4,
    "model/google/umt5-xxl/spiece.model": 4,
}


@pytest.mark.parametrize("error", ["EACCES", "EIO"])
@pytest.mark.parametrize("name", UNREAD)
def test_an_input_that_cannot_be_read_has_the_code_of_its_kind(
    tmp_path: Path,
    shallow: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    error: str,
) -> None:
    model, path = checkpoint(tmp_path, shallow), tmp_path / name
    (tmp_path / "prompts.txt").write_text("a cat\n")
    (tmp_path / "models.yaml").write_text(f"mine: {model}\n")
    write_job(tmp_path, tiny_job(model), "base.yaml")
    (tmp_path / "lora.safetensors").write_bytes(b"")
    job: dict[str, Any] = {"extends": "base.yaml"}
    match name:
        case "prompts.txt":
            job = tiny_job(model) | {"prompts_from": name}
            del job["prompt"]
        case "e.safetensors":
            path.write_bytes(b"")
            job |= {"prompt": {"embedding": name}}
        case "models.yaml":
            monkeypatch.setenv("WANCLI_MODELS", str(path))
            job |= {"model": "mine"}
        case "lora.safetensors":
            job |= {"loras": [{"path": name}]}
    fail_reading(monkeypatch, lambda asked: asked == path, error)
    for command in ("plan", "render"):
        result = run_wancli(capsys, command, write_job(tmp_path, job))
        assert result.code == UNREAD[name], result.err
        assert "cannot be read: " in result.err
        assert path.name in result.err


LIMITED = """
import resource, sys
from wancli.__main__ import main
limit = int(sys.argv.pop())
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
main()
"""


@pytest.mark.parametrize("limit", [4, 5, 8, 12])
def test_a_render_that_may_open_few_files_is_no_bug(known: Path, tmp_path: Path, limit: int) -> None:
    job = write_job(tmp_path, tiny_job(known, sampler={"steps": 1}))
    done = forked.run("render", job, "-q", limit, program=LIMITED)
    assert done.returncode == 3, done.stderr
    assert "Too many open files" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_table_names_every_code() -> None:
    assert {*CODES.values(), *ENDS.values(), 2} == {int(status) for status in ExitStatus}


@pytest.mark.parametrize(
    "arguments", [["plan", "job.yaml"], ["render", "job.yaml"], ["render", "job.yaml", "--json-stream"]]
)
def test_a_deleted_working_folder_is_not_a_bug(tmp_path: Path, arguments: list[str]) -> None:
    (gone := tmp_path / "gone").mkdir()
    program = (
        "import os, sys\nfrom wancli.__main__ import main\n"
        f"sys.argv[1:] = {arguments}\nos.chdir({str(gone)!r})\nos.rmdir({str(gone)!r})\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert done.stderr.startswith("wancli: the working folder is gone (No such file or directory)\n  cd")
    if "--json-stream" in arguments:
        envelope = json.loads(done.stdout)
        assert (envelope["type"], envelope["exit_code"], envelope["error"]["code"]) == (
            "envelope",
            3,
            "machine",
        )
    else:
        assert done.stdout == ""
