"""A LoRA that adds exactly nothing is told from one that adds little."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters import SHAPES, Tensors, factors
from weight_files import save_tensors

from wancli.weights.lora.effect import explain_no_effect
from wancli.weights.lora.file import read_lora_file
from wancli.weights.lora.match import select_changes

LAYERS = ("blocks.0.ffn.0", "blocks.1.self_attn.q")


def low_rank() -> Tensors:
    found: Tensors = {}
    for ours in LAYERS:
        down, up = factors(ours)
        found |= {f"{ours}.lora_A.weight": down, f"{ours}.lora_B.weight": up}
    return found


def reason(path: Path) -> str:
    return explain_no_effect(path, select_changes(read_lora_file(path), SHAPES)[0])


def test_a_trained_file_has_an_effect(tmp_path: Path) -> None:
    assert reason(save_tensors(tmp_path / "a.safetensors", low_rank())) == ""


def test_a_scale_of_zero_is_told(tmp_path: Path) -> None:
    alphas = {f"{layer}.alpha": torch.tensor(0.0) for layer in LAYERS}
    path = save_tensors(tmp_path / "a.safetensors", low_rank() | alphas)
    assert reason(path) == "it changes nothing, because its scale is 0"
    one = alphas | {f"{LAYERS[0]}.alpha": torch.tensor(1.0)}
    assert reason(save_tensors(tmp_path / "a.safetensors", low_rank() | one)) == ""


@pytest.mark.parametrize("end", ["lora_A.weight", "lora_B.weight"])
@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str
)
def test_a_factor_of_zeros_is_told(tmp_path: Path, end: str, zero: float, dtype: torch.dtype) -> None:
    found = {
        key: (torch.full_like(tensor, zero) if key.endswith(end) else tensor).to(dtype)
        for key, tensor in low_rank().items()
    }
    path = save_tensors(tmp_path / "a.safetensors", found)
    assert reason(path) == "it changes nothing, because its matrices are 0, as before a training"


def test_the_smallest_number_is_an_effect(tmp_path: Path) -> None:
    found = {key: tensor * 0 if "lora_B" in key else tensor for key, tensor in low_rank().items()}
    found[f"{LAYERS[1]}.lora_B.weight"].view(-1)[-1] = 1e-45
    assert reason(save_tensors(tmp_path / "a.safetensors", found)) == ""


def test_plain_differences_of_zeros_are_told(tmp_path: Path) -> None:
    path = save_tensors(tmp_path / "a.safetensors", {"blocks.0.ffn.0.diff_b": torch.zeros(96)})
    assert reason(path).startswith("it changes nothing")
