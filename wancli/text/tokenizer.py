"""Clean a prompt as official Wan does, and tokenize it for UMT5. Loads without torch."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wancli.errors import CheckpointError, JobError, PromptTooLong
from wancli.models.config import EOS
from wancli.units import quote
from wancli.weights.formats.embedded_tokenizer import TOKENIZER_HINT, read_tokenizer
from wancli.weights.formats.safetensors_header import DOWNLOAD_AGAIN
from wancli.weights.formats.tensor_index import FIRST_BYTES, refuse_text

MAX_PADDING = 512  # rows of an embedding that no piece has


def clean(text: str, where: str = "") -> str:
    """Clean a text as official Wan does: ftfy, two rounds of HTML unescaping, single spaces.

    ftfy also straightens curly quotes and makes full-width commas plain. Raises JobError for NUL,
    which ftfy would drop, and for surrogates, which cannot be encoded.
    """
    import ftfy

    if bad := re.search("[\0\ud800-\udfff]", text):
        point = f"U+{ord(bad[0]):04X}"
        kind = "NUL" if bad[0] == "\0" else "half of a surrogate pair"
        raise JobError(f"the prompt contains {point} ({kind}) at character {bad.start()}", where=where)
    unescaped = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", unescaped.strip()).strip()


@dataclass(frozen=True)
class Tokens:
    """A cleaned prompt and its tokens. `ids` ends with `</s>`; `pieces` names each id."""

    text: str
    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    max_tokens: int
    full_length: int  # tokens before truncation

    @property
    def truncated(self) -> bool:
        return self.full_length > len(self.ids)


class Tokenizer:
    """UMT5's SentencePiece model. Adds `</s>` after the pieces of the cleaned text."""

    def __init__(self, spiece: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            model = read_tokenizer(spiece)
            if model is None:
                raise CheckpointError("holds no tokenizer", where=str(spiece), hint=TOKENIZER_HINT)
            if model.lstrip().startswith(b"{"):
                raise CheckpointError(
                    "this is a tokenizer.json, which wancli does not read",
                    where=str(spiece),
                    hint=TOKENIZER_HINT,
                )
            refuse_text(spiece, model[:FIRST_BYTES])
            if not model:
                raise CheckpointError("the file is empty", where=str(spiece), hint=DOWNLOAD_AGAIN)
            self._model = SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise CheckpointError(
                f"not a SentencePiece model: {error}", where=str(spiece), hint=TOKENIZER_HINT
            ) from error

    def check_vocabulary(self, rows: int, where: str) -> None:
        """Raise CheckpointError if the embedding of an encoder, of so many rows, has other words.

        An embedding has a few rows more than there are pieces: UMT5-XXL pads it to a multiple of 128.
        """
        pieces = self._model.vocab_size()
        if pieces > rows or rows - pieces > min(MAX_PADDING, rows // 10):
            raise CheckpointError(
                f"a tokenizer of {pieces:,} pieces; the text encoder has {rows:,} words",
                where=where,
                hint=TOKENIZER_HINT,
            )

    def to_ids(self, cleaned: str) -> list[int]:
        return [*self._model.encode(cleaned, out_type=int), EOS]

    def to_pieces(self, ids: Sequence[int]) -> list[str]:
        return [self._model.id_to_piece(id) for id in ids]

    def tokenize(self, text: str, max_tokens: int, truncate: bool = False, where: str = "") -> Tokens:
        """Clean and tokenize a text. `max_tokens` counts `</s>`, which truncation keeps, as in official Wan.

        Raises JobError as `clean` does, and PromptTooLong if the prompt is longer and `truncate` is False.
        """
        cleaned = clean(text, where)
        ids = self.to_ids(cleaned)
        full_length = len(ids)
        if full_length > max_tokens:
            if not truncate:
                longer = "text.max_tokens: 512 or " if full_length <= 512 else ""
                lost = self._model.decode(ids[max_tokens - 1 : -1])
                raise PromptTooLong(
                    f"the prompt has {full_length} tokens, text.max_tokens is {max_tokens}",
                    where=where,
                    hint=f"set {longer}text.truncate: true, which would cut {quote(lost)}",
                )
            ids = [*ids[: max_tokens - 1], EOS]
        return Tokens(cleaned, tuple(ids), tuple(self.to_pieces(ids)), max_tokens, full_length)
