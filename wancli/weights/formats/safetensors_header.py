"""Reads a safetensors header, strictly and without torch: names, dtypes and shapes, no data.

The format: 8 bytes little-endian N, N bytes of JSON, then the data; every tensor names the half open byte
range that it fills, and the ranges tile the data without overlap or hole.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from wancli.errors import CheckpointError, NoSuchFile
from wancli.storage import disk

MAX_HEADER = (
    100_000_000  # bytes, the limit of the format; previews and workflows in the metadata take megabytes
)
DOWNLOAD_AGAIN = "download this file again"
BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class TensorInfo:
    """Dtype and shape of one tensor; `dtype` as the format writes it (F32, BF16, F8_E4M3 ...)."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """A whole header: tensors in the order of the file, texts, and the position of the bytes in the file."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    ranges: dict[str, tuple[int, int]]

    def read_bytes(self, name: str) -> bytes:
        """Read the bytes of one tensor that holds a scale, a name or a text."""
        start, stop = self.ranges[name]
        with open_weights(self.path) as file:
            file.seek(start)
            return file.read(stop - start)


@contextmanager
def open_weights(path: Path) -> Iterator[BufferedReader]:
    """Open a file of weights for reading.

    Raises CheckpointError if there is none, or if the disk does not give it, also in the block.
    """
    with disk.reading_weights():
        try:
            with disk.opened(path) as file:
                yield file
        except NoSuchFile:
            raise CheckpointError("no such file", where=str(path), hint=DOWNLOAD_AGAIN) from None


def read_tensors(path: Path) -> dict[str, TensorInfo]:
    """Read dtype and shape of every tensor, in the order of the header. Raises like `read_header`."""
    return read_header(path).tensors


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file.

    Raises CheckpointError if the file is missing, truncated, or its header does not describe exactly the
    bytes that follow it.
    """
    with open_weights(path) as file:
        size = os.fstat(file.fileno()).st_size
        count = int.from_bytes(file.read(8), "little")
        if size < 8 or count > size - 8:
            raise _damaged_error(path, f"its header claims {count:,} bytes, the file has {size:,}")
        if count > MAX_HEADER:
            raise _damaged_error(
                path, f"its header claims {count:,} bytes, and the format allows {MAX_HEADER:,}"
            )
        text = file.read(count)
    entries, metadata = _parse_entries(path, text)
    _check_ranges(path, entries, size - 8 - count)
    return Header(
        path,
        {name: info for name, info, _ in entries},
        metadata,
        {name: (8 + count + start, 8 + count + stop) for name, _, (start, stop) in entries},
    )


def read_metadata(path: Path) -> dict[str, str]:
    """Read the texts of a safetensors header. Raises like `read_header`."""
    return read_header(path).metadata


def _parse_entries(
    path: Path, text: bytes
) -> tuple[list[tuple[str, TensorInfo, tuple[int, int]]], dict[str, str]]:
    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_object)
        metadata = document.pop("__metadata__", None) or {}
        entries = [_parse_entry(name, fields) for name, fields in document.items()]
        return entries, {key: value for key, value in metadata.items() if isinstance(value, str)}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged_error(path, f"its header is not a safetensors header: {error}") from None


def _parse_entry(name: str, fields: dict[str, Any]) -> tuple[str, TensorInfo, tuple[int, int]]:
    try:
        start, stop = map(_require_natural, fields["data_offsets"])
        return name, TensorInfo(fields["dtype"], tuple(map(_require_natural, fields["shape"]))), (start, stop)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{name} says no usable dtype, shape and data_offsets ({error})") from None


def _check_ranges(path: Path, entries: list[tuple[str, TensorInfo, tuple[int, int]]], size: int) -> None:
    """Check that the ranges tile [0, size) and that each is as long as its dtype and shape require."""
    end = 0
    for name, info, (start, stop) in sorted(entries, key=lambda entry: entry[2]):
        if info.dtype not in BITS:
            raise _damaged_error(path, f"{name} has the unknown dtype {info.dtype}")
        needed = math.prod(info.shape) * BITS[info.dtype]
        if (stop - start) * 8 != needed:
            what = f"{name}, {info.dtype} {list(info.shape)}, needs {needed // 8:,} bytes"
            raise _damaged_error(path, f"{what} and has {stop - start:,}")
        if start != end:
            what = "overlap those before them" if start < end else "leave a gap before them"
            raise _damaged_error(path, f"the bytes of {name}, {start:,} to {stop:,}, {what}")
        end = stop
    if end != size:
        raise _damaged_error(path, f"its tensors fill {end:,} bytes, the file has {size:,} for them")


def _require_natural(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a natural number")
    return value


def _unique_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique: dict[str, object] = {}
    for key, value in pairs:
        if key in unique:
            raise ValueError(f"{key} appears twice")
        unique[key] = value
    return unique


def _damaged_error(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"truncated or damaged: {what}", where=str(path), hint=DOWNLOAD_AGAIN)
