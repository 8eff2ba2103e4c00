from __future__ import annotations

import numpy
import pytest

from wancli.injection.area import Area, TokenGrid, compute_weights

SIZE = 16  # pixels of a token


@pytest.mark.parametrize(
    ("frames", "box"),  # pixels: left, top, right, bottom
    [
        ((0, 12), (0, 0, 64, 48)),
        ((3, 9), (7, 5, 40, 48)),
        ((0, 0), (16, 16, 32, 32)),
        ((12, 12), (63, 0, 64, 1)),
    ],
)
def test_the_weight_of_a_token_is_the_share_of_its_pixels_inside(
    frames: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    left, top, right, bottom = box
    pixels = numpy.zeros((13, 48, 64))
    pixels[frames[0] : frames[1] + 1, top:bottom, left:right] = 1
    latent = [pixels[:1], *(pixels[i : i + 4] for i in range(1, 13, 4))]
    counted = [part.reshape(len(part), 3, SIZE, 4, SIZE).mean((0, 2, 4)) for part in latent]
    area = Area(frames, (left / 64, top / 48, right / 64, bottom / 48))
    numpy.testing.assert_allclose(compute_weights(area, TokenGrid(4, 3, 4)), counted, atol=1e-12)


def test_an_area_without_limits_holds_every_token() -> None:
    assert (compute_weights(Area(), TokenGrid(3, 2, 5)) == 1.0).all()


@pytest.mark.parametrize(("frames", "fade"), [((5, 12), 4.0), ((0, 4), 3.0), ((5, 8), 9.0), ((3, 6), 1.0)])
def test_a_fade_is_a_line_over_its_frames_centred_on_each_edge_that_lies_in_the_video(
    frames: tuple[int, int], fade: float
) -> None:
    """Its mean over a token's frames, by 1000 points in each frame."""
    time_FP = numpy.arange(13)[:, None] + (numpy.arange(1000) + 0.5) / 1000
    rise, fall = (numpy.clip((time_FP - edge) / fade + 0.5, 0, 1) for edge in (frames[0], frames[1] + 1))
    inside_FP = (1.0 if frames[0] == 0 else rise) - (0.0 if frames[1] == 12 else fall)
    counted = [part.mean() for part in numpy.split(inside_FP, [1, 5, 9])]
    weights_TYX = compute_weights(Area(frames, fade=fade), TokenGrid(4, 1, 2))
    numpy.testing.assert_allclose(weights_TYX[:, 0, 1], counted, atol=1e-6)
