"""Open and parse the files that wancli wrote. No other module opens one of them.

A folder of outputs may be shared with other people, programs and versions. So a record is opened only if it
is a plain file, it is read only if it is no larger than a record of its kind can be, and its JSON is shallow
and has finite numbers. Everything else is damage of that one file. `manifest_schema.Data` gives the parsed
JSON its types.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from wancli.errors import EntryError, NoSuchFile
from wancli.storage import disk

if TYPE_CHECKING:
    from torch import Tensor

MAX_DEPTH = 40  # objects and lists within each other; the deepest record has ten
MAX_DIGITS = 40  # of an integer, which no float overflows
_METADATA = "wancli"  # the key of a record in a safetensors header


@dataclass(frozen=True)
class Kind:
    """A kind of record: what messages call it, its largest size in bytes, and what helps if it is damaged."""

    name: str
    max_bytes: int
    hint: str = "Delete it."

    def damaged(self, path: Path | str, why: str = "") -> EntryError:
        """Return the error for a record that cannot be used."""
        message = f"{self.name} is damaged, or of another version{f': {why}' if why else ''}"
        return EntryError(message, where=str(path), hint=self.hint)


MANIFEST = Kind("the manifest", 2**26, "delete it, or render again with --force")
LATENT = Kind("the latent", 2**32, "Delete it, and render the shot again.")
STATE = Kind("the state", 2**34, "Delete it; the shot then starts from its first step.")
REPORT = Kind("the report", 2**29, "Delete it; the next render writes it again.")
BLOCK_MAP = Kind("the block map", 2**26, "Delete it; `wancli probe` measures it again.")
COMPARISON = Kind("the comparison", 2**28, "Delete it; the next render writes it again.")
CLAIM = Kind("the claim", 2**12)
EMBEDDING = Kind("the embedding file", 2**30, "`wancli encode --out FILE` writes one.")
CACHE_ENTRY = Kind("the cache entry", 2**28, "`wancli cache prune` removes it.")
MEMO = Kind("the list of digests", 2**26)
RATES = Kind("the list of rates", 2**22)
POSTER = Kind("the poster", 2**24)
FRAME = Kind("the kept frame", 2**29)
ATTENTION = Kind("the attention maps", 2**32, "Delete it, and render the shot again.")
MESSAGE = Kind("the message", 2**24)


# ---- files ----


def read(path: Path, kind: Kind, *, links: bool = True) -> bytes:
    """Read a whole record. Raises Unreadable, and EntryError if it is larger than its kind can be."""
    with disk.opened(path, links=links) as file:
        size = os.fstat(file.fileno()).st_size
        _require_plausible_size(path, kind, size)
        return file.read(size)


def _require_plausible_size(path: Path, kind: Kind, size: int) -> None:
    if size > kind.max_bytes:
        raise EntryError(
            f"{size:,} bytes; {kind.name} has at most {kind.max_bytes:,}", where=str(path), hint=kind.hint
        )


def find_bytes(path: Path, kind: Kind) -> bytes | None:
    """Read a whole record; None if there is no such file. Raises as `read`."""
    try:
        return read(path, kind)
    except NoSuchFile:
        return None


# ---- JSON ----


def parse_json(data: bytes | str) -> Any:
    """Parse JSON that is shallow and has only finite numbers and text. Raises ValueError."""
    try:
        document = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deep") from None
    level = [document]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError("a number is not finite")
            elif isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
                raise ValueError("a number is too large")
        if not inner:
            return document
        level = inner
    raise ValueError("nested too deep")


def read_json(path: Path, kind: Kind) -> Any:
    """Read and parse a JSON record; None if there is no such file.

    Raises EntryError if it is damaged, and Unreadable if the disk does not tell, or it is no plain file.
    """
    data = find_bytes(path, kind)
    if data is None:
        return None
    try:
        document = parse_json(data)
    except ValueError:
        raise kind.damaged(path) from None
    if document is None:  # null is no record
        raise kind.damaged(path)
    return document


# ---- tensors with a record ----


def write_tensors(tensors: dict[str, Tensor], document: str) -> bytes:
    """Return a safetensors file of these tensors, with a JSON document as metadata."""
    from safetensors.torch import save

    return save(tensors, {_METADATA: document})  # one key only: safetensors writes several in random order


@dataclass(frozen=True)
class Slice:
    """The bytes of one tensor within a payload."""

    dtype: str  # as the format writes it: F32, BF16 ...
    shape: tuple[int, ...]
    start: int
    stop: int


def parse_header(payload: bytes) -> tuple[dict[str, Slice], Any]:
    """Parse the header of a payload that `write_tensors` made: where its tensors are, and the document.

    Raises ValueError, also if the payload has other bytes than its header and its tensors.
    """
    begin = 8 + int.from_bytes(payload[:8], "little")
    if not 8 < begin <= len(payload):
        raise ValueError("the header is cut")
    return _parse_header(payload[8:begin], len(payload))


def _parse_header(text: bytes, size: int) -> tuple[dict[str, Slice], Any]:
    header, begin = parse_json(text), 8 + len(text)
    document = _document_in(header)
    slices = {name: _parse_slice(begin, entry) for name, entry in header.items() if name != "__metadata__"}
    if size != max((each.stop for each in slices.values()), default=begin):
        raise ValueError("a tensor is cut, or bytes follow the last one")
    return slices, document


def _parse_slice(begin: int, entry: Any) -> Slice:
    try:
        shape, (start, stop) = entry["shape"], entry["data_offsets"]
        numbers = (start, stop, *shape)
        if not isinstance(entry["dtype"], str) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError("a tensor without dtype, shape and place")
    except (KeyError, TypeError):
        raise ValueError("a tensor without dtype, shape and place") from None
    return Slice(entry["dtype"], tuple(shape), begin + start, begin + stop)


def parse_tensors(payload: bytes) -> tuple[dict[str, Tensor], Any]:
    """Parse a payload that `write_tensors` made: the tensors and the document. Raises ValueError."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    _, document = parse_header(payload)
    try:
        return load(payload), document
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(str(error)) from None


def read_tensor_document(path: Path) -> Any:
    """Read the JSON document of a file of tensors, and no tensor. Raises Unreadable or ValueError."""
    with disk.opened(path) as file:
        return _document_in(parse_json(_read_header(file, os.fstat(file.fileno()).st_size)))


def read_tensor_file(
    path: Path, kind: Kind, require: Callable[[Mapping[str, Slice]], object]
) -> tuple[bytes, dict[str, Slice], Any]:
    """Read a whole file of tensors after its header: its bytes, where its tensors are, and its document.

    `require` raises if these are not the tensors that the caller expects; no more of the file is read then.
    Raises Unreadable; ValueError if the file is not as its header says; EntryError if it is larger than its
    kind can be.
    """
    with disk.opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        slices, document = _parse_header(_read_header(file, size), size)
        _require_plausible_size(path, kind, size)
        require(slices)
        file.seek(0)
        return file.read(size), slices, document


def _read_header(file: BinaryIO, size: int) -> bytes:
    count = int.from_bytes(file.read(8), "little")
    if not 0 < count <= min(size - 8, MANIFEST.max_bytes):
        raise ValueError("the header is cut")
    return file.read(count)


def _document_in(header: Any) -> Any:
    try:
        return parse_json(header["__metadata__"][_METADATA])
    except (KeyError, TypeError):
        raise ValueError("not a file of wancli") from None
