"""`wancli new` prints jobs that work as they are, and so does every key that a comment offers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from image_cases import assemble
from jobs import run_wancli

from wancli.commands.new import JobKind
from wancli.job.loader import parse

SWEPT = ["early-strength0.4", *(f"{blocks}-strength{s}" for blocks in ("middle", "late") for s in (0.4, 0.9))]


@pytest.mark.parametrize(
    ("kind", "ids"),
    [
        ("render", ["circle", "triangle", "again"]),
        ("injection", ["plain", "late", "two-rules"]),
        (
            "sweep",
            [*(f"seed{seed}-{rest}" for seed in (7, 8) for rest in SWEPT), "seed7-plain", "seed8-plain"],
        ),
        ("chain", ["wakes", "leaves", "returns"]),
    ],
)
def test_a_new_job_is_planned_as_it_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str, ids: list[str]
) -> None:
    said = run_wancli(capsys, "new", kind)
    assert (said.code, said.err) == (0, "")
    job = tmp_path / "job.yaml"
    job.write_text(said.out)
    options: list[str] = []
    if kind == "chain":  # of a model that takes pictures
        folder = assemble("wan22-ti2v-tiny", tmp_path / "model")
        options = ["--set", f"model={folder}", "--set", "size=64x64", "--set", "frames=5"]
    planned = run_wancli(capsys, "plan", job, "--json", *options)
    assert (planned.code, planned.err) == (0, "")
    assert [shot["id"] for shot in json.loads(planned.out)["shots"]] == ids


@pytest.mark.parametrize("kind", [*JobKind])
def test_every_key_that_a_comment_offers_is_a_key_of_a_job(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: Any
) -> None:
    text = run_wancli(capsys, "new", kind).out
    switched_on, count = re.subn(r"(?m)^( *)#(?=\w)", r"\1", text)
    assert count >= 1
    assert parse(switched_on.encode(), "job.yaml", "job", tmp_path).items


def test_another_kind_is_refused_with_those_that_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    said = run_wancli(capsys, "new", "film")
    assert (said.code, said.out) == (2, "")
    assert "'sweep', 'render', 'chain', 'injection'" in said.err
