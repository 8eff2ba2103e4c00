"""How far quantized and half-precision weights may move the velocity, bounded on both sides.

The bounds are what was measured times 1.5 and divided by it: a mode that silently runs in another precision
fails on one side or the other.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor

from scripts.bench.precision import FP32, MODES, TINY, Mode, relative_error, two_blocks, whole_model
from scripts.bench.quantize import K_TYPES, to_blocks
from wancli import wan_mini
from wancli.models.config import WanConfig

Velocity = Callable[[Mode], Tensor]
MARGIN = 1.5
ROOT = Path(__file__).parents[2]
NARROW = {  # of the velocity, in percent; the best first
    "fp16": 0.0065,
    "bf16": 0.055,
    "GGUF Q8_0": 0.089,
    "GGUF Q6_K": 0.34,
    "fp8 made at load (a scale per row)": 0.42,
    "fp8 e4m3, a scale per tensor": 0.44,
    "fp8 e4m3, plain": 0.61,
    "GGUF Q5_K": 0.66,
    "GGUF Q5_1": 0.69,
    "GGUF Q5_0": 0.70,
    "fp8 e5m2, plain": 0.99,
    "GGUF Q4_1": 1.4,
    "GGUF Q4_K": 1.5,
    "GGUF Q4_0": 1.9,
    "GGUF Q3_K": 2.7,
    "GGUF Q2_K": 5.2,
}
MINI = {"fp16": 0.017, "bf16": 0.15, "fp8 made at load (a scale per row)": 1.4, "fp8 e5m2, plain": 3.3}
RANDOM = {"fp16": 0.035, "bf16": 0.33, "fp8 e4m3, plain": 2.9}


def percent(velocity: Velocity, mode: str) -> float:
    return 100 * relative_error(velocity(MODES[mode]), velocity(FP32))


@pytest.fixture(scope="module")
def narrow() -> Velocity:
    return two_blocks(WanConfig(256, 512, 2, 2))


@pytest.fixture(scope="module")
def trained() -> Velocity:
    return whole_model(wan_mini.FOLDER)


@pytest.fixture(scope="module")
def random() -> Velocity:
    return whole_model(TINY)


def test_every_mode_has_a_bound_and_a_row_in_the_benchmarks() -> None:
    assert NARROW.keys() == MODES.keys()
    page = (ROOT / "docs/benchmarks.md").read_text()
    assert all(f"| {mode} |" in page for mode in MODES)


@pytest.mark.parametrize("mode", NARROW)
def test_the_error_of_two_blocks_is_that_of_the_mode(mode: str, narrow: Velocity) -> None:
    assert NARROW[mode] / MARGIN < percent(narrow, mode) < NARROW[mode] * MARGIN


def test_fewer_bits_cost_more(narrow: Velocity) -> None:
    for modes in (
        ["fp16", "bf16", "fp8 made at load (a scale per row)", "fp8 e4m3, plain", "fp8 e5m2, plain"],
        [f"GGUF Q{kind}" for kind in ("8_0", "6_K", "5_K", "4_K", "3_K", "2_K")],
    ):
        errors = [percent(narrow, mode) for mode in modes]
        assert errors == sorted(errors)


@pytest.mark.parametrize("mode", MINI)
def test_the_error_of_wan_mini_is_that_of_the_mode(mode: str, trained: Velocity) -> None:
    assert MINI[mode] / MARGIN < percent(trained, mode) < MINI[mode] * MARGIN


@pytest.mark.parametrize("mode", RANDOM)
def test_the_error_of_forty_random_blocks_is_that_of_the_mode(mode: str, random: Velocity) -> None:
    assert RANDOM[mode] / MARGIN < percent(random, mode) < RANDOM[mode] * MARGIN


@pytest.mark.parametrize("kind", K_TYPES)
def test_blocks_of_the_k_types_mean_what_the_reference_reads_in_them(kind: str) -> None:
    weight = 0.02 * torch.randn(6, 512, generator=torch.Generator().manual_seed(1))
    weight[2, :256] = 0
    packed = to_blocks(weight, kind)
    blocks = packed.data.view(6, -1).numpy()
    read = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]).copy())
    assert torch.equal(packed.unpack(torch.float32), read)
    steps = {"Q2_K": 3, "Q3_K": 7, "Q4_K": 15, "Q5_K": 31, "Q6_K": 63}[kind]
    assert (read - weight).abs().max() < 2 * weight.abs().max() / steps * 1.2
    with pytest.raises(ValueError, match="rows of 88 are not made of blocks of 256"):
        to_blocks(torch.zeros(2, 88), kind)
