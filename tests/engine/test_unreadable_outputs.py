"""A file that cannot be looked at is neither missing nor damaged: it stays, and its shot fails by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from failing_disk import fail_reading, forbid
from jobs import files_in, run_wancli, tiny_job, write_job

from wancli.errors import UnreadableNow
from wancli.storage import disk

JOB = tiny_job(output="out/{id}.mp4", items=[{"id": "a", "seed": 1}, {"id": "b", "seed": 2}])


@pytest.fixture
def rendered(tmp_path, quick, capsys) -> Path:
    """A job of two shots, of which the first is finished."""
    path = write_job(tmp_path, JOB | {"model": str(quick)})
    assert run_wancli(capsys, "render", path, "--items", "0", "-q").code == 0
    return path


@pytest.mark.parametrize("error", ["EACCES", "ESTALE", "EIO"])
def test_a_finished_video_that_cannot_be_read_stays_and_the_other_shots_are_rendered(
    rendered, capsys, monkeypatch, error
):
    video = rendered.parent / "out/a.mp4"
    before = (video.read_bytes(), video.stat().st_ino)
    with monkeypatch.context() as patch:
        fail_reading(patch, lambda path: path == video, error)
        result = run_wancli(capsys, "render", rendered, "-q")
    assert result.code == 3
    assert f"{video}: cannot be read" in result.err
    assert result.out.split() == [str(rendered.parent / "out/b.mp4")]
    assert (video.read_bytes(), video.stat().st_ino) == before
    assert not [name for name in files_in(rendered.parent) if "damaged" in name or "old" in name]
    assert run_wancli(capsys, "render", rendered, "-q").code == 0


def test_a_saved_state_that_cannot_be_read_stays(rendered, capsys, monkeypatch):
    state = rendered.parent / "out/b.state.safetensors"
    state.write_bytes(b"a state, for all that anybody knows")
    with monkeypatch.context() as patch:
        fail_reading(patch, lambda path: path == state, "EIO")
        result = run_wancli(capsys, "render", rendered, "-q")
    assert result.code == 3
    assert str(state) in result.err
    assert state.read_bytes() == b"a state, for all that anybody knows"


@pytest.mark.parametrize("error", ["ESTALE", "EIO"])
def test_a_video_that_cannot_be_read_back_fails_its_shot(rendered, capsys, monkeypatch, error):
    real = disk.sha256

    def fails(path: Path) -> str:
        if path.name == "b.mp4":
            raise UnreadableNow(f"cannot be read: {error}", where=str(path))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "sha256", fails)
        result = run_wancli(capsys, "render", rendered, "-q")
    assert result.code == 3
    assert "b.mp4: cannot be read" in result.err
    assert run_wancli(capsys, "render", rendered, "-q").code == 0


def test_status_and_check_tell_unreadable_from_damaged(rendered, capsys, monkeypatch):
    video = rendered.parent / "out/a.mp4"
    fail_reading(monkeypatch, lambda path: path == video, "EIO", ("open", "stat"))
    status = json.loads(run_wancli(capsys, "status", rendered, "--json").out)
    assert [shot["state"] for shot in status["shots"]] == ["unreadable", "to do"]
    assert "Input/output error" in status["shots"][0]["error"]["message"]
    for what in (rendered, rendered.parent / "out"):
        result = run_wancli(capsys, "check", what, "--json")
        assert result.code == 4
        found = json.loads(result.out)
        assert found["problems"] == []
        assert [entry["path"] for entry in found["unreadable"]] == [str(video)]


@pytest.mark.parametrize("retries", [0, 1])
def test_a_video_that_cannot_be_read_just_now_is_asked_for_again(rendered, capsys, monkeypatch, retries):
    asked: list[Path] = []

    def concerned(path: Path) -> bool:
        if path.name == "a.mp4":
            asked.append(path)
        return len(asked) == 1 and path.name == "a.mp4"

    fail_reading(monkeypatch, concerned, "EIO")
    result = run_wancli(capsys, "render", rendered, "--retries", retries)
    assert result.code == (0 if retries else 3)
    assert ("tried again (1 of 1)" in result.err) == bool(retries)
    assert sorted(path.name for path in map(Path, result.out.split())) == ["a.mp4", "b.mp4"][1 - retries :]


@pytest.mark.parametrize("error", ["EACCES", "EIO"])
@pytest.mark.parametrize("name", ["job.report.json", "job.report.html"])
def test_a_report_that_cannot_be_read_costs_no_render(rendered, capsys, monkeypatch, caplog, name, error):
    report = rendered.parent / "out" / name
    report.write_bytes(b"of any program")
    with monkeypatch.context() as patch:
        fail_reading(patch, lambda path: path == report and report.read_bytes() == b"of any program", error)
        result = run_wancli(capsys, "render", rendered, "-q")
    assert result.code == 0
    aside = report.with_name(f"{report.stem}.unreadable-1{report.suffix}")
    assert f"{report}: cannot be read" in caplog.text
    assert str(aside) in caplog.text
    assert aside.read_bytes() == b"of any program"
    written = json.loads((rendered.parent / "out/job.report.json").read_bytes())
    assert [shot["status"] for shot in written["shots"]] == ["already done", "rendered"]


def test_a_report_that_cannot_even_be_asked_for_costs_no_render(rendered, capsys, monkeypatch, caplog):
    report = rendered.parent / "out/job.report.json"
    before = report.read_bytes()
    fail_reading(monkeypatch, lambda path: path == report, "EIO", ("open", "stat", "lstat"))
    result = run_wancli(capsys, "render", rendered, "-q")
    assert result.code == 0
    assert f"{report}: cannot be read" in caplog.text
    monkeypatch.undo()
    assert report.read_bytes() == before


def test_a_latent_to_decode_that_cannot_be_read_ends_as_a_damaged_one(rendered, capsys, monkeypatch):
    latent = rendered.parent / "out/x.latents.safetensors"
    latent.write_bytes(b"")
    fail_reading(monkeypatch, lambda path: path == latent, "EIO")
    result = run_wancli(capsys, "decode", latent)
    assert (result.code, f"{latent}: cannot be read: " in result.err) == (4, True)


COMMANDS = {
    "plan": ["plan", "{job}"],
    "render": ["render", "{job}", "-q"],
    "status": ["status", "{job}"],
    "check": ["check", "{job}"],
    "check a folder": ["check", "{private}"],
    "report": ["report", "{job}"],
    "report a folder": ["report", "{private}"],
    "plan with a LoRA": ["plan", "{lora}"],
    "render a prompt": ["render", "--prompt", "x", "-o", "{private}/o.mp4", "-q"],
    "compare": ["compare", "{private}/a.mp4", "{private}/b.mp4", "-o", "{top}/c.png"],
    "decode": ["decode", "{private}/a.latents.safetensors", "-q"],
    "inspect": ["inspect", "{private}/model"],
    "encode": ["encode", "{embedding}", "-q"],
    "probe": ["probe", "{inside}"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_this_user_may_not_enter_is_named_by_every_command(
    tmp_path, quick, capsys, monkeypatch, name
):
    private = tmp_path / "private"
    (private / "sub").mkdir(parents=True)
    job = {"model": str(quick), "output": "private/sub/{id}.mp4"}
    words = {
        "job": write_job(tmp_path, tiny_job(**job)),
        "lora": write_job(tmp_path, tiny_job(**job, loras=[{"path": "private/l.safetensors"}]), "lora.yaml"),
        "embedding": write_job(
            tmp_path, tiny_job(**job) | {"prompt": {"embedding": "private/e.safetensors"}}, "e.yaml"
        ),
        "inside": private / "job.yaml",
        "private": private / "sub",
        "top": tmp_path,
    }
    monkeypatch.chdir(tmp_path)
    forbid(monkeypatch, private)
    result = run_wancli(capsys, *(word.format(**words) for word in COMMANDS[name]))
    assert result.code in (0, 2, 3, 4)
    assert (result.code == 0) == (name in ("plan", "status"))
    assert ("0000.mp4" if name == "status" else "private") in result.err + result.out
    if name != "plan":
        assert "Permission denied" in result.err + result.out
