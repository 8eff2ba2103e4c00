"""The SentencePiece tokenizer that some weight files contain; torch only for a .pth.

ComfyUI's UMT5 files hold it as the uint8 tensor `spiece_model`; scripts that cast a whole file turn its bytes
into floats. llama.cpp's converter splits it into key-values of a GGUF file, `tokenizer.ggml.*`, from which it
is assembled again: a protocol buffer of pieces, the normaliser and the names of the special tokens.
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path

from wancli.errors import CheckpointError
from wancli.storage import disk
from wancli.weights.formats import gguf_header, safetensors_header
from wancli.weights.formats.key_mapping import is_tokenizer
from wancli.weights.formats.mapped_file import map_file
from wancli.weights.formats.numbers import decode_numbers
from wancli.weights.formats.safetensors_header import DOWNLOAD_AGAIN, open_weights
from wancli.weights.formats.tensor_index import (
    MAGICS,
    Container,
    begins_safetensors,
    check_complete,
    detect_container,
)

UNIGRAM = 1
PIECE_TYPES = set(range(1, 7))  # GGUF numbers them as SentencePiece does
BYTE = 6  # a piece that stands for one byte
BYTES = frozenset(map(float, range(256)))
TOKENS = "tokenizer.ggml.tokens"
TOKENIZER_HINT = (
    "name the file spiece.model of a Wan repository (google/umt5-xxl/) as `tokenizer` of the job's `model`"
)


@disk.reading_weights()
def read_tokenizer(path: Path) -> bytes | None:
    """Read a SentencePiece model: the whole file, or the part of a weight file that holds it. Returns None
    for a weight file without one.

    Raises CheckpointError like the readers of headers, for a file with several tokenizers and
    for one that is damaged.
    """
    check_complete(path)
    if not _holds_tensors(path):
        return disk.read_bytes(path)
    container = detect_container(path)
    if container == "gguf":
        values = gguf_header.read_header(path).values
        if TOKENS in values:
            return _assemble(values, path)
    models = {
        name: _decode_bytes(name, dtype, data, path) for name, dtype, data in _read_tensors(path, container)
    }
    if len(set(models.values())) > 1:
        raise CheckpointError(
            f"holds {len(models)} tokenizers: {', '.join(models)}", where=str(path), hint=TOKENIZER_HINT
        )
    return next(iter(models.values()), None)


def _holds_tensors(path: Path) -> bool:
    """Return whether the first bytes of a file are those of a container of tensors."""
    with open_weights(path) as file:
        first = file.read(9)
    return first.startswith(MAGICS) or begins_safetensors(first, disk.size(path))


def _read_tensors(path: Path, container: Container) -> Iterator[tuple[str, str, bytes]]:
    """Yield name, dtype and bytes of every tensor that holds a tokenizer."""
    if container == "safetensors":
        header = safetensors_header.read_header(path)
        for name in filter(is_tokenizer, header.tensors):
            yield name, header.tensors[name].dtype, header.read_bytes(name)
    elif container == "gguf":
        pages, tensors = map_file(path), gguf_header.read_header(path).tensors
        for name in filter(is_tokenizer, tensors):
            start, nbytes = tensors[name].start, tensors[name].nbytes
            yield name, tensors[name].dtype, pages[start : start + nbytes]
    else:
        from wancli.weights.formats.read import iterate_tensors

        for name, tensor in iterate_tensors([path]):
            if is_tokenizer(name):
                yield name, "F64", tensor.double().numpy().tobytes()


def _decode_bytes(name: str, dtype: str, data: bytes, path: Path) -> bytes:
    """Return the bytes that numbers of any type stand for. Raises CheckpointError if they are no bytes."""
    if dtype == "U8":
        return data
    values = None if dtype.startswith("F8") else decode_numbers(dtype, data)
    if values is None:
        raise CheckpointError(
            f"{name} is stored as {dtype}, which keeps no bytes", where=str(path), hint=TOKENIZER_HINT
        )
    if dtype == "I8":
        values = [value % 256 for value in values]
    if not all(value in BYTES for value in values):
        raise CheckpointError(
            f"{name} holds numbers that do not fit a byte", where=str(path), hint=TOKENIZER_HINT
        )
    return bytes(map(int, values))


def _assemble(values: Mapping[str, gguf_header.Value], path: Path) -> bytes:
    """Assemble a ModelProto from tokenizer.ggml.*"""
    tokens, scores, types = (values.get(f"tokenizer.ggml.{x}") for x in ("tokens", "scores", "token_type"))
    if (
        values.get("tokenizer.ggml.model") != "t5"
        or not (isinstance(tokens, list) and isinstance(scores, array) and isinstance(types, array))
        or not len(tokens) == len(scores) == len(types)
        or scores.typecode != "f"
        or not set(types) <= PIECE_TYPES
    ):
        raise CheckpointError(
            "its tokenizer.ggml.* is not the tokenizer of UMT5, or is damaged",
            where=str(path),
            hint=DOWNLOAD_AGAIN,
        )
    pieces = b"".join(
        _bytes(1, _bytes(1, token.encode()) + _float(2, score) + _int(3, type))
        for token, score, type in zip(tokens, scores, types)
    )
    charsmap = values.get("tokenizer.ggml.precompiled_charsmap", array("B"))
    trainer = _int(3, UNIGRAM) + _int(4, len(tokens)) + _int(35, BYTE in types)
    normalizer = (
        _bytes(2, charsmap.tobytes() if isinstance(charsmap, array) else b"")
        + _int(3, bool(values.get("tokenizer.ggml.add_space_prefix", True)))
        + _int(4, bool(values.get("tokenizer.ggml.remove_extra_whitespaces", True)))
    )
    return pieces + _bytes(2, trainer) + _bytes(3, normalizer)


# Fields of a protocol buffer: the number, the wire type, the value.
def _int(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _varint(value: int) -> bytes:
    """Encode seven bits a byte, lowest first, with the top bit set if more follow."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
