"""The SentencePiece tokenizer that some text-encoder files contain; no torch.

ComfyUI's UMT5 files hold it as the uint8 tensor `spiece_model`. llama.cpp's converter splits it into
key-values of a GGUF file, `tokenizer.ggml.*`, from which it is assembled again: a protocol buffer of pieces,
the normaliser and the names of the special tokens.
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping
from pathlib import Path

from wancli.errors import CheckpointError
from wancli.weights.formats import gguf_header, safetensors_header
from wancli.weights.formats.safetensors_header import DOWNLOAD_AGAIN

TENSOR_NAME = "spiece_model"
UNIGRAM = 1
PIECE_TYPES = set(range(1, 7))  # GGUF numbers them as SentencePiece does
BYTE = 6  # a piece that stands for one byte


def read_tokenizer(path: Path) -> bytes | None:
    """Read the SentencePiece model inside a .gguf or .safetensors file; None if it has none.

    Raises CheckpointError like the readers of headers, and for key-values that are not a UMT5 tokenizer.
    """
    if path.suffix == ".gguf":
        values = gguf_header.read_header(path).values
        return _assemble(values, path) if "tokenizer.ggml.tokens" in values else None
    if path.suffix == ".safetensors":
        header = safetensors_header.read_header(path)
        name = next((name for name in header.tensors if name.split(".")[-1] == TENSOR_NAME), None)
        if name is not None and header.tensors[name].dtype == "U8":
            return header.read_bytes(name)
    return None


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
