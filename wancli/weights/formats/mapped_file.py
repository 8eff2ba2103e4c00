"""Maps files into memory: a page is read when it is first touched, and given up under memory pressure.

safetensors and torch.load map a file as private writable memory, and Linux reserves all of it at once: it
refuses a file larger than memory and swap before anything is read. MAP_NORESERVE reserves a page only when
it is written to.
"""

from __future__ import annotations

import mmap
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from wancli.errors import CheckpointError
from wancli.weights.formats.safetensors_header import DOWNLOAD_AGAIN, open_weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAP_NORESERVE = 0x4000  # Linux; Python names it from 3.13 on


def map_file(path: Path) -> mmap.mmap:
    """Map the bytes of a file. Writing to them changes only the copy of this process.

    Raises CheckpointError if the file is missing, empty or cannot be read.
    """
    try:
        with open_weights(path) as file:
            return mmap.mmap(
                file.fileno(),
                0,
                flags=mmap.MAP_PRIVATE | MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
    except ValueError:
        raise CheckpointError("the file is empty", where=str(path), hint=DOWNLOAD_AGAIN) from None


def view_tensor(pages: mmap.mmap, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """View mapped bytes as a tensor, which keeps them mapped as long as it lives."""
    import torch

    if not prod(shape):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(pages, dtype=dtype, count=prod(shape), offset=start).view(shape)
