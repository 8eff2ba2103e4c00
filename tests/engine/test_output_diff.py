"""A video in the way says by which keys of the job it differs from the shot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from jobs import CommandResult, rule, tiny_job, write_job
from PIL import Image

from wancli.engine import output_diff
from wancli.job.loader import load
from wancli.plan import planner as planning
from wancli.plan.shot import Shot

CASES: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"seed": 5}, "seed 0, now 5"),
    ({"size": "64x80", "frames": 5}, "size 64x64, now 64x80; frames 1, now 5"),
    ({"sampler": {"steps": 3}}, "sampler.steps 2, now 3; inject.0.steps 0-1, now 0-2"),
    ({"sampler": {"steps": 2, "solver": "euler", "guidance": 3}}, "sampler.solver unipc, now euler; "
     "sampler.guidance 5, now 3"),
    ({"video": {"crf": 20}}, "video.crf 16, now 20"),
    ({"video": {"crf": 20, "fps": 8, "codec": "h265"}, "noise": "cuda"},
     "noise cpu, now cuda; video.fps 16, now 8; video.crf 16, now 20; 1 more"),
    ({"memory": {"dtype": "bf16", "attention": "math"}},
     "memory.dtype fp32, now bf16; memory.attention auto, now math; another encoder of prompt; 2 more"),
    ({"prompt": "a dog"}, "another prompt"),
    ({"negative": "rain"}, "another negative"),
    ({"text": {"max_tokens": 512}}, "text.max_tokens 256, now 512"),
    ({"inject": []}, "another inject"),
    ({"inject": [{"prompt": "a bird"}]}, "another inject.0.prompt"),
    ({"inject": [{"blocks": "1-2"}]}, "inject.0.blocks 0-3, now 1-2"),
    ({"inject": [{"strength": 0.5}]}, "inject.0.strength 0.6, now 0.5"),
    ({"inject": [{"steps": 0}]}, "inject.0.steps 0-1, now 0"),
    ({"inject": [{"branch": "both", "blend": "output-mix", "gain": 2}]},
     "inject.0.branch cond, now cond+uncond; inject.0.blend context-lerp, now output-mix; "
     "inject.0.gain 1.0, now 2.0"),
    ({"inject": [{"frames": "1-4", "region": [0, 0, 0.5, 1], "feather": 0.1}], "frames": 5},
     "frames 1, now 5; inject.0.frames all, now 1-4; inject.0.region all, now [0, 0, 0.5, 1]; 1 more"),
    ({"inject": [{"mask": "mask.png"}]}, "another inject.0.mask"),
]  # fmt: skip


@pytest.fixture
def shot(
    render: Callable[..., CommandResult], tmp_path: Path, known: Path, warm: Path
) -> Callable[..., Shot]:
    """The only shot of a job beside a video that the tiny job with a rule has made."""
    assert render(inject=[rule(blocks="all")]).code == 0

    def planned(**changes: Any) -> Shot:
        job = write_job(tmp_path, tiny_job(**{"model": known, "inject": [rule(blocks="all")]} | changes))
        return planning.build_plan(load(job), warm / "hashes.json").shots[0]

    return planned


def test_each_key_that_differs_is_named_with_what_it_was_and_is(
    shot: Callable[..., Shot], tmp_path: Path
) -> None:
    Image.fromarray(numpy.eye(64, dtype=numpy.uint8) * 255).save(tmp_path / "mask.png")
    for changes, differs in CASES:
        if "inject" in changes:
            changes = changes | {"inject": [rule(blocks="all") | one for one in changes["inject"]]}
        assert output_diff.describe_differences(shot(**changes)) == (differs and f"made with {differs}"), (
            changes
        )
