"""The benchmarks run on models that take seconds. Their figures are not judged here."""

from __future__ import annotations

import json
from pathlib import Path

import forked
import pytest

from scripts.bench import first_block, first_block_process, large, streaming
from scripts.make_random_checkpoint import write_checkpoint
from wancli.models.config import WanConfig

MODEL = "64,128,2,3"


def test_streaming_compares_equal_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    streaming.main(["--tiny", "--dir", str(tmp_path / "model")])
    table = capsys.readouterr().out
    assert "| 1 of 16 tokens |" in table
    assert "| 2 of 32 tokens |" in table


def test_a_prompt_and_a_large_render_are_measured_beside_their_plans(tmp_path: Path):
    model = tmp_path / "model"
    write_checkpoint(model, WanConfig(64, 128, 2, 3), dtype="fp8", text_encoder="tiny", vae="tiny")
    assert large.encode(model, tmp_path).predicted > 0
    row = large.render(model, large.CASES[0], tmp_path)
    assert row.peak > 2**26  # torch alone is more
    assert row.predicted > 0
    assert row.step is not None
    assert 0 < row.step < row.seconds


def test_diffusers_is_tried_with_the_same_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = {"num_heads": 2, "dim": 64, "text_dim": 64, "ffn_dim": 128, "num_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "fails" in large.try_diffusers(tmp_path, 0)
    program = "import sys\nfrom scripts.bench.diffusers_memory import main\nmain(sys.argv[1:])"
    monkeypatch.setattr(large, "run_python", lambda said: forked.run(*said[2:], program=program))
    assert large.try_diffusers(tmp_path, 2**30).endswith("holds it")


def test_both_run_their_first_block_from_one_checkpoint(tmp_path: Path):
    first_block_process.make(tmp_path, MODEL, "bf16")
    (tmp_path / "float32.yaml").write_text(first_block.JOB.format(folder=tmp_path, dtype="fp32"))
    for who in ("ours", "theirs"):
        start = first_block.measure_start(who, tmp_path, "float32")
        assert 0 < start.begins <= start.ends <= start.all_end
