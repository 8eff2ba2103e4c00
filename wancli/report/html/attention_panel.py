"""The attention maps of a shot for a page: a byte for each token, or for squares of several tokens."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from wancli.errors import EntryError, Unreadable
from wancli.storage import attention_file, disk
from wancli.storage.manifest_schema import Manifest

MAX_VALUES = 2**18  # of a shot, each a byte


def panel_entry(record: Manifest, output: Path) -> dict[str, Any] | None:
    """Return the maps of a finished shot as JSON data; None if it has none, or they are not there any more.

    `values` is base64 of bytes [word, block group, step group, latent frame, row, column]; 255 is `most`, the
    largest probability of the word.
    """
    import numpy as np

    found = record.attention
    if found is None:
        return None
    path = output.with_name(found.maps.path)
    try:
        if disk.size(path) != found.maps.bytes:
            return None
        file = attention_file.read(path)
    except (EntryError, Unreadable):
        return None
    maps_WGSTYX = file.maps_WGSTYX
    while maps_WGSTYX.size > MAX_VALUES and min(maps_WGSTYX.shape[-2:]) > 1:
        maps_WGSTYX = _halve(maps_WGSTYX)
    most_W = maps_WGSTYX.reshape(len(file.words), -1).max(axis=1)
    scaled = 255 * maps_WGSTYX / np.maximum(most_W, 1e-30)[:, None, None, None, None, None]
    return {
        "words": list(file.words),
        "blocks": list(file.blocks),
        "steps": list(file.steps),
        "grid": list(maps_WGSTYX.shape[3:]),
        "most": [float(f"{most:.3g}") for most in most_W],
        "values": base64.b64encode(scaled.round().astype(np.uint8).tobytes()).decode(),
    }


def _halve(maps: Any) -> Any:
    """Average squares of two rows and columns; an odd last row or column is left out."""
    *outer, rows, columns = maps.shape
    even = maps[..., : rows // 2 * 2, : columns // 2 * 2]
    return even.reshape(*outer, rows // 2, 2, columns // 2, 2).mean(axis=(-3, -1))
