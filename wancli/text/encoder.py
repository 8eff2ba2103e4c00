"""Encode prompts: each is encoded once ever, and its embedding is kept in the cache.

text -> `wancli.text.tokenizer` -> `EncoderSpec.key` -> cache, or UMT5 -> cache -> `wancli.text.embedding`.
All but the last step work without torch, so that a plan can count tokens and compute cache keys.

Letters: N tokens of one prompt, E text width.
"""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wancli.errors import EntryError, ErrorCapture, NotFinite, WancliError
from wancli.resources.measure import oom_as_error, release_memory
from wancli.resources.memory_model import Residency
from wancli.text.embedding import Dtype, Embedding, embedding_key, pack, unpack
from wancli.text.tokenizer import Tokens
from wancli.units import quote
from wancli.weights.component import Naming, get_renaming

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import UMT5EncoderModel

    from wancli.storage.cache import Store


@dataclass(frozen=True)
class EncoderSpec:
    """The files of UMT5, how to load them, and everything that its embeddings depend on."""

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
    """An encoded prompt. `hit`: it came from the cache, so UMT5 was not loaded for it."""

    key: str
    embedding: Embedding
    hit: bool


@dataclass(frozen=True)
class EncodeFailure:
    """A prompt that could not be encoded: NaN, or out of memory. The other prompts continue."""

    key: str
    error: WancliError


def encode(
    encoder: EncoderSpec, prompts: Iterable[Tokens], store: Store | None
) -> Iterator[Encoded | EncodeFailure]:
    """Yield every distinct prompt once: first those in the cache, then the others as they are encoded.

    UMT5 is loaded only if a prompt is missing, and freed when the loop ends. A damaged entry counts as
    missing. An embedding that is not finite is not cached. Raises CheckpointError, and OutOfMemory if UMT5
    itself does not fit.
    """
    missing = {}
    for key, tokens in {encoder.key(tokens): tokens for tokens in prompts}.items():
        if store and (cached := _read_cached(store, encoder, tokens)):
            yield Encoded(key, cached, hit=True)
        else:
            missing[key] = tokens
    if not missing:
        return
    from wancli.models import t5

    with oom_as_error("encode", str(encoder.files[0])):
        model = load_encoder(encoder)
    pending = _rotate(list(missing.items()))
    group_size = (
        len(pending) if encoder.residency == "streamed" else 1
    )  # one pass over fetched weights is enough
    for group in (pending[i : i + group_size] for i in range(0, len(pending), group_size)):
        if (
            len(group) == 1 and store and (cached := _read_cached(store, encoder, group[0][1]))
        ):  # by another worker meanwhile
            yield Encoded(group[0][0], cached, hit=True)
            continue
        rows: Sequence[Tensor] = ()
        with ErrorCapture() as attempt, oom_as_error("encode", quote(group[0][1].text)):
            rows = t5.encode_batch(model, [tokens.ids for _, tokens in group])
        if attempt.error:
            release_memory()
            yield from (EncodeFailure(key, attempt.error) for key, _ in group)
        for (key, tokens), rows_NE in zip(group, rows):
            yield _store_embedding(key, tokens, rows_NE, encoder, store)


def _store_embedding(
    key: str, tokens: Tokens, rows_NE: Tensor, encoder: EncoderSpec, store: Store | None
) -> Encoded | EncodeFailure:
    if not rows_NE.isfinite().all():
        message = f"UMT5 gives NaN or Inf for {quote(tokens.text)}"
        return EncodeFailure(key, NotFinite(message, where=str(encoder.files[0])))
    embedding = Embedding.from_tokens(tokens, rows_NE.cpu(), encoder.fingerprint)
    if store:
        store.put(key, pack([embedding]))
    return Encoded(key, embedding, hit=False)


def _rotate(pending: list[tuple[str, Tokens]]) -> list[tuple[str, Tokens]]:
    """Start at a prompt that depends on the process, so that workers which start together share the work."""
    start = zlib.crc32(f"{socket.gethostname()}:{os.getpid()}".encode()) % len(pending)
    return pending[start:] + pending[:start]


def load_encoder(encoder: EncoderSpec) -> UMT5EncoderModel:
    """Load UMT5; `residency` decides where its weights are. Raises CheckpointError with all problems."""
    from wancli.models.attention import DTYPES
    from wancli.weights import loader

    return loader.load_umt5(
        encoder.files,
        get_renaming("text encoder", encoder.naming),
        DTYPES[encoder.dtype],
        encoder.device,
        encoder.residency,
        encoder.prefix,
    )


def _read_cached(store: Store, encoder: EncoderSpec, tokens: Tokens) -> Embedding | None:
    """Return the embedding of a prompt in the cache, None if there is none that can be used."""
    payload = store.get(encoder.key(tokens))
    try:
        found = unpack(payload)[0] if payload else None
    except EntryError:
        return None
    if found is None or (found.ids, found.encoder) != (tokens.ids, encoder.fingerprint):
        return None
    return found if found.rows_NE.isfinite().all() else None
