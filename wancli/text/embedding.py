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
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from wancli.errors import EntryError, JobError
from wancli.storage import atomic, disk, records
from wancli.storage.schema import Count, Data, Positive
from wancli.text.tokenizer import Tokens

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1  # of the key and the payload; entries of another format are not used
Dtype = Literal["fp32", "bf16", "fp16"]
Role = Literal["toward", "away"]  # of a text in a file for steering
_DTYPES = ("torch.float32", "torch.bfloat16", "torch.float16")


class _Entry(Data):
    """A text of an embedding file and its tokens, as its metadata has them."""

    text: str
    ids: Annotated[list[Count], Field(min_length=1)]
    pieces: list[str]
    max_tokens: Positive
    full_length: Count
    encoder: str
    role: Role | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.pieces) != len(self.ids) or len(self.ids) > self.max_tokens:
            raise ValueError("another number of tokens")
        return self

    @property
    def tokens(self) -> Tokens:
        return Tokens(self.text, tuple(self.ids), tuple(self.pieces), self.max_tokens, self.full_length)


class _Record(Data):
    """The metadata of an embedding file."""

    KIND: ClassVar[records.Kind] = records.EMBEDDING
    format: Literal[1]
    embeddings: Annotated[list[_Entry], Field(min_length=1)]
    sha256: str


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


def pack(embeddings: Sequence[Embedding], roles: Sequence[Role] = ()) -> bytes:
    """Serialize embeddings as safetensors: tensors `embedding.0`, `embedding.1`, ..., and texts as metadata,
    each with its role if `roles` are given.

    Equal embeddings give equal bytes. The metadata has a SHA-256 of its other entries and of all rows.
    """
    entries = []
    for e in embeddings:
        tokens = {field.name: getattr(e, field.name) for field in fields(Tokens)}
        entries.append(tokens | {"encoder": e.encoder})
    for entry, role in zip(entries, roles):
        entry["role"] = role
    rows = [e.rows_NE.contiguous() for e in embeddings]
    record = {"format": FORMAT, "versions": library_versions(), "embeddings": entries}
    sealed = record | {"sha256": _digest(record, rows)}
    named = {f"embedding.{i}": rows_NE for i, rows_NE in enumerate(rows)}
    return records.write_tensors(named, _canonical_json(sealed).decode())


def read_tokens(payload: bytes, where: str = "") -> list[Tokens]:
    """Read the texts and tokens of a payload. Loads no torch, and neither reads nor checks the tensors."""
    return [entry.tokens for entry in _parse_record(payload, where)[0].embeddings]


def read_roles(payload: bytes) -> list[Role | None]:
    """Read the role of each text; None if it has none. Raises EntryError, as `read_tokens`."""
    return [entry.role for entry in _parse_record(payload, "")[0].embeddings]


def unpack(payload: bytes, where: str = "") -> list[Embedding]:
    """Read and verify what `pack` wrote. Raises EntryError if anything in it has changed."""
    record, facts = _parse_record(payload, where)
    try:
        tensors, _ = records.parse_tensors(payload)
        rows = [tensors.pop(f"embedding.{i}") for i in range(len(record.embeddings))]
        if tensors or any(rows_NE.ndim != 2 or str(rows_NE.dtype) not in _DTYPES for rows_NE in rows):
            raise ValueError("other tensors than rows of its texts")
        if any(len(rows_NE) != len(entry.ids) for rows_NE, entry in zip(rows, record.embeddings)):
            raise ValueError("another number of rows than of tokens")
    except (ValueError, KeyError) as error:
        raise records.EMBEDDING.damaged(where, str(error)) from None
    if facts.pop("sha256") != _digest(facts, rows):
        raise EntryError("the embedding file is damaged: its checksum differs", where=where)
    return [
        Embedding.from_tokens(entry.tokens, rows_NE, entry.encoder)
        for entry, rows_NE in zip(record.embeddings, rows, strict=True)
    ]


def save_embeddings(path: Path, embeddings: Sequence[Embedding], roles: Sequence[Role] = ()) -> None:
    """Write embeddings to a file that a job can name instead of a prompt; with `roles`, under `steer`."""
    atomic.publish_bytes(path, pack(embeddings, roles))


def load_embedding(path: Path, index: int = 0) -> Embedding:
    """Load one embedding of a file. Raises JobError if the file lacks it, and EntryError if it is damaged."""
    with disk.reading_for_job(str(path)):
        payload = records.read(path, records.EMBEDDING)
    embeddings = unpack(payload, str(path))
    if index >= len(embeddings):
        raise JobError(f"no embedding {index}: the file contains {len(embeddings)}, from 0", where=str(path))
    return embeddings[index]


def _parse_record(payload: bytes, where: str) -> tuple[_Record, dict[str, Any]]:
    """Parse the metadata of a payload; return it also as it is sealed."""
    try:
        _, facts = records.parse_header(payload)
    except ValueError:
        raise EntryError("not an embedding file of wancli, or damaged", where=where) from None
    return _Record.parse(facts, Path(where)), facts


def _digest(record: dict[str, Any], rows: Sequence[Tensor]) -> str:
    import torch

    forms = [[str(rows_NE.dtype), *rows_NE.shape] for rows_NE in rows]
    digest = hashlib.sha256(_canonical_json(record | {"forms": forms}))
    for rows_NE in rows:
        digest.update(rows_NE.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _canonical_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
