"""Stage 1: prompts to embeddings, each computed once ever and kept in the store.

Letters: N tokens of one prompt (its `</s>` included), M rows of a padded context, E text width.

text -> `clean` -> `Tokenizer.tokens` -> `Encoder.key` -> store, or UMT5 -> store -> `Embedding`.
All but the last step work without torch, so that a plan can count tokens and name cache entries.
"""

from __future__ import annotations

import functools
import hashlib
import html
import importlib.metadata
import json
import os
import re
import socket
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from wancli import files
from wancli.errors import CheckpointError, EntryError, JobError, NotFinite, PromptTooLong, WancliError
from wancli.memory import Residency
from wancli.peak import fitting, release
from wancli.policy import Failing
from wancli.weights.parts import Naming, rename
from wancli.weights.tokenizer import tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import UMT5EncoderModel

    from wancli.store import Store

FORMAT = 1  # of the key and the payload; a new one never reads an old entry as its own
EOS = 1  # `</s>`
Dtype = Literal["fp32", "bf16", "fp16"]
_METADATA = "wancli"  # one metadata key only: safetensors writes several in random order


def clean(text: str, where: str = "") -> str:
    """The text as official Wan tokenises it: ftfy, two rounds of HTML unescaping, single spaces.

    ftfy also straightens curly quotes and makes full-width commas plain. Raises JobError on NUL
    and on surrogates, which ftfy would drop or no encoder can write.
    """
    import ftfy

    if bad := re.search("[\0\ud800-\udfff]", text):
        point = f"U+{ord(bad[0]):04X}"
        kind = "NUL" if bad[0] == "\0" else "half of a surrogate pair"
        raise JobError(f"the prompt holds {point} ({kind}) at character {bad.start()}", where=where)
    unescaped = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", unescaped.strip()).strip()


@dataclass(frozen=True)
class Tokens:
    """A cleaned prompt and what UMT5 reads of it. `ids` ends with `</s>`, `pieces` names each id."""

    text: str
    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    max_tokens: int
    full_length: int  # tokens before truncation

    @property
    def truncated(self) -> bool:
        return self.full_length > len(self.ids)


@dataclass(frozen=True, eq=False)
class Embedding(Tokens):
    """An encoded prompt: `rows_NE` on the CPU without padding, and the fingerprint of its encoder."""

    rows_NE: Tensor
    encoder: str

    @classmethod
    def of(cls, tokens: Tokens, rows_NE: Tensor, encoder: str) -> Embedding:
        """The rows of a tokenised prompt."""
        t = tokens
        return cls(t.text, t.ids, t.pieces, t.max_tokens, t.full_length, rows_NE, encoder)

    def padded(self) -> Tensor:
        """[max_tokens, E], rows past the prompt zero."""
        rows_ME = self.rows_NE.new_zeros(self.max_tokens, self.rows_NE.shape[1])
        rows_ME[: len(self.ids)] = self.rows_NE
        return rows_ME


class Tokenizer:
    """UMT5's SentencePiece model: ids = pieces of the cleaned text, then `</s>`."""

    def __init__(self, spiece: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            if spiece.suffix in (".safetensors", ".gguf"):
                self._model = SentencePieceProcessor(model_proto=tokenizer(spiece) or b"")
            else:
                self._model = SentencePieceProcessor(model_file=str(spiece))
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"not a SentencePiece model: {error}", where=str(spiece)) from error

    def ids(self, cleaned: str) -> list[int]:
        return [*self._model.encode(cleaned, out_type=int), EOS]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self._model.id_to_piece(id) for id in ids]

    def tokens(self, text: str, max_tokens: int, truncate: bool = False, where: str = "") -> Tokens:
        """Clean and tokenise. `max_tokens` counts `</s>`, which truncation keeps, as officially.

        Raises JobError as `clean` does, PromptTooLong when the prompt is longer and not to be cut.
        """
        cleaned = clean(text, where)
        ids = self.ids(cleaned)
        full_length = len(ids)
        if full_length > max_tokens:
            if not truncate:
                longer = "text.max_tokens: 512 or " if full_length <= 512 else ""
                lost = self._model.decode(ids[max_tokens - 1 : -1])
                raise PromptTooLong(
                    f"the prompt has {full_length} tokens, text.max_tokens is {max_tokens}",
                    where=where,
                    hint=f"set {longer}text.truncate: true, which would cut {_shown(lost)}",
                )
            ids = [*ids[: max_tokens - 1], EOS]
        return Tokens(cleaned, tuple(ids), tuple(self.pieces(ids)), max_tokens, full_length)


