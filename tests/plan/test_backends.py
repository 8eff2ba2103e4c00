"""What a job says of how its transformer computes, from the file to the manifest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import CommandResult, latents_of, manifest_of, rule, run_wancli, tiny_job, write_job

from wancli.errors import JobError
from wancli.job.loader import load
from wancli.models.config import ComputeOptions
from wancli.plan.memory_estimate import predict_phases
from wancli.plan.planner import build_plan
from wancli.plan.shot import Shot


def planned(folder: Path, **memory: Any) -> Shot:
    job = tiny_job(memory={"device": "cpu"} | memory)
    return build_plan(load(write_job(folder, job)), folder / "memo").shots[0]


def test_a_job_chooses_the_backends(tmp_path: Path):
    assert planned(tmp_path).model.kernels == ComputeOptions()
    assert planned(tmp_path, attention="math", chunk=256).model.kernels == ComputeOptions("math", 256)
    shot = planned(tmp_path, fp8_matmul=True)
    assert (shot.model.kernels.fp8_matmul, shot.model.dtype, shot.model.residency) == (
        True,
        "fp8",
        "resident",
    )


def test_the_key_of_a_latent_depends_on_rounding_but_not_on_the_chunk(tmp_path: Path):
    plain = planned(tmp_path).latents_key
    assert planned(tmp_path, chunk=256).latents_key == plain
    others = {
        planned(tmp_path, **memory).latents_key
        for memory in ({"attention": "math"}, {"attention": "flash"}, {"dtype": "fp8"}, {"fp8_matmul": True})
    }
    assert len(others | {plain}) == 5


def test_fp8_matmuls_need_no_second_copy_of_the_weights(tmp_path: Path):
    packed, product = planned(tmp_path, dtype="fp8"), planned(tmp_path, fp8_matmul=True)
    assert predict_phases(product)[1].model < predict_phases(packed)[1].model


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"chunk": 255}, r"job\.yaml:\d+: memory\.chunk: should be greater than or equal to 256, got 255"),
        ({"chunk": "some"}, r"memory\.chunk: 'some' is neither a number nor 'auto'"),
        ({"attention": "fast"}, r"memory\.attention: 'fast' is not one of 'auto', .*'sage'"),
        (
            {"fp8_matmul": True, "dtype": "bf16"},
            r"memory\.dtype: weights in bf16 cannot be multiplied in fp8",
        ),
        (
            {"fp8_matmul": True, "residency": "streamed"},
            r"memory\.residency: streamed weights cannot be multiplied",
        ),
    ],
)
def test_contradicting_options_are_refused(tmp_path: Path, memory: dict[str, Any], message: str):
    with pytest.raises(JobError, match=message):
        planned(tmp_path, **memory)


def test_loras_cannot_be_combined_with_fp8_matmuls(tmp_path: Path):
    job = tiny_job(memory={"fp8_matmul": True}, loras=[{"path": "style.safetensors"}])
    with pytest.raises(JobError, match="loras: LoRAs cannot be added to weights that are multiplied in fp8"):
        build_plan(load(write_job(tmp_path, job)), tmp_path / "memo")


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (
            {"attention": "sage"},
            "memory.attention: attention backend 'sage' is not available: sageattention is not installed",
        ),
        (
            {"attention": "cudnn"},
            "memory.attention: attention backend 'cudnn' is not available: torch does not support it",
        ),
        ({"fp8_matmul": True}, "memory.fp8_matmul: only CUDA devices multiply in fp8"),
    ],
)
def test_a_missing_backend_is_reported_before_anything_is_loaded(
    render: Callable[..., CommandResult], memory: dict[str, Any], message: str
):
    result = render(memory={"device": "cpu"} | memory)
    assert result.code == 3
    assert message in result.err


def test_the_manifest_and_the_report_name_the_backends(
    render: Callable[..., CommandResult], tmp_path: Path, capsys
):
    memory = {"device": "cpu", "attention": "math", "chunk": 256}
    job = {"size": "256x128", "frames": 9, "memory": memory, "video": {"keep_latents": True}}
    assert render(**job).code == 0
    body = manifest_of(tmp_path)["model"]
    assert body["kernels"] == {"attention": "math", "chunk": 256, "fp8_matmul": False}
    assert body["attention"] == {"asked": "math", "self": "math", "cross": "flash_attention"}


def test_a_chunked_shot_and_its_measured_effects_are_the_same(
    render: Callable[..., CommandResult], tmp_path: Path
):
    found = []
    for chunk in (256, "auto"):
        job = {"size": "256x128", "frames": 9, "video": {"keep_latents": True}, "memory": {"chunk": chunk}}
        result = render(**job, inject=[rule(blocks="1-2")], measure=True, folder=tmp_path / str(chunk))
        assert result.code == 0
        effects = manifest_of(tmp_path / str(chunk))["effects"]
        found.append((latents_of(tmp_path / str(chunk)), effects))
    (in_pieces, some), (whole, same) = found
    assert (in_pieces - whole).norm() < 1e-5 * whole.norm()
    assert len(some) == len(same) == 2
    for a, b in zip(some, same, strict=True):
        assert a["blocks"].keys() == {"1", "2"}
        assert a["blocks"] == pytest.approx(b["blocks"], rel=1e-4)
        assert a["changed_percent"] == pytest.approx(b["changed_percent"], abs=0.01)


def test_the_plan_and_the_summary_name_the_backends(
    tmp_path: Path, quick: Path, warm: Path, capsys, monkeypatch
):
    monkeypatch.setenv("WANCLI_CACHE", str(warm))
    memory = {"device": "cpu", "attention": "math", "chunk": 512}
    job = write_job(tmp_path, tiny_job(quick, memory=memory))
    assert "resident, 512 tokens at a time, math attention" in run_wancli(capsys, "plan", job).out
    result = run_wancli(capsys, "render", job)
    assert "attention: math among video tokens, flash_attention to the text" in result.err
