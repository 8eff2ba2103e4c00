"""Reading a safetensors header, strictly and without torch: names, dtypes and shapes, no data.

The format: 8 bytes little-endian N, N bytes of JSON, then the data; every tensor names the half
open byte range it fills, and the ranges tile the data without overlap or hole.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wancli.errors import CheckpointError

MAX_HEADER = 100_000_000  # bytes; the limit of the format's own reader
DOWNLOAD_AGAIN = "download this file again"
BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64"), 64),
}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor; `dtype` in the words of the format (F32, BF16, F8_E4M3 ...)."""

    dtype: str
    shape: tuple[int, ...]


def header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors file, in the order of its header.

    Raises CheckpointError if the file is missing, truncated, or its header does not describe
    exactly the bytes that follow it.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            count = int.from_bytes(file.read(8), "little")
            if size < 8 or count > min(size - 8, MAX_HEADER):
                raise _damaged(path, f"its header claims {count:,} bytes, the file has {size:,}")
            text = file.read(count)
    except FileNotFoundError:
        raise CheckpointError("no such file", where=str(path), hint=DOWNLOAD_AGAIN) from None
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error
    entries = _entries(path, text)
    _check_ranges(path, entries, size - 8 - count)
    return {name: info for name, info, _ in entries}


def metadata(path: Path) -> dict[str, str]:
    """The texts that a safetensors file carries beside its tensors. Raises CheckpointError like `header`."""
    header(path)
    with path.open("rb") as file:
        document = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    found = document.get("__metadata__", {})
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise _damaged(path, "its metadata are not texts")
    return found


def headers(paths: Sequence[Path]) -> dict[str, TensorInfo]:
    """The tensors of all shards together. Raises CheckpointError if two shards hold the same name."""
    found: dict[str, TensorInfo] = {}
    for path in paths:
        tensors = header(path)
        if twice := sorted(found.keys() & tensors.keys()):
            raise CheckpointError(f"{twice[0]} is in another shard too", where=str(path), hint=DOWNLOAD_AGAIN)
        found |= tensors
    return found


def _entries(path: Path, text: bytes) -> list[tuple[str, TensorInfo, tuple[int, int]]]:
    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
        document.pop("__metadata__", None)
        return [
            (name, TensorInfo(fields["dtype"], tuple(map(_natural, fields["shape"]))), _range(fields))
            for name, fields in document.items()
        ]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, "its header is not a safetensors header") from error


def _check_ranges(path: Path, entries: list[tuple[str, TensorInfo, tuple[int, int]]], size: int) -> None:
    """The ranges must tile [0, size) and each must be as long as its dtype and shape say."""
    end = 0
    for name, info, (start, stop) in sorted(entries, key=lambda entry: entry[2]):
        if info.dtype not in BITS:
            raise _damaged(path, f"{name} has the unknown dtype {info.dtype}")
        if start != end or (stop - start) * 8 != math.prod(info.shape) * BITS[info.dtype]:
            raise _damaged(path, f"the bytes of {name} are not where its shape puts them")
        end = stop
    if end != size:
        raise _damaged(path, f"its tensors fill {end:,} bytes, the file has {size:,} for them")


def _range(fields: dict[str, list[object]]) -> tuple[int, int]:
    start, stop = map(_natural, fields["data_offsets"])
    return start, stop


def _natural(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a natural number")
    return value


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"truncated or damaged: {what}", where=str(path), hint=DOWNLOAD_AGAIN)
