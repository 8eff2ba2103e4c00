"""The peak of a whole process that renders is what the plan said, within 10 %."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jobs import tiny_job, write_job

from scripts.make_random_checkpoint import FIXTURE_PIECES, umt5_entries, write_checkpoint, write_safetensors
from wancli.job.loader import load
from wancli.models.config import T5Config, WanConfig
from wancli.plan.planner import build_plan
from wancli.plan.render_plan import Plan

MEASURED = """
import atexit, re, sys
from wancli.resources import measure
from wancli.__main__ import main
measure._reset_high_water = lambda: True  # one mark for the whole process, not one for each phase
def tell():
    kib = re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]
    print("VmHWM", 1024 * int(kib), file=sys.stderr)
atexit.register(tell)
main()
"""


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint whose transformer takes 660 MB in fp32, stored in bf16."""
    folder = tmp_path_factory.mktemp("prediction") / "transformer"
    config = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=3)
    write_checkpoint(folder, config, dtype="bf16", text_encoder="tiny", vae="tiny")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint whose text encoder takes 620 MB in fp32, stored in bf16."""
    folder = tmp_path_factory.mktemp("prediction") / "encoder"
    config = WanConfig(dim=192, ffn_dim=384, num_heads=2, num_layers=2, text_dim=1536)
    write_checkpoint(folder, config, dtype="bf16", text_encoder="tiny", vae="tiny")
    sizes = T5Config(FIXTURE_PIECES, d_model=1536, d_kv=64, d_ff=4096, num_layers=6, num_heads=24)
    write_safetensors(folder / "models_t5_umt5-xxl-enc-bf16.safetensors", umt5_entries(sizes))
    yield folder
    shutil.rmtree(folder)


def planned(job: Path, model: Path) -> Plan:
    """The plan of a job. Digests of its files are kept for other tests and for the process that renders."""
    plan = build_plan(load(job), model.with_suffix(".hashes.json"))
    shutil.copy(model.with_suffix(".hashes.json"), Path(os.environ["WANCLI_CACHE"]) / "hashes.json")
    return plan


def measured(job: Path) -> int:
    """Bytes that a process that renders the job has in memory at its peak."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, "render", str(job), "-q"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    return int(done.stderr.split("VmHWM")[1])


@pytest.mark.parametrize("memory", [{"residency": "resident"}, {"residency": "streamed"}, {"dtype": "fp8"}])
def test_a_transformers_peak_is_predicted(transformer: Path, tmp_path: Path, memory: dict[str, Any]) -> None:
    changes = {"size": "128x128", "sampler": {"steps": 1}, "memory": memory}
    job = write_job(tmp_path, tiny_job(transformer, **changes))
    plan = planned(job, transformer)
    (shot,) = plan.shots
    assert max(plan.schedule.phases(shot), key=lambda phase: phase.total).name in ("sample", "decode")
    assert measured(job) == pytest.approx(plan.schedule.peak(shot), rel=0.1)
    report = json.loads((tmp_path / "out" / "job.report.json").read_text())
    assert report["peak"]["predicted"] == plan.schedule.peak(shot)
    assert report["peak"]["measured"] == pytest.approx(plan.schedule.peak(shot), rel=0.1)


@pytest.mark.parametrize("residency", ["resident", "streamed"])
def test_a_text_encoders_peak_is_predicted(encoder: Path, tmp_path: Path, residency: str) -> None:
    job = write_job(tmp_path, tiny_job(encoder, sampler={"steps": 1}, memory={"residency": residency}))
    plan = planned(job, encoder)
    (shot,) = plan.shots
    assert max(plan.schedule.phases(shot), key=lambda phase: phase.total).name == "encode"
    assert measured(job) == pytest.approx(plan.schedule.peak(shot), rel=0.1)
