"""Reads a GGUF header, strictly and without torch: key-values and the position of each tensor; no data.

The format: magic, version, two counts, the key-values, the infos of the tensors, padding to `alignment`, the
data. Numbers are little-endian, a string is a length and UTF-8, sizes come fastest axis first.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

The reader of the PyPI package `gguf` trusts every count and length in the file, so it is not used.
"""

from __future__ import annotations

import mmap
import re
import struct
from array import array
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

from wancli.errors import CheckpointError
from wancli.weights.formats.key_mapping import is_tokenizer
from wancli.weights.formats.mapped_file import map_file
from wancli.weights.formats.safetensors_header import DOWNLOAD_AGAIN, TensorInfo

# Weights and bytes of one block.
BLOCK_SIZES = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
}
# Types that no weight has, but a tokenizer that was stored as a tensor may have.
NUMBER_SIZES = {"I8": (1, 1), "I16": (1, 2), "I32": (1, 4), "I64": (1, 8), "F64": (1, 8)}
# ggml's numbers of all its types, so that an unsupported type is refused by name.
TYPE_NAMES = {
    **dict(enumerate(("F32", "F16", "Q4_0", "Q4_1", "Q4_2", "Q4_3", "Q5_0", "Q5_1", "Q8_0", "Q8_1"))),
    **dict(enumerate(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K", "IQ2_XXS", "IQ2_XS"), start=10)),
    **dict(enumerate(("IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS", "I8", "I16"), start=18)),
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    30: "BF16",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}
OTHER_PRECISION = "download a version that is F16, BF16, Q8_0, IQ4 or a Q*_K"
MAX_DIMS = 5  # ggml knows 4; city96's converter writes Wan's patch embedding with 5
ORIG_SHAPE = "comfy.gguf.orig_shape."
_MAX_ELEMENTS = 2**48  # numbers of a tensor, an empty side counted as one; torch refuses more

UMT5 = {
    "token_embd.weight": "shared.weight",
    "enc.output_norm.weight": "encoder.final_layer_norm.weight",
}
UMT5_BLOCK = {
    **{f"attn_{p}": f"layer.0.SelfAttention.{p}" for p in "qkvo"},
    "attn_norm": "layer.0.layer_norm",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}

_BLOCK = re.compile(r"enc\.blk\.(\d+)\.(\w+)\.weight")
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_BOOL = 7

Value: TypeAlias = "int | float | bool | str | array[Any] | list[str]"


@dataclass(frozen=True)
class GGUFTensor(TensorInfo):
    """A tensor of the file. `dtype` is in BLOCK_SIZES or NUMBER_SIZES, `shape` in torch's order; its data are
    file[start : start + nbytes].
    """

    start: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    values: dict[str, Value]
    tensors: dict[str, GGUFTensor]


def read_header(path: Path) -> GGUFHeader:
    """Read the key-values and tensors of a GGUF file, version 2 or 3.

    Raises CheckpointError if the file is missing, truncated, not GGUF, claims more than its size can hold, or
    has a tensor whose type is not in BLOCK_SIZES.
    """
    pages = map_file(path)
    reader = _Reader(pages, path)
    try:
        magic, version, tensor_count, value_count = reader.unpack("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise CheckpointError(
                f"not a GGUF file of version 2 or 3 (it begins with {magic!r}, {version})",
                where=str(path),
                hint=DOWNLOAD_AGAIN,
            )
        values: dict[str, Value] = {}
        for _ in range(reader.checked_count(value_count, 8 + 4 + 1)):
            key = reader.read_string()
            if key in values:
                raise reader.damaged_error(f"the key {key} appears twice")
            values[key] = reader.read_value()
        infos = [reader.read_info() for _ in range(reader.checked_count(tensor_count, 8 + 4 + 8 + 4 + 8))]
    except (UnicodeDecodeError, struct.error) as error:
        raise reader.damaged_error(f"its header cannot be read ({error})") from None
    return GGUFHeader(values, _locate_tensors(reader, values, infos))


@dataclass(frozen=True)
class _Info:
    name: str
    type: int
    dims: tuple[int, ...]  # fastest first
    offset: int  # in the data


class _Reader:
    """A cursor that never leaves the file."""

    def __init__(self, pages: mmap.mmap, path: Path) -> None:
        self.pages, self.path, self.position = pages, path, 0

    def damaged_error(self, what: str) -> CheckpointError:
        return CheckpointError(f"truncated or damaged: {what}", where=str(self.path), hint=DOWNLOAD_AGAIN)

    def read(self, count: int) -> bytes:
        if count > len(self.pages) - self.position:
            raise self.damaged_error(f"it claims {count:,} bytes at {self.position:,} of {len(self.pages):,}")
        self.position += count
        return self.pages[self.position - count : self.position]

    def checked_count(self, count: int, least: int) -> int:
        """Return `count` if that many entries of at least `least` bytes can still follow."""
        if count * least > len(self.pages) - self.position:
            raise self.damaged_error(
                f"it claims {count:,} entries at {self.position:,} of {len(self.pages):,} bytes"
            )
        return count

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.read(struct.calcsize(layout)))

    def read_string(self) -> str:
        return self.read(int.from_bytes(self.read(8), "little")).decode("utf-8")

    def read_value(self) -> Value:
        (kind,) = self.unpack("<I")
        if kind == _STRING:
            return self.read_string()
        if kind == _ARRAY:
            return self.read_array()
        if kind not in _SCALARS:
            raise self.damaged_error(f"a value has the unknown type {kind}")
        (number,) = self.unpack(f"<{_SCALARS[kind]}")
        return bool(number) if kind == _BOOL else number

    def read_array(self) -> Value:
        kind, count = self.unpack("<IQ")
        if kind == _STRING:
            return [self.read_string() for _ in range(self.checked_count(count, 8))]
        if kind not in _SCALARS:
            raise self.damaged_error(f"an array has elements of the type {kind}")
        values = array(_SCALARS[kind])
        values.frombytes(self.read(count * values.itemsize))
        return values

    def read_info(self) -> _Info:
        name = self.read_string()
        (count,) = self.unpack("<I")
        if not 1 <= count <= MAX_DIMS:
            raise self.damaged_error(f"{name} has {count} dimensions")
        dims = self.unpack(f"<{count}Q")
        kind, offset = self.unpack("<IQ")
        return _Info(name, kind, dims, offset)


def _locate_tensors(reader: _Reader, values: dict[str, Value], infos: list[_Info]) -> dict[str, GGUFTensor]:
    """Return the tensors with their positions, which must be aligned, inside the file and not overlap."""
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
        raise reader.damaged_error(f"general.alignment is {alignment}")
    data = -(-reader.position // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    end = data
    for info in sorted(infos, key=lambda info: info.offset):
        dtype, (elements, size) = _stored_type(info, reader.path)
        nbytes = prod(info.dims) // elements * size
        start = data + info.offset
        if info.name in tensors:
            raise reader.damaged_error(f"{info.name} appears twice")
        if info.dims[0] % elements:
            raise reader.damaged_error(
                f"{info.name} has rows of {info.dims[0]}, {dtype} has blocks of {elements}"
            )
        if start < end or info.offset % alignment or start + nbytes > len(reader.pages):
            raise reader.damaged_error(f"{info.name} ({nbytes:,} bytes at {start:,}) is not in its place")
        end = start + nbytes
        shape = _torch_shape(info, values, reader)
        if prod(max(1, size) for size in shape) > _MAX_ELEMENTS:
            raise reader.damaged_error(f"{info.name} is empty, and has the sizes {list(shape)}")
        tensors[info.name] = GGUFTensor(dtype, shape, start, nbytes)
    return {info.name: tensors[info.name] for info in infos}


def _stored_type(info: _Info, path: Path) -> tuple[str, tuple[int, int]]:
    """Return the type of a tensor, and elements and bytes of its blocks."""
    dtype = TYPE_NAMES.get(info.type, f"type {info.type}, which wancli does not know")
    sizes = BLOCK_SIZES | NUMBER_SIZES if is_tokenizer(info.name) else BLOCK_SIZES
    if dtype not in sizes:
        raise CheckpointError(
            f"{info.name} is stored as {dtype}; wancli reads {', '.join(BLOCK_SIZES)}",
            where=str(path),
            hint=OTHER_PRECISION,
        )
    return dtype, sizes[dtype]


def _torch_shape(info: _Info, values: dict[str, Value], reader: _Reader) -> tuple[int, ...]:
    """Return the shape in torch's order: the one that ComfyUI's converter recorded, if there is one."""
    original = values.get(ORIG_SHAPE + info.name)
    if original is None:
        return info.dims[::-1]
    sizes = list(original) if isinstance(original, array) and original.typecode not in "fd" else [-1]
    if min(sizes, default=1) < 0 or prod(sizes) != prod(info.dims):
        raise reader.damaged_error(f"{ORIG_SHAPE}{info.name} does not fit {list(info.dims)}")
    return tuple(sizes)


def umt5_to_transformers(name: str) -> str:
    """Rename a tensor of llama.cpp's UMT5 to its name in transformers' UMT5EncoderModel."""
    if block := _BLOCK.fullmatch(name):
        part = UMT5_BLOCK.get(block[2])
        return f"encoder.block.{block[1]}.{part}.weight" if part else name
    return UMT5.get(name, name)
