"""Small LoRA files, and weights of a small model to add them to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wancli.models.config import WanConfig
from wancli.weights.formats.infer_config import transformer_shapes
from wancli.weights.lora.patch import Lora, Loras, Patches, load_lora
from wancli.weights.lora.use import LoraUse

DIM, FFN, DEPTH, RANK = 48, 96, 3, 4
SHAPES = transformer_shapes(WanConfig(DIM, FFN, 2, DEPTH, text_dim=32, freq_dim=64))
Tensors = dict[str, Tensor]


def flat(name: str) -> str:
    return name.replace(".", "_")


def factors(ours: str, rank: int = RANK) -> tuple[Tensor, Tensor]:
    """Random down [r, in] and up [out, r] of a module."""
    rows, *columns = SHAPES[f"{ours}.weight"]
    return torch.randn(rank, math.prod(columns)), torch.randn(rows, rank)


def pair(name: str, rows: int, columns: int) -> Tensors:
    """One low-rank change, as PEFT ends its keys."""
    return {f"{name}.lora_A.weight": torch.randn(2, columns), f"{name}.lora_B.weight": torch.randn(rows, 2)}


def weights(shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> Tensors:
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def use(lora: Lora, strength: float = 1.0, **changes: Any) -> LoraUse:
    fields = {"blocks": None, "steps": None, "expert": None} | changes
    return LoraUse(lora.path, "", strength, coverage=lora.coverage, **fields)


def merged(path: Path, before: Tensors, strength: float = 1.0) -> Tensors:
    """What a whole model's weights become."""
    after = {name: tensor.clone() for name, tensor in before.items()}
    lora = load_lora(path, {name: tuple(tensor.shape) for name, tensor in before.items()})
    Patches(after, lambda _: []).apply_step(Loras([use(lora, strength)], [lora]), 0)
    return after


def changed(after: Tensors, before: Tensors) -> set[str]:
    return {name for name in before if not torch.equal(after[name], before[name])}
