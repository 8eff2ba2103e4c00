"""The texts of a shot: cleaned, counted, and named as the embedding cache names them."""

from __future__ import annotations

import hashlib
from functools import cache, lru_cache
from pathlib import Path

from wancli.errors import EntryError, JobError
from wancli.job.loader import Item
from wancli.job.schema import EmbeddingFile
from wancli.plan import model_registry
from wancli.plan.shot import ModelSpec, Prompt
from wancli.text.embedding import describe
from wancli.text.encoder import Encoder
from wancli.text.tokenizer import Tokenizer


class Prompts:
    """Cleans, counts and names the texts of one shot."""

    def __init__(self, item: Item, model: ModelSpec) -> None:
        self._item = item
        self._model = model

    def get(self, said: str | EmbeddingFile, *path: str | int) -> Prompt:
        where = self._item.where(*path)
        if isinstance(said, EmbeddingFile):
            return self._from_file(said, self._item.folder(*path, "embedding"), where)
        if not said.strip() and path != ("negative",):
            raise JobError("is empty", where=where, hint="Only `negative` may be an empty text.")
        options = self._item.job.text
        try:
            return self._of_text(said, options.max_tokens, options.truncate)
        except JobError as error:
            raise type(error)(error.message, where=where, hint=error.hint) from None

    def negative(self, said: str | EmbeddingFile, default: str) -> Prompt:
        if said != "default":
            return self.get(said, "negative")
        # Not the user's text, so its length is not the user's fault: whole where 512 tokens hold it.
        return self._of_text(default, 512, True)

    def _of_text(self, text: str, max_tokens: int, truncate: bool) -> Prompt:
        return _prompt(self._model.checkpoint.tokenizer, self._model.encoder, text, max_tokens, truncate)

    def _from_file(self, said: EmbeddingFile, folder: Path, where: str) -> Prompt:
        path = model_registry.resolved(folder, said.embedding, where)
        try:
            payload = path.read_bytes()
        except OSError as error:
            raise JobError(f"{said.embedding!r} cannot be read: {error.strerror}", where=where) from None
        try:
            found = describe(payload)
        except EntryError as error:
            hint = "`wancli encode --out FILE` writes one."
            raise EntryError(f"{said.embedding!r}: {error.message}", where=where, hint=hint) from None
        if said.index >= len(found):
            raise JobError(
                f"{said.embedding!r} holds {len(found)} embeddings; {said.index} is not one", where=where
            )
        digest = hashlib.sha256(payload).hexdigest()
        return Prompt(f"{digest}.{said.index}", found[said.index], path, said.index)


@lru_cache(4096)  # the shots of a sweep say the same
def _prompt(spiece: Path, encoder: Encoder, text: str, max_tokens: int, truncate: bool) -> Prompt:
    tokens = _tokenizer(spiece).tokens(text, max_tokens, truncate)
    return Prompt(encoder.key(tokens), tokens)


@cache
def _tokenizer(spiece: Path) -> Tokenizer:
    return Tokenizer(spiece)
