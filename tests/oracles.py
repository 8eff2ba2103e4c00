"""Measures by which tests compare results with independent ones."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(result: Tensor, expected: Tensor) -> float:
    """|result - expected| / |expected|, on the CPU in the dtype of `expected`."""
    expected = expected.cpu()
    difference = result.cpu().to(expected.dtype) - expected
    return float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(expected))
