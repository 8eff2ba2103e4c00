"""NAME.attention.npz: the attention maps of a shot, for numpy and any other program.

`maps` is fp32 [word, group of blocks, group of steps, latent frame, row, column] and holds probabilities; a
row or a column is one video token. `words`, `blocks` and `steps` name the places along the first three axes,
`frames` has the first and the last pixel frame of each latent frame. `attention.json`, the first member,
describes the axes in full. The same maps give the same bytes.

Letters: W words, G groups of blocks, S groups of steps, T latent frames, Y X rows and columns of tokens.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wancli.storage import records

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Maps = NDArray[np.float32]

SCHEMA = "wancli/attention/1"
_JSON = "attention.json"
_DATE = (1980, 1, 1, 0, 0, 0)  # of every member
_AXES = ("word", "block group", "step group", "latent frame", "row", "column")


@dataclass(frozen=True, eq=False)
class AttentionFile:
    """Attention maps and the names of their axes. `about` is what else the JSON says, the prompt among it."""

    maps_WGSTYX: Maps
    words: tuple[str, ...]
    blocks: tuple[str, ...]
    steps: tuple[str, ...]
    about: dict[str, Any]

    def to_bytes(self) -> bytes:
        """Return the content of the file."""
        import numpy as np

        frames_T2 = np.array([pixel_frames(t) for t in range(self.maps_WGSTYX.shape[3])])
        arrays = {
            "maps": self.maps_WGSTYX,
            "words": np.array(self.words),
            "blocks": np.array(self.blocks),
            "steps": np.array(self.steps),
            "frames": frames_T2,
        }
        values = (self.words, self.blocks, self.steps, frames_T2.tolist())
        axes = [
            {"name": name, "length": length, **({"values": values[i]} if i < len(values) else {})}
            for i, (name, length) in enumerate(zip(_AXES, self.maps_WGSTYX.shape))
        ]
        document = {"schema": SCHEMA, "array": "maps", "axes": axes, **self.about}
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(zipfile.ZipInfo(_JSON, _DATE), json.dumps(document, indent=1))
            for name, array in arrays.items():
                data = io.BytesIO()
                np.lib.format.write_array(data, np.ascontiguousarray(array), allow_pickle=False)
                archive.writestr(zipfile.ZipInfo(f"{name}.npy", _DATE), data.getvalue())
        return file.getvalue()


def pixel_frames(latent_frame: int) -> tuple[int, int]:
    """Return the first and the last pixel frame of a latent frame: the first has one, others four."""
    return (0, 0) if latent_frame == 0 else (4 * latent_frame - 3, 4 * latent_frame)


def latent_frame(pixel_frame: int) -> int:
    """Return the latent frame of a pixel frame."""
    return (pixel_frame + 3) // 4


def read(path: Path) -> AttentionFile:
    """Read attention maps. Raises EntryError if the file is damaged or another program's, and Unreadable."""
    import numpy as np

    data = records.read(path, records.ATTENTION)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as members:
            about = records.parse_json(members[_JSON])
            words, blocks, steps = (tuple(map(str, members[name])) for name in ("words", "blocks", "steps"))
            maps_WGSTYX = members["maps"]
        if about.pop("schema") != SCHEMA or maps_WGSTYX.dtype != np.float32 or maps_WGSTYX.ndim != 6:
            raise ValueError("of another version")
        if maps_WGSTYX.shape[:3] != (len(words), len(blocks), len(steps)):
            raise ValueError("axes of other lengths")
    except Exception as error:  # numpy and zipfile raise errors of many types for damaged files
        raise records.ATTENTION.damaged(path, str(error)) from None
    kept = {key: value for key, value in about.items() if key not in ("array", "axes")}
    return AttentionFile(maps_WGSTYX, words, blocks, steps, kept)


def is_attention_file(data: bytes) -> bool:
    """Return whether the first bytes of a file are those of attention maps that wancli wrote."""
    return data[30 : 30 + len(_JSON)] == _JSON.encode()
