"""Resolve the prompts of a shot: clean and tokenize each text, and compute its key in the embedding cache."""

from __future__ import annotations

import hashlib
from functools import cache, lru_cache
from pathlib import Path

from wancli.errors import EntryError, JobError
from wancli.job.loader import Item
from wancli.job.schema_values import EmbeddingFile
from wancli.plan import model_registry
from wancli.plan.model_spec import ModelSpec
from wancli.plan.shot import Prompt
from wancli.storage import disk, records
from wancli.text.embedding import Role, read_roles, read_tokens
from wancli.text.encoder import EncoderSpec
from wancli.text.tokenizer import Tokenizer, Tokens
from wancli.weights.checkpoint import text_encoder_config


class PromptResolver:
    """Resolves the prompts of one shot."""

    def __init__(self, item: Item, model: ModelSpec) -> None:
        self._item = item
        self._model = model

    def resolve(self, spec: str | EmbeddingFile, *path: str | int) -> Prompt:
        location = self._item.location(*path)
        if isinstance(spec, EmbeddingFile):
            return self._from_file(spec, self._item.base_dir(*path, "embedding"), location)
        if not spec.strip() and path != ("negative",):
            raise JobError("is empty", where=location, hint="Only `negative` may be an empty text.")
        options = self._item.job.text
        try:
            return self._from_text(spec, options.max_tokens, options.truncate)
        except JobError as error:
            raise type(error)(error.message, where=location, hint=error.hint) from None

    def count_tokens(self, text: str, *path: str | int) -> int:
        """Count the tokens of a text, without the one that ends it. Raises JobError."""
        try:
            return self._from_text(text, 512, True).tokens.full_length - 1
        except JobError as error:
            raise type(error)(error.message, where=self._item.location(*path), hint=error.hint) from None

    def resolve_negative(self, spec: str | EmbeddingFile, default: str) -> Prompt:
        if spec != "default":
            return self.resolve(spec, "negative")
        # The model's own text may be longer than text.max_tokens, so it gets all 512 tokens.
        return self._from_text(default, 512, True)

    def _from_text(self, text: str, max_tokens: int, truncate: bool) -> Prompt:
        return tokenize(self._model, text, max_tokens, truncate)

    def resolve_roles(self, file: str, *path: str | int) -> dict[Role, tuple[Prompt, ...]]:
        """Return the prompts of a file for steering, by their roles. Raises JobError and EntryError."""
        location = self._item.location(*path)
        found, payload, tokens = self._read_file(file, self._item.base_dir(*path), location)
        roles = read_roles(payload)
        if None in roles:
            hint = "`wancli encode --toward TEXT --away TEXT --out FILE` writes one for `steer`."
            raise JobError(f"{file!r} does not say what to steer toward", where=location, hint=hint)
        digest = hashlib.sha256(payload).hexdigest()
        prompts = [Prompt(f"{digest}.{i}", each, found, i) for i, each in enumerate(tokens)]
        sides: tuple[Role, ...] = ("toward", "away")
        return {side: tuple(p for p, role in zip(prompts, roles) if role == side) for side in sides}

    @staticmethod
    def _read_file(file: str, base_dir: Path, location: str) -> tuple[Path, bytes, list[Tokens]]:
        """Return the path of an embedding file, its bytes, and its texts."""
        path = model_registry.resolve_path(base_dir, file, location)
        with disk.reading_for_job(location, file):
            payload = records.read(path, records.EMBEDDING)
        try:
            return path, payload, read_tokens(payload)
        except EntryError as error:
            hint = "`wancli encode --out FILE` writes one."
            raise EntryError(f"{file!r}: {error.message}", where=location, hint=hint) from None

    def _from_file(self, spec: EmbeddingFile, base_dir: Path, location: str) -> Prompt:
        path, payload, tokens = self._read_file(spec.embedding, base_dir, location)
        if spec.index >= len(tokens):
            raise JobError(
                f"{spec.embedding!r} contains {len(tokens)} embeddings, from 0; there is no {spec.index}",
                where=location,
            )
        digest = hashlib.sha256(payload).hexdigest()
        return Prompt(f"{digest}.{spec.index}", tokens[spec.index], path, spec.index)


def tokenize(model: ModelSpec, text: str, max_tokens: int, truncate: bool) -> Prompt:
    """Tokenize a text for a model. Raises CheckpointError for the tokenizer of another text encoder."""
    words = text_encoder_config(model.checkpoint).vocab_size
    return _tokenize(model.checkpoint.tokenizer, words, model.encoder, text, max_tokens, truncate)


@lru_cache(4096)  # the shots of a sweep have the same prompts
def _tokenize(
    spiece: Path, words: int, encoder: EncoderSpec, text: str, max_tokens: int, truncate: bool
) -> Prompt:
    tokens = _tokenizer(spiece, words).tokenize(text, max_tokens, truncate)
    return Prompt(encoder.key(tokens), tokens)


@cache
def _tokenizer(spiece: Path, words: int) -> Tokenizer:
    tokenizer = Tokenizer(spiece)
    tokenizer.check_vocabulary(words, str(spiece))
    return tokenizer
