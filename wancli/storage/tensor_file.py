"""Save and load tensors with a record, verified on reading: finished latents and states of shots.

Both are safetensors files with a record as metadata and a SHA-256 over everything.
NAME.latents.safetensors holds `latents` [z, T, H/s, W/s] fp32, still normalised. It is durable before
decoding starts and is enough to finish a shot; the manifest will continue its record.
NAME.state.safetensors holds all that a solver remembers between two steps (of `x`, `history.0`, `history.1`
and `last` those that exist), so that sampling resumes bit for bit, and in `attention` the sums of attention
maps, in `residual.cond` and `residual.uncond` what the next step reuses; its record names the shot and the
number of steps.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from wancli.errors import EntryError, NoSuchFile, Unreadable
from wancli.storage import atomic, records
from wancli.storage.manifest import canonical_json
from wancli.storage.records import Kind, Slice
from wancli.storage.schema import Data

if TYPE_CHECKING:
    from torch import Tensor

Form = TypeVar("Form", bound=Data)

# The tensors of a state that have other shapes than its latent: one name, and the beginning of names.
ATTENTION, RESIDUAL = "attention", "residual."


def save_latent(path: Path, z_CTYX: Tensor, record: dict[str, Any]) -> None:
    """Save a finished latent; after it returns the latent survives power loss. Raises NoSpace."""
    save_tensors(path, {"latents": z_CTYX}, record)


def load_latent(path: Path, shape: tuple[int, ...] | None = None) -> tuple[Tensor, dict[str, Any]]:
    """Load a latent and its record. Raises EntryError if either is damaged, or is another program's.

    With a `shape` a latent of another one is damage, too, and its tensor is not read.
    """
    payload, _, record = _read_sealed(path, records.LATENT, shape, _require_latent)
    return _parse_tensors(payload, path, records.LATENT)["latents"], record


def read_record(path: Path, form: type[Form]) -> Form | None:
    """Return the typed record of a latent or a state, unverified; None if there is none. Needs no torch."""
    try:
        return form.parse(_record_of(records.read_tensor_document(path)), path)
    except (Unreadable, ValueError, EntryError):
        return None


def save_tensors(path: Path, tensors: Mapping[str, Tensor], record: dict[str, Any]) -> None:
    """Save tensors and their record, durably and atomically. Raises NoSpace or MachineError."""
    tensors = {name: tensors[name].cpu().contiguous() for name in sorted(tensors)}
    about = [[name, [*tensor.shape], str(tensor.dtype)] for name, tensor in tensors.items()]
    parts = (tensor.reshape(-1).numpy().data for tensor in tensors.values())
    document = {"record": record, "sha256": _digest(about, parts, record)}
    atomic.replace(path, records.write_tensors(tensors, canonical_json(document).decode()))


def load_tensors(
    path: Path, kind: Kind, shape: tuple[int, ...] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load fp32 tensors and their record. Raises EntryError if the file is damaged or another program's.

    With a `shape` tensors of another one, except ATTENTION and RESIDUAL, are damage, too, and are not read.
    """
    payload, _, record = _read_sealed(path, kind, shape)
    return _parse_tensors(payload, path, kind), record


def verify_latent(path: Path, shape: tuple[int, ...] | None = None) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Verify a latent without torch; return its shape and its record. Raises EntryError as `load_latent`."""
    _, slices, record = _read_sealed(path, records.LATENT, shape, _require_latent)
    return slices["latents"].shape, record


def _require_latent(slices: Mapping[str, Slice], path: Path) -> None:
    if slices.keys() != {"latents"} or len(slices["latents"].shape) != 4:
        raise EntryError("not a finished latent", where=str(path), hint=records.LATENT.hint)


def _parse_tensors(payload: bytes, path: Path, kind: Kind) -> dict[str, Tensor]:
    try:
        return records.parse_tensors(payload)[0]
    except ValueError as error:
        raise kind.damaged(path, str(error)) from None


def _read_sealed(
    path: Path,
    kind: Kind,
    shape: tuple[int, ...] | None,
    require: Callable[[Mapping[str, Slice], Path], None] = lambda *_: None,
) -> tuple[bytes, dict[str, Slice], dict[str, Any]]:
    """Read a file and verify its checksum; return its bytes, where its tensors are, and its record."""

    def require_expected(slices: Mapping[str, Slice]) -> None:
        for name, each in slices.items():
            if each.dtype != "F32" or each.stop - each.start != 4 * math.prod(each.shape):
                raise ValueError(f"{name} is not in fp32")
        require(slices, path)
        for name, each in slices.items():
            if shape is not None and each.shape != shape and not name.startswith((ATTENTION, RESIDUAL)):
                raise kind.damaged(path, f"{[*each.shape]} is not {[*shape]}, the shape of the shot")

    try:
        payload, slices, document = records.read_tensor_file(path, kind, require_expected)
        record = _record_of(document)
        about = [[name, [*slices[name].shape], "torch.float32"] for name in sorted(slices)]
        view = memoryview(payload)
        parts = (view[slices[name].start : slices[name].stop] for name in sorted(slices))
        digest = _digest(about, parts, record)
    except NoSuchFile as error:
        raise EntryError(error.message, where=str(path)) from None
    except ValueError:
        raise EntryError(f"not {kind.name} of a shot, or damaged", where=str(path), hint=kind.hint) from None
    if document.get("sha256") != digest:
        raise EntryError(f"{kind.name} is damaged: its checksum differs", where=str(path), hint=kind.hint)
    return payload, slices, record


def _record_of(document: Any) -> dict[str, Any]:
    record = document.get("record") if isinstance(document, dict) else None
    if not isinstance(record, dict):
        raise ValueError("no record")
    return record


def _digest(about: list[Any], parts: Iterable[memoryview], record: dict[str, Any]) -> str:
    """Hash the names, shapes and dtypes of tensors, the record, and the bytes of the tensors."""
    digest = hashlib.sha256(canonical_json({"tensors": about, "record": record}))
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
