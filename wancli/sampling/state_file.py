"""Save and load a solver's state between two steps, so that sampling resumes bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from wancli.errors import EntryError
from wancli.injection.exprs import Branch
from wancli.sampling.solvers import State
from wancli.storage import records, tensor_file

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = {"x", "history.0", "history.1", "last"}
_BRANCHES: tuple[Branch, ...] = ("cond", "uncond")
_RESIDUALS = {f"{tensor_file.RESIDUAL}{branch}": branch for branch in _BRANCHES}


class SavedTensors(NamedTuple):
    """A solver's state, the record of its shot, the sums of its attention maps, if it records some, and the
    residuals [B, L, D] that its next step reuses.
    """

    state: State
    record: dict[str, Any]
    attention_GSWL: Tensor | None
    residuals: Mapping[Branch, Tensor]


def save_state(
    path: Path,
    state: State,
    record: dict[str, Any],
    attention_GSWL: Tensor | None = None,
    residuals: Mapping[Branch, Tensor] = MappingProxyType({}),
) -> None:
    """Save a state and its record, durably and atomically. Raises NoSpace or MachineError."""
    history = {f"history.{i}": tensor for i, tensor in enumerate(state.history)}
    last = {} if state.last is None else {"last": state.last}
    maps = {} if attention_GSWL is None else {tensor_file.ATTENTION: attention_GSWL}
    kept = {f"{tensor_file.RESIDUAL}{branch}": residuals[branch] for branch in residuals}
    tensor_file.save_tensors(path, {"x": state.x, **history, **last, **maps, **kept}, record)


def load_state(path: Path, shape: tuple[int, ...] | None = None) -> SavedTensors:
    """Load a state and its record. Raises EntryError if the file is damaged or not a state.

    With a `shape` a state of another one is damage, too, and its tensors are not read.
    """
    tensors, record = tensor_file.load_tensors(path, records.STATE, shape)
    attention_GSWL = tensors.pop(tensor_file.ATTENTION, None)
    residuals = {_RESIDUALS[name]: tensors.pop(name) for name in tensors.keys() & _RESIDUALS.keys()}
    if not {"x"} <= tensors.keys() <= _NAMES or {tensor.shape for tensor in tensors.values()} != {
        tensors["x"].shape
    }:
        raise EntryError("not the state of a shot", where=str(path), hint=records.STATE.hint)
    history = tuple(tensors[name] for name in sorted(tensors) if name.startswith("history."))
    return SavedTensors(State(tensors["x"], history, tensors.get("last")), record, attention_GSWL, residuals)
