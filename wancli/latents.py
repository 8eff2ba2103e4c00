"""The latent on disk: durable before decoding starts, verified when read, enough to finish a shot alone.

NAME.latents.safetensors holds one tensor, `latents` [z, T, H/s, W/s] fp32, still normalised, and
as metadata the record that the manifest will continue and a SHA-256 over both.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wancli import files
from wancli.errors import EntryError
from wancli.manifest import canonical

if TYPE_CHECKING:
    from torch import Tensor

_METADATA = "wancli"


def save(path: Path, z_CTYX: Tensor, record: dict[str, Any]) -> None:
    """Replaces the file atomically; after it returns the latent survives power loss. Raises NoSpace."""
    from safetensors.torch import save

    z_CTYX = z_CTYX.cpu().contiguous()
    document = {"record": record, "sha256": _digest(z_CTYX, record)}
    files.replace(path, save({"latents": z_CTYX}, {_METADATA: canonical(document).decode()}))


def load(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """The latent and its record. Raises EntryError when either is damaged, or is another program's."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        payload = path.read_bytes()
        header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
        document = json.loads(header["__metadata__"][_METADATA])
        z_CTYX, record, sealed = load(payload)["latents"], document["record"], document["sha256"]
    except OSError as error:
        raise EntryError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        raise EntryError("not a latent of wancli, or damaged", where=str(path)) from None
    if sealed != _digest(z_CTYX, record):
        raise EntryError(
            "the latent is damaged: its checksum differs", where=str(path), hint="Render the shot again."
        )
    return z_CTYX, record


def _digest(z_CTYX: Tensor, record: dict[str, Any]) -> str:
    digest = hashlib.sha256(
        canonical({"shape": [*z_CTYX.shape], "dtype": str(z_CTYX.dtype), "record": record})
    )
    digest.update(z_CTYX.numpy().tobytes())
    return digest.hexdigest()
