"""`wancli check` finds all damage, and touches nothing."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import CommandResult, count_forwards, run_wancli, tiny_job, write_job

from wancli.engine import verify
from wancli.storage import claim_file
from wancli.storage.manifest import Problem
from wancli.video import mp4

COUNT = 12
SWEEP = {"matrix": {"seed": [*range(COUNT)]}, "output": "out/s{seed}.mp4", "video": {"keep_latents": True}}


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory, quick: Path, warm: Path) -> Path:
    """A folder with a job and its dozen outputs, latents kept, and the states of two shots."""
    from wancli.cli import run

    folder = tmp_path_factory.mktemp("batch")
    job = write_job(folder, tiny_job(quick, **SWEEP))
    assert run(["render", str(job), "-q", "--cache-dir", str(warm)]) == 0
    with pytest.MonkeyPatch.context() as patch:
        for name in ("half", "other"):
            stopped = tiny_job(quick, output=f"out/{name}.mp4", seed=len(name) * 100, sampler={"steps": 4})
            count_forwards(patch, lambda n: signal.raise_signal(signal.SIGTERM) if n == 2 else None)
            assert run(["render", str(write_job(folder, stopped, f"{name}.yaml")), "-q"]) == 75
    return folder


@pytest.fixture
def copy(batch: Path, tmp_path: Path) -> Path:
    """One of it that may be damaged, under the same path that its report has."""
    folder = tmp_path / "batch"
    shutil.copytree(batch, folder)
    for report in (folder / "out").glob("*report.json"):
        report.write_text(report.read_text().replace(str(batch), str(folder)))
    return folder


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def outputs(folder: Path) -> list[Path]:
    """All that a check has to judge."""
    kinds = ("mp4", "manifest.json", "latents.safetensors", "state.safetensors")
    return sorted(path for kind in kinds for path in (folder / "out").glob(f"*.{kind}"))


def test_a_whole_batch_verifies_and_deep_decodes_every_video(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[Path] = []
    real = mp4.count_frames
    monkeypatch.setattr(mp4, "count_frames", lambda path: [counted.append(path), real(path)][1])
    for options in ((), ("--deep",)):
        result = run_wancli(capsys, "check", copy / "out", "--json", *options)
        found = json.loads(result.out)
        assert (result.code, found["problems"], found["orphans"]) == (0, [], [])
        assert found["verified"] == {"videos": COUNT, "latents": COUNT, "states": 2}
    assert len(counted) == COUNT


def flip(path: Path, _: Path, dice: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


def cut(path: Path, _: Path, dice: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: dice.randrange(len(data))])


def swap(path: Path, other: Path, _: random.Random) -> None:
    kept = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(kept)


def delete(path: Path, _: Path, __: random.Random) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [flip, cut, swap, delete])
def test_every_damage_is_found_by_name_and_nothing_is_modified(
    copy: Path, damage: Callable[..., None]
) -> None:
    dice = random.Random(5)
    for path in outputs(copy):
        kind = path.name.partition(".")[2]
        if damage is delete and kind not in ("mp4", "manifest.json"):
            continue  # latents and states come and go: nothing says that they should be there
        other = dice.choice([p for p in outputs(copy) if p.name.partition(".")[2] == kind and p != path])
        whole = {one: one.read_bytes() for one in (path, other)}
        damage(path, other, dice)
        before = snapshot(copy)
        found = verify.check_folder(copy / "out")
        assert path in [problem.path for problem in found.problems], (damage.__name__, path)
        assert snapshot(copy) == before
        for one, data in whole.items():
            one.write_bytes(data)
    assert verify.check_folder(copy / "out").problems == []


def test_it_exits_with_4_and_says_which_file_and_why(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "out/s3.mp4"
    path.write_bytes(path.read_bytes() + b"x")
    result = run_wancli(capsys, "check", copy / "out")
    assert result.code == 4
    size = path.stat().st_size
    assert result.out.splitlines()[0] == f"{path}: {size} bytes where the manifest has {size - 1}"
    assert (
        result.out.splitlines()[-1] == f"verified: {COUNT - 1} videos, {COUNT} latents, 2 states; problems: 1"
    )


def test_a_deep_look_finds_a_video_with_too_few_frames_behind_a_manifest_that_verifies(copy: Path) -> None:
    from wancli.storage import manifest

    path = copy / "out/s3.manifest.json"
    body = manifest.read_json(path)
    assert body
    body["shot"]["frames"] = 5
    manifest.write(path, body)
    assert verify.check_folder(copy / "out").problems == []
    (problem,) = verify.check_folder(copy / "out", deep=True).problems
    assert (problem.path.name, problem.text) == ("s3.mp4", "1 frames where the manifest has 5")


def test_orphans_debris_and_what_was_moved_aside_are_listed_and_no_problem(copy: Path) -> None:
    out = copy / "out"
    for name in ("mine.mp4", ".wancli-box-1-abc.tmp", "s1.old-1.mp4", "s1.manifest.old-1.json", "notes.txt"):
        (out / name).write_bytes(b"x")
    for name in ("job.compare.mp4", "job.compare-2.mp4"):  # shots side by side
        (out / name).write_bytes(b"x")
    found = verify.check_folder(out)
    assert found.problems == []
    assert [path.name for path in found.orphans] == ["mine.mp4"]
    assert [path.name for path in found.debris] == [".wancli-box-1-abc.tmp"]
    assert [path.name for path in found.aside] == ["s1.manifest.old-1.json", "s1.old-1.mp4"]


def test_claims_of_dead_workers_are_listed_and_those_of_the_living_are_not(copy: Path) -> None:
    folder = copy / "out" / ".wancli" / "claims"
    folder.mkdir(parents=True)
    me = claim_file.current_process().as_dict()
    claims = {"s1": me, "s2": me | {"born": "1"}, "s3": me | {"host": "elsewhere", "born": "1"}, "gone": {}}
    for name, body in claims.items():
        (folder / f"{name}.json").write_text(json.dumps(body))
    found = verify.check_folder(copy)
    assert (found.problems, [path.name for path in found.debris]) == ([], ["s2.json"])


def test_a_job_is_checked_against_what_it_says_now(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def check(*options: str) -> tuple[int, dict[str, Any]]:
        result = run_wancli(capsys, "check", copy / "job.yaml", "--json", *options)
        return result.code, json.loads(result.out)

    code, found = check()
    assert (code, found["verified"]["videos"], found["missing"]) == (0, COUNT, [])
    code, found = check("--sweep", "seed=0,1,99")
    assert (code, found["verified"]["videos"]) == (0, 2)
    assert [Path(path).name for path in found["missing"]] == ["s99.mp4"]
    code, found = check("--set", "sampler.steps=3", "--items", "0")
    problems = {Path(entry["path"]).name: entry["problem"] for entry in found["problems"]}
    assert code == 4
    differs = "another job, version or model: made with sampler.steps 2, now 3"
    assert problems["s0.manifest.json"] == f"made by {differs}"
    assert problems["s0.latents.safetensors"] == f"the latent of {differs}"


def test_a_report_that_is_cut_is_a_problem_and_that_of_another_program_is_not(copy: Path) -> None:
    report = copy / "out/job.report.json"
    report.write_bytes(report.read_bytes()[:-30])
    (copy / "out/report.json").write_text('{"schema": "mine"}')
    damaged = "the report is damaged, or of another version"
    assert verify.check_folder(copy / "out").problems == [Problem(report, damaged)]


def test_what_is_neither_folder_nor_job_is_a_job_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result: CommandResult = run_wancli(capsys, "check", tmp_path / "no")
    assert result.code == 2
    assert "cannot be read: No such file" in result.err


@pytest.mark.parametrize("lacking", ["output", "status", "shots"])
@pytest.mark.parametrize("instead", [None, 7])
def test_a_report_that_lacks_what_it_should_hold_is_a_problem(
    copy: Path, lacking: str, instead: int | None
) -> None:
    path = copy / "out/job.report.json"
    report = json.loads(path.read_text())
    holder = report if lacking == "shots" else report["shots"][0]
    del holder[lacking]
    if instead is not None:
        holder[lacking] = instead
    path.write_text(json.dumps(report))
    (problem,) = verify.check_folder(copy / "out").problems
    assert problem.path == path
    assert re.match(rf"the report is damaged, or of another version: .*{lacking}", problem.text)
