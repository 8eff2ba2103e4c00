"""Save and load tensors with a record, verified on reading: finished latents and states of shots.

Both are safetensors files with a record as metadata and a SHA-256 over everything.
NAME.latents.safetensors holds `latents` [z, T, H/s, W/s] fp32, still normalised. It is durable before
decoding starts and is enough to finish a shot; the manifest will continue its record.
NAME.state.safetensors holds all that a solver remembers between two steps (of `x`, `history.0`, `history.1`
and `last` those that exist), so that sampling resumes bit for bit; its record names the shot and the number
of steps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wancli.errors import EntryError, NoSuchFile, Unreadable
from wancli.storage import atomic, disk
from wancli.storage.manifest import canonical_json

if TYPE_CHECKING:
    from torch import Tensor

_METADATA = "wancli"
_HEADER_BYTES = 100 * 2**20  # what safetensors allows


def save_latent(path: Path, z_CTYX: Tensor, record: dict[str, Any]) -> None:
    """Save a finished latent; after it returns the latent survives power loss. Raises NoSpace."""
    save_tensors(path, {"latents": z_CTYX}, record)


def load_latent(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Load a latent and its record. Raises EntryError if either is damaged, or is another program's."""
    tensors, record = load_tensors(path)
    if tensors.keys() != {"latents"}:
        raise EntryError("not a finished latent", where=str(path))
    return tensors["latents"], record


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the record of a latent or a state, unverified; None if there is none. Needs no torch."""
    try:
        with disk.opened(path) as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length) if length < _HEADER_BYTES else b"")
        record = json.loads(header["__metadata__"][_METADATA])["record"]
    except (Unreadable, ValueError, KeyError, TypeError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def save_tensors(path: Path, tensors: Mapping[str, Tensor], record: dict[str, Any]) -> None:
    """Save tensors and their record, durably and atomically. Raises NoSpace or MachineError."""
    from safetensors.torch import save

    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    document = {"record": record, "sha256": _digest(tensors, record)}
    atomic.replace(path, save(tensors, {_METADATA: canonical_json(document).decode()}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load tensors and their record. Raises EntryError if the file is damaged or another program's."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        payload = disk.read_bytes(path)
        header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
        document = json.loads(header["__metadata__"][_METADATA])
        tensors, record, expected_digest = load(payload), document["record"], document["sha256"]
    except NoSuchFile as error:
        raise EntryError(error.message, where=str(path)) from None
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        raise EntryError("not a latent of wancli, or damaged", where=str(path)) from None
    if expected_digest != _digest(tensors, record):
        raise EntryError(
            "the latent is damaged: its checksum differs", where=str(path), hint="Render the shot again."
        )
    return tensors, record


def _digest(tensors: Mapping[str, Tensor], record: dict[str, Any]) -> str:
    names = sorted(tensors)
    about = [[name, [*tensors[name].shape], str(tensors[name].dtype)] for name in names]
    digest = hashlib.sha256(canonical_json({"tensors": about, "record": record}))
    for name in names:
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