@functools.cache
def versions() -> dict[str, str]:
    """major.minor of every library that has a say in an embedding."""
    names = ("ftfy", "sentencepiece", "torch", "transformers")
    return {name: ".".join(importlib.metadata.version(name).split(".")[:2]) for name in names}


def embedding_key(encoder: str, tokenizer_sha: str, dtype: Dtype, max_tokens: int, cleaned: str) -> str:
    """SHA-256 over everything that decides an embedding; `encoder` is the weights' fingerprint."""
    parts = {
        "format": FORMAT,
        "encoder": encoder,
        "tokenizer": tokenizer_sha,
        "dtype": dtype,
        "max_tokens": max_tokens,
        "text": cleaned,
        "versions": versions(),
    }
    return hashlib.sha256(_canonical(parts)).hexdigest()


def pack(embeddings: Sequence[Embedding]) -> bytes:
    """A safetensors file: tensors `embedding.0`, `embedding.1`, ..., texts and tokens as metadata.

    Equal embeddings give equal bytes. The metadata holds a SHA-256 of the rest of it and of all rows.
    """
    from safetensors.torch import save

    entries = []
    for e in embeddings:
        tokens = {field.name: getattr(e, field.name) for field in fields(Tokens)}
        entries.append(tokens | {"encoder": e.encoder})
    rows = [e.rows_NE.contiguous() for e in embeddings]
    record = {"format": FORMAT, "versions": versions(), "embeddings": entries}
    sealed = record | {"sha256": _digest(record, rows)}
    named = {f"embedding.{i}": rows_NE for i, rows_NE in enumerate(rows)}
    return save(named, {_METADATA: _canonical(sealed).decode()})


def describe(payload: bytes, where: str = "") -> list[Tokens]:
    """Texts and tokens of a payload, without torch and without reading or checking its tensors."""
    try:
        return [_tokens(entry) for entry in _record(payload, where)["embeddings"]]
    except (KeyError, TypeError) as error:
        raise EntryError("the embedding file is damaged", where=where) from error


def unpack(payload: bytes, where: str = "") -> list[Embedding]:
    """What `pack` wrote, verified. Raises EntryError when anything in it has changed."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    record = _record(payload, where)
    try:
        tensors = load(payload)
        rows = [tensors[f"embedding.{i}"] for i in range(len(tensors))]
    except (SafetensorError, KeyError) as error:
        raise EntryError(f"the embedding file is damaged: {error}", where=where) from error
    if record.pop("sha256", None) != _digest(record, rows):
        raise EntryError("the embedding file is damaged: its checksum differs", where=where)
    return [
        Embedding.of(_tokens(entry), rows_NE, entry["encoder"])
        for entry, rows_NE in zip(record["embeddings"], rows, strict=True)
    ]


def save_embeddings(path: Path, embeddings: Sequence[Embedding]) -> None:
    """Publish embeddings as a file that a job can name instead of a prompt."""
    files.publish_bytes(path, pack(embeddings))


def load_embedding(path: Path, index: int = 0) -> Embedding:
    """One embedding of a file. Raises JobError when it is not there, EntryError when damaged."""
    try:
        payload = path.read_bytes()
    except OSError as error:
        raise JobError(f"the embedding file cannot be read: {error.strerror}", where=str(path)) from error
    embeddings = unpack(payload, str(path))
    if index >= len(embeddings):
        raise JobError(f"no embedding {index}: the file holds {len(embeddings)}, from 0", where=str(path))
    return embeddings[index]


@dataclass(frozen=True)
class Encoder:
    """Where stage 1 finds UMT5, and all that tells its embeddings from another's."""

    files: tuple[Path, ...]
    naming: Naming
    fingerprint: str
    tokenizer_sha: str
    dtype: Dtype
    device: str = "cpu"
    prefix: str = ""  # before every name of UMT5 in the files
    residency: Residency = "resident"  # "streamed" needs the memory of two layers

    def key(self, tokens: Tokens) -> str:
        return embedding_key(self.fingerprint, self.tokenizer_sha, self.dtype, tokens.max_tokens, tokens.text)


@dataclass(frozen=True)
class Encoded:
    """One prompt done. `hit`: it came from the store, so UMT5 was not loaded for it."""

    key: str
    embedding: Embedding
    hit: bool


@dataclass(frozen=True)
class Unencoded:
    """A prompt of which nothing came: NaN, or no memory for it. The others go on."""

    key: str
    error: WancliError


