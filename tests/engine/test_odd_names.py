"""File names that are not UTF-8, or that no file system takes, and users without a home folder."""

from __future__ import annotations

import json
import os
import pwd
from pathlib import Path

import pytest
from jobs import run_wancli, tiny_job, write_job

NOT_UTF8 = os.fsdecode(b"m\xff")


@pytest.fixture
def odd(tmp_path, quick) -> Path:
    """A job in a folder whose name is not UTF-8, with a model of such a name."""
    folder = tmp_path / os.fsdecode(b"j\xfe")
    folder.mkdir()
    (folder / NOT_UTF8).mkdir()
    for path in quick.iterdir():
        (folder / NOT_UTF8 / path.name).symlink_to(path)
    (folder / "model").symlink_to(NOT_UTF8)
    return write_job(folder, tiny_job(model={"transformer": "x"}) | {"model": "model"})


def test_names_that_are_not_utf8_survive_a_render_and_every_look_at_it(odd, capsys):
    out = odd.parent / "out"
    assert run_wancli(capsys, "render", odd, "-q", "--json").code == 0
    assert run_wancli(capsys, "render", odd, "-q", "--json").code == 0
    root = json.loads((out / "clip.manifest.json").read_bytes())["model"]["root"]
    assert os.fsencode(root).endswith(b"/m\xff")
    for command in (
        ["plan", odd, "--json"],
        ["status", odd, "--json"],
        ["check", out, "--json"],
        ["inspect", odd.parent / NOT_UTF8, "--json"],
    ):
        result = run_wancli(capsys, *command)
        assert result.code == 0, result.err
        json.loads(result.out)
    assert run_wancli(capsys, "report", out, "-o", odd.parents[1] / "report.html").code == 0
    (odd.parents[1] / "report.html").read_bytes().decode()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("out/{id}.mp4", "a name of 304 bytes; at most 235 fit, for shot 猫"),
        ("LONG/{seed}.mp4", "a name of 300 bytes; at most 255 fit, for shot 猫"),
        ("DEEP/{seed}.mp4", " bytes; at most 3,840 fit, for shot 猫"),
    ],
)
def test_a_name_that_no_file_system_takes_is_told_by_plan_for_its_shot(tmp_path, capsys, output, message):
    output = output.replace("LONG", "ä" * 150).replace("DEEP", "/".join(["d" * 200] * 20))
    job = {"prompt": "x", "size": "64x64", "output": output, "items": [{"id": "猫" * 100, "seed": 1}]}
    result = run_wancli(capsys, "plan", write_job(tmp_path, json.dumps(job, indent=0)))
    assert result.code == 2
    assert "job.yaml:4: output: a " in result.err
    assert message in result.err


def test_a_user_without_a_home_renders_without_a_cache(tmp_path, quick, capsys, monkeypatch):
    def nobody(_: int) -> None:
        raise KeyError("uid not found")

    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "WANCLI_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    job = write_job(tmp_path, tiny_job(quick))
    assert run_wancli(capsys, "render", job, "-q").code == 0
    assert run_wancli(capsys, "check", job).code == 0
    result = run_wancli(capsys, "cache", "ls", "--json")
    assert result.code == 0
    assert json.loads(result.out) == []


def test_a_url_or_a_variable_in_a_job_is_refused_with_its_line(tmp_path, capsys):
    for key, value in (
        ("output", "s3://bucket/{id}.mp4"),
        ("output", "$SCRATCH/{id}.mp4"),
        ("model", "${MODELS}/wan"),
        ("prompts_from", "https://host/prompts.txt"),
    ):
        job = {"prompt": "x", "output": "out/a.mp4", key: value}
        if key == "prompts_from":
            del job["prompt"]
        result = run_wancli(
            capsys, "plan", write_job(tmp_path, "\n".join(f"{k}: {v!r}" for k, v in job.items()))
        )
        assert result.code == 2, (value, result)
        assert f": {key}: " in result.err
        assert "is a URL" in result.err or "no variables" in result.err
