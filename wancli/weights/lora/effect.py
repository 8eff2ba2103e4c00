"""Says whether a LoRA changes anything at all, from its scales and the first factors that are not 0."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wancli.weights.formats.numbers import is_all_zero
from wancli.weights.formats.safetensors_header import Header, read_header
from wancli.weights.lora.change import Change


def explain_no_effect(path: Path, changes: Sequence[Change]) -> str:
    """Return why these changes of a file add exactly nothing; empty if one of them adds something.

    Reads whole factors, change by change, up to the first change without a factor of zeros.
    """
    if all(change.scale == 0 for change in changes):
        return "it changes nothing, because its scale is 0"
    header = read_header(path)
    if all(change.scale == 0 or _holds_zeros(header, change) for change in changes):
        return "it changes nothing, because its matrices are 0, as before a training"
    return ""


def _holds_zeros(header: Header, change: Change) -> bool:
    """Return whether a factor of the change is all zeros."""
    return any(
        is_all_zero(header.tensors[key].dtype, header.read_bytes(key))
        for part, key in change.keys.items()
        if part != "alpha"
    )