def encode(encoder: Encoder, prompts: Iterable[Tokens], store: Store | None) -> Iterator[Encoded | Unencoded]:
    """Yield every distinct prompt once: first those in the store, then the others as they are computed.

    UMT5 is loaded when the first is missing, never if none is, and freed when the loop ends. A
    damaged entry counts as missing, and what is not finite is not kept. Raises CheckpointError, and
    OutOfMemory where UMT5 itself is too large.
    """
    missing = {}
    for key, tokens in {encoder.key(tokens): tokens for tokens in prompts}.items():
        if store and (known := _recall(store, key)):
            yield Encoded(key, known, hit=True)
        else:
            missing[key] = tokens
    if not missing:
        return
    from wancli.models import t5

    with fitting("encode", str(encoder.files[0])):
        model = load_encoder(encoder)
    todo = _rotated(list(missing.items()))
    together = len(todo) if encoder.residency == "streamed" else 1  # one pass over fetched weights is enough
    for some in (todo[i : i + together] for i in range(0, len(todo), together)):
        if len(some) == 1 and store and (known := _recall(store, some[0][0])):  # by another worker meanwhile
            yield Encoded(some[0][0], known, hit=True)
            continue
        of_each: Sequence[Tensor] = ()
        with Failing() as attempt, fitting("encode", _shown(some[0][1].text)):
            of_each = t5.rows_of_each(model, [tokens.ids for _, tokens in some])
        if attempt.error:
            release()
            yield from (Unencoded(key, attempt.error) for key, _ in some)
        for (key, tokens), rows_NE in zip(some, of_each):
            yield _kept(key, tokens, rows_NE, encoder, store)


def _kept(
    key: str, tokens: Tokens, rows_NE: Tensor, encoder: Encoder, store: Store | None
) -> Encoded | Unencoded:
    if not rows_NE.isfinite().all():
        message = f"UMT5 gives NaN or Inf for {_shown(tokens.text)}"
        return Unencoded(key, NotFinite(message, where=str(encoder.files[0])))
    embedding = Embedding.of(tokens, rows_NE.cpu(), encoder.fingerprint)
    if store:
        store.put(key, pack([embedding]))
    return Encoded(key, embedding, hit=False)


def _rotated(todo: list[tuple[str, Tokens]]) -> list[tuple[str, Tokens]]:
    """Workers that begin a job together begin at different prompts, and find what the others have done."""
    start = zlib.crc32(f"{socket.gethostname()}:{os.getpid()}".encode()) % len(todo)
    return todo[start:] + todo[:start]


def load_encoder(encoder: Encoder) -> UMT5EncoderModel:
    """UMT5 with its weights on the device, or where its residency has them. Raises CheckpointError with
    the list of what is wrong."""
    from wancli.models.dtypes import DTYPES
    from wancli.weights import networks

    return networks.load_umt5(
        encoder.files,
        rename("text encoder", encoder.naming),
        DTYPES[encoder.dtype],
        encoder.device,
        encoder.residency,
        encoder.prefix,
    )


def _recall(store: Store, key: str) -> Embedding | None:
    payload = store.get(key)
    try:
        return unpack(payload)[0] if payload else None
    except EntryError:
        return None


def _record(payload: bytes, where: str) -> dict[str, Any]:
    """The metadata of a payload: safetensors begins with the length of a JSON header, then that."""
    try:
        end = 8 + int.from_bytes(payload[:8], "little")
        record = json.loads(json.loads(payload[8:end])["__metadata__"][_METADATA])
        if record["format"] != FORMAT:
            raise EntryError(f"embedding format {record['format']} is not {FORMAT}", where=where)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise EntryError("not an embedding file of wancli, or damaged", where=where) from error
    return dict(record)


def _tokens(entry: dict[str, Any]) -> Tokens:
    return Tokens(
        entry["text"], tuple(entry["ids"]), tuple(entry["pieces"]), entry["max_tokens"], entry["full_length"]
    )


def _digest(record: dict[str, Any], rows: Sequence[Tensor]) -> str:
    import torch

    forms = [[str(rows_NE.dtype), *rows_NE.shape] for rows_NE in rows]
    digest = hashlib.sha256(_canonical(record | {"forms": forms}))
    for rows_NE in rows:
        digest.update(rows_NE.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _canonical(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _shown(text: str) -> str:
    """A prompt in a message: quoted, short, invisible characters escaped."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
