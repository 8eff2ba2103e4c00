"""What a job may say, a record can hold: else a shot would fail after it was sampled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import pytest
from jobs import manifest_of, rule, run_wancli, tiny_job, write_job
from pydantic import BaseModel, TypeAdapter, ValidationError

from wancli.job import schema as job
from wancli.job import schema_rules as rules
from wancli.plan import picture_resolver
from wancli.storage import injection_schema, model_schema
from wancli.storage import manifest_schema as records


def field(model: type[BaseModel], name: str) -> TypeAdapter[Any]:
    """A field alone, with its bounds."""
    info = model.model_fields[name]
    if not info.metadata:
        return TypeAdapter(info.annotation)
    return TypeAdapter(Annotated[info.annotation, *info.metadata])


SHOT, RULE, LORA = records.ShotSettings, injection_schema.RuleRecord, injection_schema.LoraRecord


@pytest.mark.parametrize(
    ("said", "name", "most", "beyond", "record", "key"),
    [
        (job.Job, "frames", 100_001, 100_002, SHOT, "frames"),
        (job.Job, "seed", 2**63 - 1, 2**63, SHOT, "seed"),
        (job.Sampler, "steps", 1000, 1001, SHOT, "steps"),
        (job.Sampler, "shift", 100.0, 100.1, SHOT, "shift"),
        (job.Sampler, "guidance", 100.0, 100.1, SHOT, "guidance"),
        (job.Sampler, "boundary", 1.0, 1.1, SHOT, "boundary"),
        (job.ExpertGuidance, "high", 100.0, 100.1, records.StageRecord, "guidance"),
        (rules.InjectRule, "gain", 100.0, 100.1, RULE, "gain"),
        (rules.InjectRule, "gain", -100.0, -100.1, RULE, "gain"),
        (rules.LoraEntry, "strength", 10.0, 10.1, LORA, "strength"),
        (rules.LoraEntry, "strength", -10.0, -10.1, LORA, "strength"),
        (job.Video, "fps", 240, 241, SHOT, "fps"),
        (job.Video, "crf", 51, 52, SHOT, "crf"),
        (job.Memory, "decode_chunk", 64, 65, SHOT, "decode_chunk"),
        (job.Memory, "chunk", 2**63 - 1, 2**63, model_schema.KernelRecord, "chunk"),
        (job.Memory, "chunk", 2**63 - 1, 2**63, model_schema.ModelRecord, "chunk"),
        (job.ModelFiles, "heads", 1024, 1025, model_schema.CheckpointFiles, "heads"),
    ],
)
def test_the_most_that_a_job_may_say_is_a_value_of_its_record(
    said: type[BaseModel], name: str, most: float, beyond: float, record: type[BaseModel], key: str
) -> None:
    assert field(record, key).validate_python(field(said, name).validate_python(most)) == most
    with pytest.raises(ValidationError):
        field(said, name).validate_python(beyond)


@pytest.mark.parametrize("rate", [1, 239.999, "1001000/4171", "1000000/999999", 23.976, "24000/1001"])
def test_any_frame_rate_is_a_value_of_its_record(rate: float | str) -> None:
    exact = field(job.Video, "fps").validate_python(rate)
    assert field(SHOT, "fps").validate_python(exact) == exact


def test_strengths_sizes_and_blocks_of_a_job_are_values_of_its_record() -> None:
    for strength in (-10.0, 10.0, -100.0, 100.0):  # one, and the product of those of blocks and steps
        assert field(RULE, "blocks").validate_python({999: strength}) == {999: strength}
    assert field(SHOT, "width").validate_python(picture_resolver.MAX_SIDE) == picture_resolver.MAX_SIDE


def test_a_shot_with_the_most_of_everything_is_rendered_and_done(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, quick: Path
) -> None:
    curve = {"curve": "linear", "start": -10.0, "end": 10.0}
    most = tiny_job(
        quick,
        seed=2**63 - 1,
        labels={"a": 10**31 - 1, "b": 1.7e308, "c": "9" * 50, "": True},
        sampler={"steps": 2, "shift": 100.0, "guidance": 100.0},
        inject=[rule(blocks="all", strength=curve, step_strength=10.0, gain=100.0, branch="both")],
        video={"fps": "1000000/4167", "crf": 51, "keep_latents": True},
        memory={"chunk": 2**63 - 1, "decode_chunk": 64},
        measure=True,
    )
    path = write_job(tmp_path, most)
    result = run_wancli(capsys, "render", path, "-q")
    assert result.code == 0, result.err
    assert manifest_of(tmp_path)["shot"]["labels"]["a"] == 10**31 - 1
    again = run_wancli(capsys, "render", path, "-q", "--json")
    assert [shot["status"] for shot in json.loads(again.out)["shots"]] == ["already done"]


def test_a_label_that_no_record_can_hold_is_refused_before_anything_is_rendered(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, quick: Path
) -> None:
    """YAML has no integers of that length, JSON has."""
    rows = [{"prompt": "a", "labels": {"a": value}} for value in (10**40 - 1, 10**40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    job = tiny_job(quick, prompts_from="rows.jsonl", output="out/{item}.mp4")
    del job["prompt"]
    result = run_wancli(capsys, "plan", write_job(tmp_path, job))
    assert (result.code, "has more than 40 digits" in result.err) == (2, True), result.err
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]))
    assert run_wancli(capsys, "plan", write_job(tmp_path, job)).code == 0
