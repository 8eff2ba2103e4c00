"""Find words of a prompt among its tokens: the rows of its context that come from them. Loads without torch.

A row of the context is a token, and a token is a piece of the text: `▁red`, `▁cir`, `cle`, `,`. A word begins
and ends where letters and digits do, so `red` is no part of `colored`, but of `red-hot`. Scripts without
spaces have no such borders: there, any characters of whole pieces are found.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from wancli.errors import JobError
from wancli.text.tokenizer import Tokens, clean
from wancli.units import quote

_BYTE = re.compile("<0x([0-9A-F]{2})>")
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
_UNKNOWN = "\ufffd"  # stands for a character that the tokenizer does not know
_SHOWN_PIECES = 60


class _Character(NamedTuple):
    """A character of a text, without case, and the first and the last piece that it comes from."""

    character: str
    first: int
    last: int


def find_rows(tokens: Tokens, words: str, where: str = "") -> tuple[int, ...]:
    """Return the rows of every occurrence of a word, or of several words in a row, ascending.

    Case does not count. An occurrence that shares a piece with other letters has no rows of its own, and is
    left out. Raises JobError if none is left, if the prompt lacks the words, or if truncation cut them off.
    """
    wanted = _fold(clean(words, where))
    if not wanted:
        raise JobError("names no word", where=where, hint=_describe_pieces(tokens.pieces[:-1]))
    characters = list(_spell(tokens.pieces[:-1]))
    spelled = "".join(c.character for c in characters)
    text = _fold(tokens.text)
    whole = text if text.startswith(spelled) else spelled
    starts = [i for i in _find_all(whole, wanted) if i + len(wanted) <= len(spelled)]
    if not starts:
        raise _not_found(tokens, words, wanted, where)
    rows: set[int] = set()
    for start in starts:
        own = characters[start : start + len(wanted)]
        first, last = own[0].first, own[-1].last
        others = characters[:start] + characters[start + len(wanted) :]
        if not any(_is_letter(c.character) and first <= c.last and c.first <= last for c in others):
            rows.update(range(first, last + 1))
    if not rows:
        piece = tokens.pieces[characters[starts[0]].first]
        raise JobError(
            f"{quote(words)} shares the piece {piece} with other letters of the prompt",
            where=where,
            hint=_describe_pieces(tokens.pieces[:-1]),
        )
    return tuple(sorted(rows))


def _spell(pieces: Sequence[str]) -> list[_Character]:
    """Return the characters of the pieces, without the space before the first. Several pieces of one byte
    each make a character.
    """
    spelled: list[_Character] = []
    for in_bytes, numbered in groupby(enumerate(pieces), lambda item: bool(_BYTE.fullmatch(item[1]))):
        group = list(numbered)
        if in_bytes:
            first = group[0][0]
            for character in bytes(int(piece[3:5], 16) for _, piece in group).decode(errors="replace"):
                last = min(first + len(character.encode()) - 1, group[-1][0])
                spelled += [_Character(c, first, last) for c in _fold(character)]
                first = min(last + 1, group[-1][0])
            continue
        for index, piece in group:
            text = _UNKNOWN if piece == "<unk>" else piece.replace("▁", " ")
            spelled += [_Character(c, index, index) for c in _fold(text)]
    return spelled[1:] if spelled and spelled[0].character == " " else spelled


def _fold(text: str) -> str:
    """Remove case and variants of characters, one by one, so that each stays with its piece."""
    return "".join(unicodedata.normalize("NFKC", character).casefold() for character in text)


def _find_all(text: str, wanted: str) -> list[int]:
    """Return where a text has the words, neither as the end nor as the beginning of longer ones."""
    starts = [m.start() for m in re.finditer(f"(?={re.escape(wanted)})", text)]
    return [
        i
        for i in starts
        if _is_border(text[max(0, i - 1) : i], wanted[0])
        and _is_border(wanted[-1], text[i + len(wanted) :][:1])
    ]


def _is_border(before: str, after: str) -> bool:
    """Whether a word may end between two characters."""
    both = [c for c in (before, after) if c and _is_letter(c)]
    return len(both) < 2 or any(unicodedata.name(c, "").startswith(_UNSPACED) for c in both)


def _is_letter(character: str) -> bool:
    """Whether a character is a part of words: a letter, a digit or a mark on one."""
    return character.isalnum() or unicodedata.category(character).startswith("M")


def _not_found(tokens: Tokens, words: str, wanted: str, where: str) -> JobError:
    hint = _describe_pieces(tokens.pieces[:-1])
    if _find_all(_fold(tokens.text), wanted):
        if tokens.truncated:
            cut = f"it is cut off: the prompt has {tokens.full_length} tokens, {len(tokens.ids)} are kept"
            return JobError(f"{quote(words)} is not read, {cut}", where=where, hint=hint)
        return JobError(f"the tokenizer does not know {quote(words)}", where=where, hint=hint)
    by_folded = {_fold(word): word for word in re.findall(r"\w+", tokens.text)}
    near = difflib.get_close_matches(wanted, by_folded, 3, 0.6)
    nearest = f"; nearest: {', '.join(by_folded[word] for word in near)}" if near else ""
    return JobError(f"the prompt has no {quote(words)}{nearest}", where=where, hint=hint)


def _describe_pieces(pieces: Sequence[str]) -> str:
    more = len(pieces) - _SHOWN_PIECES
    end = f" and {more} more" if more > 0 else ""
    return f"The pieces of the prompt: {' '.join(pieces[:_SHOWN_PIECES])}{end}"
