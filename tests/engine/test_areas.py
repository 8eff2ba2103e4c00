"""Rules that act in an area, rendered: what the manifest says, and the bits of the whole video."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from jobs import KEPT, CommandResult, latents_of, manifest_of, rule, write_job
from PIL import Image

from wancli.job.loader import load
from wancli.plan.planner import build_plan
from wancli.report.html.injection_entries import injected_shares
from wancli.report.html.rerun_job import build_job
from wancli.storage import manifest

Render = Callable[..., CommandResult]


def test_a_region_of_the_whole_video_gives_the_same_bits_as_none(render: Render, tmp_path: Path) -> None:
    for folder, keys in (("none", {}), ("whole", {"region": [0, 0, 1, 1], "frames": "0-4", "feather": 0.1})):
        said = {"frames": 5, "video": KEPT, "inject": [rule(blocks="late") | keys]}
        assert render(folder=tmp_path / folder, **said).code == 0
    assert torch.equal(latents_of(tmp_path / "none"), latents_of(tmp_path / "whole"))
    assert manifest_of(tmp_path / "none")["key"] == manifest_of(tmp_path / "whole")["key"]


def test_the_record_of_a_rule_in_an_area_makes_the_same_shot_again(
    render: Render, tmp_path: Path, warm: Path
) -> None:
    Image.fromarray(numpy.eye(64, dtype=numpy.uint8) * 255).save(tmp_path / "mask.png")
    rules = [
        rule(blocks=0, frames="1-4", region=[0, 0, 0.3, 1], feather=0.1),
        rule(blocks=1, mask="mask.png"),
        rule(blocks=2),
        rule(blocks=0, region=[0.5, 0, 1, 1]),
    ]
    assert render(frames=5, inject=rules).code == 0
    record = manifest.read(tmp_path / "out/clip.manifest.json")
    assert record
    areas = [entry.area and entry.area.as_dict() for entry in record.injection]
    digest = areas[1]["mask"].pop("sha256")
    assert areas == [
        {"frames": [1, 4], "region": [0, 0, 0.3, 1], "feather": 0.1, "tokens": 8},
        {"mask": {"path": str(tmp_path / "mask.png")}, "tokens": 8},
        None,
        {"region": [0.5, 0, 1, 1], "tokens": 16},
    ]
    assert len(digest) == 64
    assert [entry.hits for entry in record.injection] == [2, 2, 2, 2]  # cells: one block at two steps
    again = build_plan(
        load(write_job(tmp_path, build_job(record, "again.mp4"), "again.yaml")), warm / "h.json"
    )
    assert again.shots[0].key == record.key
    shares = injected_shares(record)
    assert [row["blocks"] for row in shares if row["branch"] == "cond"] == [[0.6, 0.6, 0.6, 0]]
