"""The part of a video in which a rule acts, as one weight for each token.

The weight of a token is the share of its pixels, over its frames, that lie inside. Latent frame 0 is frame 0
of the video, and latent frame j > 0 holds frames 4j-3 to 4j. Source: the VAE of Wan.

Letters of shapes: T Y X latent frames, rows and columns of tokens; F frames of the video, P parts of an axis
between neighbouring edges. Loads without torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Weights = NDArray[numpy.float64]
    Grey = NDArray[numpy.uint8]  # [Y, X]

_DIGITS = 12  # of a weight: rounding errors are neither inside nor outside
# Greys up to the first are black, from the second on white: compression leaves noise there.
_BLACK, _WHITE = 16, 239


@dataclass(frozen=True)
class TokenGrid:
    """The tokens of a video: latent frames of `rows` x `columns` tokens."""

    latent_frames: int
    rows: int
    columns: int

    @classmethod
    def of_video(cls, width: int, height: int, frames: int, stride: int) -> TokenGrid:
        """Return the grid of a video whose latent cells are of stride x stride pixels, its tokens of 2 x 2
        cells.
        """
        return cls((frames - 1) // 4 + 1, height // stride // 2, width // stride // 2)

    @property
    def tokens(self) -> int:
        return self.latent_frames * self.rows * self.columns

    @property
    def frame_count(self) -> int:
        """The number of frames of the video."""
        return 4 * self.latent_frames - 3

    @property
    def frame_intervals(self) -> list[tuple[int, int]]:
        """The frames of the video that each latent frame holds: `(1, 5)` is frames 1 to 4."""
        return [(0, 1), *((4 * j - 3, 4 * j + 1) for j in range(1, self.latent_frames))]


@dataclass(frozen=True)
class Mask:
    """What is white in a picture or a video, as weights of the tokens of one video; `path` is its file.

    The weights are those of a picture, or of each frame. The feather of the area counts in them.
    """

    sha256: str  # of the pixels
    grid: TokenGrid
    size: tuple[int, int] = field(compare=False)  # of the file: it is stretched
    path: Path = field(compare=False)
    weights_FYX: Weights = field(compare=False, repr=False)


@dataclass(frozen=True)
class Area:
    """Some frames of a video, first and last included, and of these a region: left, top, right and bottom in
    shares of the width and the height, or what is white in a mask. None stands for all.

    The edge of a region or a mask that lies in the picture is a ramp of the width `feather`, in shares of the
    smaller side: it is averaged over a square of that width, and continues beyond the picture. Likewise the
    weight rises and falls over `fade` frames, centred on the edge of the frames.
    """

    frames: tuple[int, int] | None = None
    region: tuple[float, float, float, float] | None = None
    feather: float = 0.0
    mask: Mask | None = None
    fade: float = 0.0

    @property
    def pixel_settings(self) -> dict[str, Any]:
        """All that changes the weights, for a key: only what is used."""
        mask = None if self.mask is None else self.mask.sha256
        settings = {
            "frames": self.frames,
            "region": self.region,
            "feather": self.feather,
            "mask": mask,
            "fade": self.fade,
        }
        return {name: value for name, value in settings.items() if value}

    def is_before_or_after(self, other: Area) -> bool:
        """Return whether the two have no frame in common, nor their fades."""
        if self.frames is None or other.frames is None:
            return False
        gap = max(other.frames[0] - self.frames[1], self.frames[0] - other.frames[1]) - 1
        return gap >= (self.fade + other.fade) / 2

    def is_beside(self, other: Area) -> bool:
        """Return whether two regions have no pixel in common, nor their ramps."""
        if self.region is None or other.region is None:
            return False
        (left, top, right, bottom), (left2, top2, right2, bottom2) = self.region, other.region
        gap = max(left2 - right, left - right2, top2 - bottom, top - bottom2)
        return gap >= (self.feather + other.feather) / 2


def compute_frame_weights(area: Area, grid: TokenGrid) -> Weights:
    """Return how much of each token is in the area in each frame of the video, fp64 [F, Y, X]."""
    import numpy

    count = grid.frame_count
    first, last = area.frames or (0, count - 1)
    blur = area.feather * min(grid.rows, grid.columns)
    if area.mask is None:
        left, top, right, bottom = area.region or (0.0, 0.0, 1.0, 1.0)
        y_Y = _shares_between(_stretch((top, bottom), grid.rows), grid.rows, blur)[:, 0]
        x_X = _shares_between(_stretch((left, right), grid.columns), grid.columns, blur)[:, 0]
        weights_FYX = (y_Y[:, None] * x_X)[None]
    else:
        weights_FYX = area.mask.weights_FYX
    edges = _stretch(numpy.array((first, last + 1)) / count, count)
    inside_F = numpy.round(_shares_between(edges, count, area.fade)[:, 0], _DIGITS)
    inside_FYX: Weights = numpy.round(weights_FYX, _DIGITS) * inside_F[:, None, None]
    return inside_FYX


def average_frames(weights_FYX: Weights, grid: TokenGrid) -> Weights:
    """Return the mean over the frames of each latent frame, [T, Y, X]."""
    import numpy

    starts, stops = (numpy.array(ends) for ends in zip(*grid.frame_intervals))
    sums_TYX = numpy.add.reduceat(weights_FYX, starts, axis=0)
    mean_TYX: Weights = sums_TYX / (stops - starts)[:, None, None]
    return mean_TYX


def compute_weights(area: Area, grid: TokenGrid) -> Weights:
    """Return the weight of each token in the area, fp64 [T, Y, X]."""
    return average_frames(compute_frame_weights(area, grid), grid)


def count_tokens(area: Area, grid: TokenGrid) -> int:
    """Count the tokens that have a pixel in the area."""
    return int((compute_weights(area, grid) > 0).sum())


def average_mask(pictures: Iterable[Grey], feather: float, grid: TokenGrid) -> Weights:
    """Return how white each token of a mask is, fp64 [F, Y, X]: 0 black, 1 white.

    `pictures` are the frames of a mask or, if it is always the same, a single one: then F is 1. They are
    stretched to the size of the video. Raises ValueError if there are several, and fewer than the video has.
    """
    import numpy

    seen = [_average_picture(grey_YX, feather, grid) for grey_YX, _ in zip(pictures, range(grid.frame_count))]
    if len(seen) not in (1, grid.frame_count):
        raise ValueError(f"has {len(seen)} frames, and the video has {grid.frame_count}")
    return numpy.stack(seen)


def _average_picture(grey_YX: Grey, feather: float, grid: TokenGrid) -> Weights:
    import numpy

    white_YX = numpy.clip((grey_YX.astype(numpy.float64) - _BLACK) / (_WHITE - _BLACK), 0, 1)
    blur = feather * min(grid.rows, grid.columns)
    y_YP, x_XP = (
        _shares_between(_stretch(numpy.linspace(0, 1, pixels + 1), tokens), tokens, blur)
        for tokens, pixels in zip((grid.rows, grid.columns), grey_YX.shape)
    )
    average_YX: Weights = y_YP @ white_YX @ x_XP.T
    return average_YX


def _stretch(edges: Sequence[float] | Weights, tokens: int) -> Weights:
    """Convert edges from shares of an axis to tokens. An edge on the border of the picture is beyond it, as
    far as any blur reaches.
    """
    import numpy

    edges_P = numpy.array(edges, dtype=numpy.float64) * tokens
    edges_P[edges_P <= 0] = -2.0 * tokens
    edges_P[edges_P >= tokens] = 3.0 * tokens
    return edges_P


def _shares_between(edges_P: Weights, tokens: int, blur: float) -> Weights:
    """Return the share of each token of an axis that lies between neighbouring edges, [tokens, P-1].

    `blur` averages over an interval of that width first, which makes each edge a linear ramp. Exact: both
    averages are integrals of lines.
    """
    import numpy

    x_XP = edges_P[None, :] - numpy.arange(tokens)[:, None]
    if blur == 0:
        return numpy.diff(numpy.clip(x_XP, 0, 1), axis=1)
    x_XP = numpy.clip(x_XP, -blur / 2, 1 + blur / 2)  # what is beyond is 0 or 1 exactly
    below_XP = (_integrate_ramp(x_XP + blur / 2) - _integrate_ramp(x_XP - blur / 2)) / blur
    return numpy.diff(below_XP, axis=1)


def _integrate_ramp(x: Weights) -> Weights:
    """Return the integral of clip(x, 0, 1) from 0 to x."""
    import numpy

    integral: Weights = (numpy.maximum(x, 0) ** 2 - numpy.maximum(x - 1, 0) ** 2) / 2
    return integral
