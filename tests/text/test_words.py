"""Words among tokens. The pieces are those of google/umt5-xxl, written down, and of wan-mini."""

from __future__ import annotations

import pytest

from wancli import wan_mini
from wancli.errors import JobError
from wancli.text.tokenizer import Tokenizer, Tokens, clean
from wancli.text.words import find_rows

# As the vocabulary of google/umt5-xxl splits them, spaces between pieces.
UMT5 = {
    "A red circle drifts, over fog.": "▁A ▁red ▁circle ▁drifts , ▁over ▁fog .",
    "a (word:1.3) red-circled CIRCLE's. It's": "▁a ▁( word : 1 . 3 ) ▁red - circle d ▁CIR CLE ' s . ▁It ' s",
    "一只红色的圆圈在雾中漂浮": "▁ 一 只 红 色 的 圆 圈 在 雾 中 漂 浮",
    "质感,最差质量,低质量": "▁ 质 感 , 最 差 质量 , 低 质量",
    "Straße Ümlaut naïve": "▁Straße ▁Üm laut ▁na ï ve",
    "ไทยภาษา": "▁ ไทย ภาษา",
    "an 𒀀 𒀁 glyph": "▁an ▁ <0xF0> <0x92> <0x80> <0x80> ▁ <0xF0> <0x92> <0x80> <0x81> ▁gly ph",
    "red circle and red square, Red Circle": "▁red ▁circle ▁and ▁red ▁square , ▁Red ▁Circle",
    "colored redness": "▁ colored ▁red ness",
}


def tokens(text: str, kept: int | None = None) -> Tokens:
    """The tokens of a text above, of which truncation keeps so many pieces."""
    pieces = UMT5[text].split(" ")
    kept = len(pieces) if kept is None else kept
    shown = (*pieces[:kept], "</s>")
    return Tokens(clean(text), tuple(range(len(shown))), shown, 256, len(pieces) + 1)


@pytest.mark.parametrize(
    ("text", "words", "rows"),
    [
        ("A red circle drifts, over fog.", "red circle", (1, 2)),
        ("A red circle drifts, over fog.", "RED  Circle", (1, 2)),
        ("A red circle drifts, over fog.", "drifts", (3,)),
        ("A red circle drifts, over fog.", "drifts,", (3, 4)),
        ("A red circle drifts, over fog.", "a", (0,)),
        ("a (word:1.3) red-circled CIRCLE's. It's", "word", (2,)),
        ("a (word:1.3) red-circled CIRCLE's. It's", "red", (8,)),
        ("a (word:1.3) red-circled CIRCLE's. It's", "circled", (10, 11)),
        ("a (word:1.3) red-circled CIRCLE's. It's", "circle", (12, 13)),
        ("a (word:1.3) red-circled CIRCLE's. It's", "it's", (17, 18, 19)),
        ("a (word:1.3) red-circled CIRCLE's. It's", "it\u2019s", (17, 18, 19)),
        ("一只红色的圆圈在雾中漂浮", "红色", (3, 4)),
        ("一只红色的圆圈在雾中漂浮", "雾", (9,)),
        ("质感,最差质量,低质量", "质量", (6, 9)),
        ("质感,最差质量,低质量", "质", (1,)),
        ("Straße Ümlaut naïve", "STRASSE", (0,)),
        ("Straße Ümlaut naïve", "naïve", (3, 4, 5)),
        ("ไทยภาษา", "ภาษา", (2,)),
        ("an 𒀀 𒀁 glyph", "𒀁", (7, 8, 9, 10)),
        ("an 𒀀 𒀁 glyph", "glyph", (11, 12)),
        ("red circle and red square, Red Circle", "red circle", (0, 1, 6, 7)),
        ("red circle and red square, Red Circle", "red", (0, 3, 6)),
        ("colored redness", "redness", (2, 3)),
    ],
)
def test_words_are_the_rows_of_their_pieces(text: str, words: str, rows: tuple[int, ...]):
    assert find_rows(tokens(text), words) == rows


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("A red circle drifts, over fog.", "circel", "the prompt has no 'circel'; nearest: circle"),
        ("A red circle drifts, over fog.", "red fog", "the prompt has no 'red fog'"),
        ("A red circle drifts, over fog.", " ", "names no word"),
        ("colored redness", "red", "the prompt has no 'red'; nearest: redness"),
        ("质感,最差质量,低质量", "量", "'量' shares the piece 质量 with other letters"),
    ],
)
def test_words_without_rows_are_refused_with_the_pieces(text: str, words: str, message: str):
    with pytest.raises(JobError) as caught:
        find_rows(tokens(text), words, "job.yaml:3")
    assert str(caught.value).startswith(f"job.yaml:3: {message}")
    assert caught.value.hint == f"The pieces of the prompt: {UMT5[text]}"


def test_a_word_that_was_cut_off_is_named_as_such():
    text = "A red circle drifts, over fog."
    with pytest.raises(JobError, match=r"'fog' is not read, it is cut off: .* 9 tokens, 6 are kept"):
        find_rows(tokens(text, kept=5), "fog")
    assert find_rows(tokens(text, kept=5), "drifts") == (3,)


def test_the_rest_of_a_word_that_was_cut_in_two_is_no_word():
    text = "a (word:1.3) red-circled CIRCLE's. It's"
    with pytest.raises(JobError, match="'circled' is not read, it is cut off"):
        find_rows(tokens(text, kept=11), "circled")
    with pytest.raises(JobError, match="'circle' is not read, it is cut off"):
        find_rows(tokens(text, kept=11), "circle")


def test_many_pieces_are_counted_in_the_message():
    tokenizer = Tokenizer(wan_mini.FOLDER / "google" / "umt5-xxl" / "spiece.model")
    with pytest.raises(JobError) as caught:
        find_rows(tokenizer.tokenize("red " * 90, 256), "blue")
    assert caught.value.hint.endswith("▁red and 30 more")


def test_the_words_of_wan_mini_are_found_and_unknown_ones_named():
    tokenizer = Tokenizer(wan_mini.FOLDER / "google" / "umt5-xxl" / "spiece.model")
    found = tokenizer.tokenize("a red circle moves right on a white background", 256)
    assert [found.pieces[row] for row in find_rows(found, "white background")] == ["▁white", "▁background"]
    unknown = tokenizer.tokenize("a red circle 红 moves right", 256)
    with pytest.raises(JobError, match="the tokenizer does not know '红'"):
        find_rows(unknown, "红")
