"""The program behind `make gpu`, on a small model and this CPU."""

from __future__ import annotations

import math

import pytest
import torch

from scripts import gpu
from wancli.models.dit_layers import CrossAttention


def test_without_a_gpu_it_says_so_and_ends_well(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 0
    assert capsys.readouterr().out.startswith("make gpu: NO GPU HERE")


def test_a_forward_of_14b_is_1676_teraflop():
    # 21 latent frames of 30 x 52 patches; two operations per product
    tokens, d, f = 21 * 30 * 52, 5120, 13824
    projections, feed_forward = 2 * 6 * d * d, 2 * 2 * d * f
    attention = 2 * 2 * (tokens + 512) * d
    text = 2 * 2 * 512 * d * d
    expected = 40 * (tokens * (projections + feed_forward + attention) + text)
    assert math.isclose(gpu.flop(gpu.T2V_14B, tokens), expected)
    assert math.isclose(expected, 1.68e15, rel_tol=0.01)


def test_every_row_of_the_table_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(CrossAttention, "keys_values", CrossAttention.keys_values)  # to be put back
    monkeypatch.setattr(gpu, "REPEATS", 1)
    assert gpu.main(["--device", "cpu", "--tiny"]) == 0
    lines = [
        line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line[:1] == "|"
    ]
    header, _, *table = lines
    assert tuple(header) == gpu.COLUMNS
    assert [(row[0], row[1]) for row in table] == [
        ("bf16", "2"),
        ("diffusers, bf16", "2"),
        ("bf16, compiled", "2"),
        ("diffusers, bf16, compiled", "2"),
        ("fp8 products", "2"),
        ("fp8 products, compiled", "2"),
        ("bf16", "2"),
        ("bf16, streamed", "2"),
        ("fp8, streamed", "2"),
    ]
    off = {row[0]: row[-1] for row in table}
    assert 0.05 < float(off["diffusers, bf16"].split()[0]) < 2
    assert off["bf16, compiled"] == off["fp8 products, compiled"] == "0.00 %"
