"""The keys of a few jobs as literals: if one changes, every finished video of such a job is "not done"."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import SPIECE, T5, TINY, TRANSFORMER, VAE, rule, run_wancli, tiny_job, write_job
from weight_files import save_tensors

EXPERTS = {
    "high_noise": str(TINY / TRANSFORMER),
    "low_noise": str(TINY / TRANSFORMER),
    "text_encoder": str(TINY / T5),
    "tokenizer": str(SPIECE),
    "vae": str(TINY / VAE),
    "heads": 2,
}
INJECTIONS = [
    rule(blend="output-mix", blocks="early", strength=0.5),
    rule(blend="context-lerp", blocks="middle", steps="0-50%"),
    rule(blend="replace", blocks="30-31", branch="both", strength=1.0),
    rule(blend="concat", blocks=[35, 37], strength=[0.25, 0.5]),
    rule(blend="output-mix", blocks="late", strength={"curve": "gaussian", "start": 0.8}, gain=1.5),
]
KEYS = {
    "plain": "dbbdb6d819c83e447c69e1d2621a23226a3abe298e78e1eedf6a57fbf7cb83e0",
    "every blend": "6775d3a7e357355496d21bd6b39c12c62238afb0b901a9abef0e9bf8fb5d6bfe",
    "lora": "fc5b952ab6685efe0e54c7b9d6d82608457671dbe21761c080cab83d4518c53f",
    "two experts": "4721a5078457ecc8c4f6937db2a111403edd6e7bb25038bae074b240d7f2b30f",
}


def lora_file(folder: Path) -> Path:
    """A LoRA whose bytes never change."""
    down = torch.arange(4 * 48, dtype=torch.float32).reshape(4, 48) / 192
    up = torch.arange(48 * 4, dtype=torch.float32).reshape(48, 4) / 192
    pair = {"blocks.0.self_attn.q.lora_A.weight": down, "blocks.0.self_attn.q.lora_B.weight": up}
    return save_tensors(folder / "style.safetensors", pair)


def changes(name: str, folder: Path) -> dict[str, Any]:
    if name == "every blend":
        return {
            "inject": INJECTIONS,
            "sampler": {"solver": "dpm++", "steps": 4, "shift": 3.0, "guidance": 4.0},
        }
    if name == "lora":
        return {"loras": [{"path": str(lora_file(folder)), "strength": 0.75, "blocks": "early"}]}
    if name == "two experts":
        return {"model": EXPERTS, "sampler": {"steps": 4, "guidance": {"high": 4.0, "low": 3.0}}}
    return {}


@pytest.mark.parametrize("name", KEYS)
def test_a_job_that_was_finished_by_an_earlier_version_is_still_done(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = write_job(tmp_path, tiny_job(**changes(name, tmp_path)))
    result = run_wancli(capsys, "plan", job, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["shots"][0]["key"] == KEYS[name]
