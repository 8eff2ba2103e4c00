"""What the weights of a cell are for each token, as arrays.

Letters of shapes: L tokens, F frames of the video, Y X rows and columns of tokens. Loads without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wancli.injection.area import Area, TokenGrid, average_frames, compute_frame_weights
from wancli.injection.exprs import AreaWeight, Cell, Expr, Nag, Weight

if TYPE_CHECKING:
    from wancli.injection.area import Weights


def group_by_expr(cell: Cell) -> dict[Expr | Nag, tuple[Weight, ...]]:
    """Return all weights of each expr: inside and outside of areas it may have several."""
    by_expr: dict[Expr | Nag, tuple[Weight, ...]] = {}
    for expr, weight in cell:
        by_expr[expr] = (*by_expr.get(expr, ()), weight)
    return by_expr


class TokenSums:
    """Sums of weights for each token of a video. Areas and sums are computed once."""

    def __init__(self, grid: TokenGrid) -> None:
        self.grid = grid
        self._areas: dict[Area, Weights] = {}
        self._sums: dict[tuple[Weight, ...], Weights] = {}

    def sum(self, weights: tuple[Weight, ...]) -> Weights:
        """Return the sum of weights for each token, fp64 [L].

        Weights are multiplied frame by frame: areas that follow each other within a latent frame share it.
        """
        import numpy

        if weights not in self._sums:
            shape = (self.grid.frame_count, self.grid.rows, self.grid.columns)
            total_FYX = numpy.zeros(shape)
            for weight in weights:
                total_FYX += self._frame_weights(weight)
            self._sums[weights] = average_frames(total_FYX, self.grid).ravel()
        return self._sums[weights]

    def share_read(self, weights: tuple[Weight, ...]) -> float:
        """Return the share of the tokens for which the sum is not 0."""
        if not any(isinstance(weight, AreaWeight) for weight in weights):
            return 1.0
        import numpy

        return int(numpy.count_nonzero(self.sum(weights))) / self.grid.tokens

    def _frame_weights(self, weight: Weight) -> Weights | float:
        if not isinstance(weight, AreaWeight):
            return weight
        product_FYX: Weights | float = weight.factor
        for area in weight.inside:
            product_FYX = product_FYX * self._area(area)
        for area in weight.outside:
            product_FYX = product_FYX * (1 - self._area(area))
        return product_FYX

    def _area(self, area: Area) -> Weights:
        if area not in self._areas:
            self._areas[area] = compute_frame_weights(area, self.grid)
        return self._areas[area]
