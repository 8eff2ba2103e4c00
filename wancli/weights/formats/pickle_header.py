"""Reads names, dtypes and shapes of a .pth from its pickle, without torch and without running it.

A .pth that torch.save wrote is an uncompressed zip: `data.pkl` builds a dict of tensors out of named
storages, which are other members. Here the pickle may name dicts, tensors and storages only.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from wancli.errors import CheckpointError
from wancli.storage import disk
from wancli.weights.formats.safetensors_header import DOWNLOAD_AGAIN, TensorInfo, open_weights

Entry = TypeVar("Entry")

_DTYPES = {
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "DoubleStorage": "F64",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "ShortStorage": "I16",
    "IntStorage": "I32",
    "LongStorage": "I64",
    "BoolStorage": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",  # dtypes that have no storage of their own
}
_MAX_PICKLE = 16 * 2**20
# What a damaged or foreign pickle makes the unpickler raise.
_PICKLE_ERRORS = (
    *(OSError, EOFError, StopIteration, zipfile.BadZipFile, pickle.UnpicklingError, RecursionError),
    *(ValueError, TypeError, KeyError, IndexError, AttributeError),
)
RESAVE_HINT = "save it again as a plain state dict, or as safetensors"


def read_pickle_header(path: Path) -> dict[str, TensorInfo]:
    """Read dtype and shape of every tensor of a .pth. Raises CheckpointError if it is not a state dict."""
    try:
        with open_weights(path) as file, zipfile.ZipFile(file) as archive:
            check_zip(archive, path)
            entry = next(info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
            if entry.file_size > _MAX_PICKLE:
                raise CheckpointError(
                    "its pickle is too large for a state dict", where=str(path), hint=RESAVE_HINT
                )
            text = archive.read(entry)
        _check_memo(text)
        return unwrap_state_dict(_Headers(io.BytesIO(text)).load(), TensorInfo, path)
    except _PICKLE_ERRORS as error:
        raise CheckpointError(f"not a readable .pth: {error}", where=str(path), hint=RESAVE_HINT) from None


def unwrap_state_dict(document: object, tensor: type[Entry], path: Path) -> dict[str, Entry]:
    """Return the one table of tensors that a .pth holds: itself, or in a trainer's dict, as `state_dict`.

    Raises CheckpointError for none, for several, and for a table that holds something else, too.
    """

    def is_table(value: object) -> bool:
        return isinstance(value, dict) and bool(value) and all(isinstance(v, tensor) for v in value.values())

    entries: dict[str, Any] = document if isinstance(document, dict) else {}
    if document == {} or is_table(document):
        return entries
    tables = [key for key, value in entries.items() if is_table(value)]
    if len(tables) == 1 and not any(isinstance(value, tensor) for value in entries.values()):
        return {**entries[tables[0]]}
    what = "does not hold a plain state dict"
    if tables:
        what = f"holds {len(tables)} state dicts: {', '.join(map(repr, tables))}"
    elif other := next((key for key, value in entries.items() if not isinstance(value, tensor)), None):
        what += f": {other!r} is a {type(entries[other]).__name__}"
    raise CheckpointError(what, where=str(path), hint=RESAVE_HINT)


def check_zip(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise CheckpointError if a zip unpacks to more than the file holds: a .pth is not compressed."""
    members, size = archive.infolist(), disk.size(path)
    claimed = sum(member.file_size for member in members)
    packed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
    if packed or claimed > size:
        what = f"{packed[0]} is compressed" if packed else f"its members claim {claimed:,} bytes of {size:,}"
        raise CheckpointError(
            f"{what}, as in a zip bomb; PyTorch does not write such files",
            where=str(path),
            hint=DOWNLOAD_AGAIN,
        )


def _check_memo(text: bytes) -> None:
    """Refuse memo indices that no pickle of this length has: the unpickler allocates memory up to them."""
    for opcode, argument, _ in pickletools.genops(text):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(text):
            raise pickle.UnpicklingError(f"it numbers {argument:,} objects in {len(text):,} bytes")


class _Headers(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any] | str:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_tensor_v3"):
            return _rebuild_untyped_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return name
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"it wants {module}.{name}, which no state dict of weights needs")

    def persistent_load(self, pid: Any) -> str:
        return str(pid[1])


def _rebuild_tensor(dtype: str, _offset: int, shape: tuple[int, ...], *_: object) -> TensorInfo:
    """In place of torch._utils._rebuild_tensor_v2."""
    return TensorInfo(dtype, tuple(shape))


def _rebuild_untyped_tensor(
    _storage: str,
    _offset: int,
    shape: tuple[int, ...],
    _stride: object,
    _grad: object,
    _hooks: object,
    dtype: str,
) -> TensorInfo:
    """In place of torch._utils._rebuild_tensor_v3, which fp8 tensors are saved with."""
    return TensorInfo(dtype, tuple(shape))


def _rebuild_parameter(tensor: TensorInfo, *_: object) -> TensorInfo:
    """In place of torch._utils._rebuild_parameter."""
    return tensor
