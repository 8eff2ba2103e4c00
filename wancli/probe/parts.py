"""The parts of a video that a probe tells apart: the inside and the outside of a rule's area, or its frames.

Letters of shapes: T Y X the latent grid. Loads without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

from wancli.errors import JobError
from wancli.injection.area import Area, compute_weights
from wancli.plan.shot import Shot

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Cells = NDArray[numpy.bool_]

By = Literal["region", "frame"]
ALL: tuple[By, ...] = get_args(By)


def check_parts(by: By, shot: Shot, method: str) -> None:
    """Raise JobError if a shot has no such parts, or if the method does not tell parts apart."""
    if method not in ("inject", "skip"):
        hint = "Use --method inject or skip, which compare velocities cell by cell."
        raise JobError(f"{method} does not tell parts of a video apart", where="--by", hint=hint)
    if by == "region" and not _areas_of(shot):
        hint = "Give the rule `region: [0.5, 0, 1, 1]`, `mask: FILE` or `frames: 0-40`, or use --by frame."
        raise JobError(f"no rule of shot {shot.id} acts in a part of the video", where="--by", hint=hint)
    if by == "frame" and shot.latent_shape[1] == 1:
        raise JobError(f"shot {shot.id} has a single frame", where="--by", hint="Use --set frames=17.")


def find_parts(by: By, shot: Shot) -> dict[str, Cells]:
    """Return by name which cells of the latent belong to each part, [T, Y, X].

    A token belongs to the inside if at least half of it lies in the first area of a rule. Latent frame 0 is
    frame 0 of the video, and each other one holds four frames.
    """
    import numpy

    _, *grid = shot.latent_shape
    if by == "frame":
        parts = {}
        for t, (start, stop) in enumerate(shot.token_grid.frame_intervals):
            cells_TYX = numpy.zeros(grid, bool)
            cells_TYX[t] = True
            parts[f"frame {start}" if stop == start + 1 else f"frames {start}-{stop - 1}"] = cells_TYX
        return parts
    weights_TYX = compute_weights(_areas_of(shot)[0], shot.token_grid)
    inside_TYX = (weights_TYX >= 0.5).repeat(2, axis=1).repeat(2, axis=2)
    parts = {"inside": inside_TYX, "outside": ~inside_TYX}
    return {name: cells_TYX for name, cells_TYX in parts.items() if cells_TYX.any()}


def _areas_of(shot: Shot) -> Sequence[Area]:
    return [rule.area for rule in shot.rules if rule.area is not None]
