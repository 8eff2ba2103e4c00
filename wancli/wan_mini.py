"""Locate wan-mini, the model inside the package, and describe which prompts it knows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

NAME = "wan-mini"
FOLDER = Path(__file__).parent / "assets" / NAME
SUBJECTS_HINT = (
    "wan-mini knows a red, green, blue or yellow circle, square or triangle that moves left, right, up "
    "or down on a white, black, grey or striped background. Other prompts need another `model`."
)
DIFFERENCES_HINT = (
    "This is the distance for wan-mini, whose encoder knows only its own small world. For the distance in a "
    "full Wan model, use its own UMT5: --model DIR."
)


def find_unknown_words(pieces: Sequence[str]) -> list[str]:
    """Return the words of a prompt that wan-mini was not trained on.

    Its tokenizer has one piece for each word it knows, and spells all others.
    """
    words: list[list[str]] = []
    for piece in pieces[:-1]:  # the last is </s>
        if piece.startswith("▁") or not words:
            words.append([])
        words[-1].append(piece.removeprefix("▁"))
    spelled = [word for word in words if any(part.isalnum() and (len(part) == 1) for part in word[1:])]
    return list(dict.fromkeys("".join(word).replace("<unk>", "").strip(".,:;!?'-") for word in spelled))
