"""Save and load a solver's state between two steps, so that sampling resumes bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wancli.errors import EntryError
from wancli.sampling.solvers import State
from wancli.storage import records, tensor_file

_NAMES = {"x", "history.0", "history.1", "last"}


def save_state(path: Path, state: State, record: dict[str, Any]) -> None:
    """Save a state and its record, durably and atomically. Raises NoSpace or MachineError."""
    history = {f"history.{i}": tensor for i, tensor in enumerate(state.history)}
    last = {} if state.last is None else {"last": state.last}
    tensor_file.save_tensors(path, {"x": state.x, **history, **last}, record)


def load_state(path: Path, shape: tuple[int, ...] | None = None) -> tuple[State, dict[str, Any]]:
    """Load a state and its record. Raises EntryError if the file is damaged or not a state.

    With a `shape` a state of another one is damage, too, and its tensors are not read.
    """
    tensors, record = tensor_file.load_tensors(path, records.STATE, shape)
    if not {"x"} <= tensors.keys() <= _NAMES or {tensor.shape for tensor in tensors.values()} != {
        tensors["x"].shape
    }:
        raise EntryError("not the state of a shot", where=str(path), hint=records.STATE.hint)
    history = tuple(tensors[name] for name in sorted(tensors) if name.startswith("history."))
    return State(tensors["x"], history, tensors.get("last")), record
