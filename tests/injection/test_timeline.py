"""Segments of a prompt: how much each counts in every latent frame."""

from __future__ import annotations

import math

import pytest

from wancli.injection.timeline import Segment, Timeline


def segments(*borders: int, frames: int = 81) -> tuple[Segment, ...]:
    """Segments of other prompts, that begin at 0 and at these frames."""
    starts, ends = (0, *borders), (*borders, frames)
    return tuple(Segment((a, b - 1), f"id{a}", f"text {a}") for a, b in zip(starts, ends))


def test_a_cut_mixes_only_the_latent_frame_that_has_frames_of_both() -> None:
    before, after = Timeline(segments(41), "cut").frame_weights()
    assert (before, after) == ([1.0] * 11 + [0.0] * 10, [0.0] * 11 + [1.0] * 10)
    before, after = Timeline(segments(40), "cut").frame_weights()  # latent frame 10 has frames 37 to 40
    assert (before[9:12], after[9:12]) == ([1.0, 0.75, 0.0], [0.0, 0.25, 1.0])


def test_a_crossfade_of_eight_frames_takes_two_latent_frames() -> None:
    """A line from 1 to 0 over frames 37 to 44: its mean is 3/4 over four of them, 1/4 over the others."""
    before, after = Timeline(segments(41), "crossfade", fade=8).frame_weights()
    assert before == [1.0] * 10 + [0.75, 0.25] + [0.0] * 9
    assert after == [0.0] * 10 + [0.25, 0.75] + [1.0] * 9


@pytest.mark.parametrize("fade", [1, 7, 20, 81])
def test_the_weights_of_segments_add_up_to_1(fade: int) -> None:
    """Also of segments that are shorter than the fade."""
    by_segment = Timeline(segments(3, 9, 40, 41, 77), "crossfade", fade).frame_weights()
    assert [sum(weights) for weights in zip(*by_segment)] == pytest.approx([1.0] * 21, abs=1e-11)
    assert min(map(min, by_segment)) >= 0


@pytest.mark.parametrize(
    ("frames", "length", "middle"),  # length and middle in latent frames; the middle of frame f is f
    [((0, 40), 11, 5), ((41, 80), 10, 15.5), ((0, 8), 3, 1), ((13, 13), 0.25, 3.625)],
)
def test_a_relay_adds_the_published_bias(frames: tuple[int, int], length: float, middle: float) -> None:
    """-relu(|f - mid| - w)^2 / 2s^2, w = length/2 - 2, s = 1/ln(1000). The nodes of ComfyUI take w >= 0."""
    segment = Segment(frames, "id", "text", (0, 1))
    window, sigma = max(length / 2 - 2, 0), 1 / math.log(1000)
    expected = [-(max(abs(f - middle) - window, 0) ** 2) / (2 * sigma**2) for f in range(21)]
    assert [segment.relay_bias(f) for f in range(21)] == pytest.approx(expected)
