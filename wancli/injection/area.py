"""The part of a video in which a rule acts, as one weight for each token.

The weight of a token is the share of its pixels, over its frames, that lie inside. Latent frame 0 is frame 0
of the video, and latent frame j > 0 holds frames 4j-3 to 4j. Source: the VAE of Wan.

Letters of shapes: T Y X latent frames, rows and columns of tokens. Loads without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

Interval = tuple[float, float]


@dataclass(frozen=True)
class Area:
    """Some frames of a video, first and last included, and of these a region: left, top, right and bottom in
    shares of the width and the height. None stands for all.
    """

    frames: tuple[int, int] | None = None
    region: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class TokenGrid:
    """The tokens of a video: latent frames of `rows` x `columns` tokens."""

    latent_frames: int
    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        return self.latent_frames * self.rows * self.columns

    @property
    def frame_intervals(self) -> list[Interval]:
        """The frames of the video that each latent frame holds: `(1, 5)` is frames 1 to 4."""
        return [(0, 1), *((4 * j - 3, 4 * j + 1) for j in range(1, self.latent_frames))]


def compute_weights(area: Area, grid: TokenGrid) -> numpy.ndarray:
    """Return the weight of each token in the area, fp64 [T, Y, X]."""
    import numpy

    first, last = area.frames or (0, 4 * grid.latent_frames)
    left, top, right, bottom = area.region or (0.0, 0.0, 1.0, 1.0)
    by_axis = (
        _shares_inside((first, last + 1), grid.frame_intervals),
        _shares_inside((top * grid.rows, bottom * grid.rows), _unit_intervals(grid.rows)),
        _shares_inside((left * grid.columns, right * grid.columns), _unit_intervals(grid.columns)),
    )
    t_T, y_Y, x_X = (numpy.array(shares) for shares in by_axis)
    weights_TYX: numpy.ndarray = t_T[:, None, None] * y_Y[:, None] * x_X
    return weights_TYX


def _unit_intervals(count: int) -> list[Interval]:
    return [(i, i + 1) for i in range(count)]


def _shares_inside(inside: Interval, intervals: Sequence[Interval]) -> list[float]:
    """Return the share of each interval that lies inside another one."""
    start, stop = inside
    return [max(0.0, min(stop, b) - max(start, a)) / (b - a) for a, b in intervals]
