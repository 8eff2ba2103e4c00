"""An encoded prompt, its key in the cache, and its file format.

Letters: N tokens of one prompt (its `</s>` included), M rows of a padded context, E text width.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from wancli.errors import EntryError, JobError
from wancli.storage import atomic, disk
from wancli.text.tokenizer import Tokens

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1  # of the key and the payload; entries of another format are not used
Dtype = Literal["fp32", "bf16", "fp16"]
_METADATA = "wancli"  # one metadata key only: safetensors writes several in random order


@dataclass(frozen=True, eq=False)
class Embedding(Tokens):
    """An encoded prompt: its rows on the CPU, without padding, and the fingerprint of its encoder."""

    rows_NE: Tensor
    encoder: str

    @classmethod
    def from_tokens(cls, tokens: Tokens, rows_NE: Tensor, encoder: str) -> Embedding:
        """Combine a tokenized prompt with its rows."""
        t = tokens
        return cls(t.text, t.ids, t.pieces, t.max_tokens, t.full_length, rows_NE, encoder)

    def to_padded(self) -> Tensor:
        """Return [max_tokens, E] rows; those after the prompt are zero."""
        rows_ME = self.rows_NE.new_zeros(self.max_tokens, self.rows_NE.shape[1])
        rows_ME[: len(self.ids)] = self.rows_NE
        return rows_ME


@functools.cache
def library_versions() -> dict[str, str]:
    """Return major.minor of every library that an embedding depends on."""
    names = ("ftfy", "sentencepiece", "torch", "transformers")
    return {name: ".".join(importlib.metadata.version(name).split(".")[:2]) for name in names}


def embedding_key(encoder: str, tokenizer_sha: str, dtype: Dtype, max_tokens: int, cleaned: str) -> str:
    """Hash everything that an embedding depends on. `encoder` is the fingerprint of the weights."""
    parts = {
        "format": FORMAT,
        "encoder": encoder,
        "tokenizer": tokenizer_sha,
        "dtype": dtype,
        "max_tokens": max_tokens,
        "text": cleaned,
        "versions": library_versions(),
    }
    return hashlib.sha256(_canonical_json(parts)).hexdigest()


def pack(embeddings: Sequence[Embedding]) -> bytes:
    """Serialize embeddings as safetensors: tensors `embedding.0`, `embedding.1`, ..., and texts as metadata.

    Equal embeddings give equal bytes. The metadata has a SHA-256 of its other entries and of all rows.
    """
    from safetensors.torch import save

    entries = []
    for e in embeddings:
        tokens = {field.name: getattr(e, field.name) for field in fields(Tokens)}
        entries.append(tokens | {"encoder": e.encoder})
    rows = [e.rows_NE.contiguous() for e in embeddings]
    record = {"format": FORMAT, "versions": library_versions(), "embeddings": entries}
    sealed = record | {"sha256": _digest(record, rows)}
    named = {f"embedding.{i}": rows_NE for i, rows_NE in enumerate(rows)}
    return save(named, {_METADATA: _canonical_json(sealed).decode()})


def read_tokens(payload: bytes, where: str = "") -> list[Tokens]:
    """Read the texts and tokens of a payload. Loads no torch, and neither reads nor checks the tensors."""
    try:
        return [_parse_tokens(entry) for entry in _read_record(payload, where)["embeddings"]]
    except (KeyError, TypeError) as error:
        raise EntryError("the embedding file is damaged", where=where) from error


def unpack(payload: bytes, where: str = "") -> list[Embedding]:
    """Read and verify what `pack` wrote. Raises EntryError if anything in it has changed."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    record = _read_record(payload, where)
    try:
        tensors = load(payload)
        rows = [tensors[f"embedding.{i}"] for i in range(len(tensors))]
    except (SafetensorError, KeyError) as error:
        raise EntryError(f"the embedding file is damaged: {error}", where=where) from error
    if record.pop("sha256", None) != _digest(record, rows):
        raise EntryError("the embedding file is damaged: its checksum differs", where=where)
    return [
        Embedding.from_tokens(_parse_tokens(entry), rows_NE, entry["encoder"])
        for entry, rows_NE in zip(record["embeddings"], rows, strict=True)
    ]


def save_embeddings(path: Path, embeddings: Sequence[Embedding]) -> None:
    """Write embeddings to a file that a job can name instead of a prompt."""
    atomic.publish_bytes(path, pack(embeddings))


def load_embedding(path: Path, index: int = 0) -> Embedding:
    """Load one embedding of a file. Raises JobError if the file lacks it, and EntryError if it is damaged."""
    with disk.reading_for_job(str(path)):
        payload = disk.read_bytes(path)
    embeddings = unpack(payload, str(path))
    if index >= len(embeddings):
        raise JobError(f"no embedding {index}: the file contains {len(embeddings)}, from 0", where=str(path))
    return embeddings[index]


def _read_record(payload: bytes, where: str) -> dict[str, Any]:
    """Read the metadata of a payload: safetensors starts with the length of a JSON header and the header."""
    try:
        end = 8 + int.from_bytes(payload[:8], "little")
        record = json.loads(json.loads(payload[8:end])["__metadata__"][_METADATA])
        if record["format"] != FORMAT:
            raise EntryError(f"embedding format {record['format']} is not {FORMAT}", where=where)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise EntryError("not an embedding file of wancli, or damaged", where=where) from error
    return dict(record)


def _parse_tokens(entry: dict[str, Any]) -> Tokens:
    return Tokens(
        entry["text"], tuple(entry["ids"]), tuple(entry["pieces"]), entry["max_tokens"], entry["full_length"]
    )


def _digest(record: dict[str, Any], rows: Sequence[Tensor]) -> str:
    import torch

    forms = [[str(rows_NE.dtype), *rows_NE.shape] for rows_NE in rows]
    digest = hashlib.sha256(_canonical_json(record | {"forms": forms}))
    for rows_NE in rows:
        digest.update(rows_NE.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _canonical_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
