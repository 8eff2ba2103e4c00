"""The change that a LoRA file makes to one parameter. No torch.

A file may fuse the projections of an attention into one matrix, as diffusers' `fuse_projections` stacks their
rows. Its change is one for each projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from wancli.errors import CheckpointError

Kind: TypeAlias = Literal["full", "low-rank", "loha", "lokr"]
Shape: TypeAlias = tuple[int, ...]

FUSED_FROM_DIFFUSERS = {
    "attn1.to_qkv": "self_attn.qkv",
    "attn2.to_kv": "cross_attn.kv",
    "attn2.to_added_kv": "cross_attn.kv_img",
}
# The projections of each, in the order of their rows.
_PROJECTIONS = {
    "self_attn.qkv": ("self_attn.q", "self_attn.k", "self_attn.v"),
    "cross_attn.kv": ("cross_attn.k", "cross_attn.v"),
    "cross_attn.kv_img": ("cross_attn.k_img", "cross_attn.v_img"),
}


@dataclass(frozen=True)
class Change:
    """The change of one parameter. The matrix of a convolution is [out, everything else]."""

    name: str  # official
    kind: Kind
    keys: Mapping[str, str]  # part -> key in the file
    shape: Shape  # of the parameter if full, of its matrix if not
    rank: int = 0
    scale: float = 1.0
    rows: tuple[int, int] | None = None  # from, to: those of the parameter, if the file fuses it with others

    @property
    def key(self) -> str:
        """One key of the file, to name the change by."""
        return next(iter(self.keys.values()))


def split_fused(path: Path, module: str, change: Change) -> Iterator[Change]:
    """Yield the change of a module, or, if it fuses projections, a change of each.

    Raises CheckpointError if the change cannot be split.
    """
    fused = next((name for name in _PROJECTIONS if module.endswith(f".{name}")), None)
    if fused is None:
        yield change
        return
    projections, (rows, *columns) = _PROJECTIONS[fused], change.shape
    each, left = divmod(rows, len(projections))
    if left or change.kind == "lokr":
        what = f"has {rows} rows" if left else "is a Kronecker product"
        raise CheckpointError(
            f"{change.key} changes {len(projections)} projections at once, and {what}",
            where=str(path),
            hint="Save this LoRA with a matrix for each projection: to_q, to_k, to_v.",
        )
    for index, projection in enumerate(projections):
        name = f"{module.removesuffix(fused)}{projection}{change.name.removeprefix(module)}"
        yield replace(change, name=name, shape=(each, *columns), rows=(index * each, (index + 1) * each))
