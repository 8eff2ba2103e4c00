"""Lines of text in pictures."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from wancli.video import labels
from wancli.video.labels import INK, LINE_HEIGHT, PAPER, draw_line, shorten_end, shorten_middle


def ink_columns(strip: np.ndarray) -> int:
    """The column after the last one with ink."""
    return int(np.nonzero((strip[..., 0] < PAPER).any(axis=0))[0].max()) + 1


@pytest.mark.parametrize("scale", [1, 2])
def test_a_line_has_the_letters_of_the_font_and_nothing_is_cut_above_or_below(scale: int) -> None:
    strip = draw_line("Wbdl gjpqy (W)", 200 * scale, scale)
    assert strip.shape == (LINE_HEIGHT * scale, 200 * scale, 3)
    font = ImageFont.load_default(13 * scale)
    tall = Image.new("L", (200 * scale, 60), PAPER)
    ImageDraw.Draw(tall).text((0, 0), "Wbdl gjpqy (W)", fill=INK, font=font)
    wanted = np.asarray(tall)
    assert (strip[..., 0] == wanted[: LINE_HEIGHT * scale]).all()
    assert (wanted[LINE_HEIGHT * scale :] == PAPER).all()


def test_a_text_is_shortened_to_the_columns_that_it_fills() -> None:
    long = "storm-seed1-late-strength0.3" * 5
    for width in (30, 80, 160, 500):
        for shorten in (shorten_end, shorten_middle):
            text = shorten(long, width)
            assert "..." in text
            assert width - 12 <= ink_columns(draw_line(text, 2 * width)) <= width
    assert shorten_end(long, 160).startswith("storm-seed1")
    assert shorten_middle(long, 160).startswith("storm-")
    assert shorten_middle(long, 160).endswith("0.3")
    assert shorten_end("cat", 100) == shorten_middle("cat", 100) == "cat"
    assert shorten_end("cat", 0) == "..."


def test_lines_breaks_and_unknown_letters_are_drawn_somehow() -> None:
    for text in ("", "a\nb", "a\0b", "中文字", "x" * 100_000):
        assert draw_line(shorten_end(text, 160), 160).shape == (LINE_HEIGHT, 160, 3)


def test_letters_that_no_font_has_become_plain_letters_and_question_marks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(labels, "_system_fonts", lambda scale: ())
    assert (draw_line("ǆ ṩ 猫 b", 80) == draw_line("dz s ? b", 80)).all()


def test_a_font_of_the_system_draws_letters_that_the_built_in_font_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not labels._system_fonts(1):
        pytest.skip("this system has none of the known fonts")
    for scale in (1, 2):
        for font in labels._system_fonts(scale):
            _, top, _, bottom = font.getbbox("ÄÉ gjpqy (W)")
            assert 0 <= top < bottom <= LINE_HEIGHT * scale
    text = "кошка"
    drawn = draw_line(text, 80)
    monkeypatch.setattr(labels, "_system_fonts", lambda scale: ())
    assert not (drawn == draw_line(text, 80)).all()
    assert (draw_line(text, 80) == draw_line("?????", 80)).all()
