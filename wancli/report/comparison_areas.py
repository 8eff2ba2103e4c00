"""The pixels of a video in which its rules act, to score them apart from the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from wancli.injection.area import Mask
from wancli.plan.areas import MaskReader
from wancli.report.recorded_mask import read_recorded_mask
from wancli.storage.injection_schema import AreaRecord
from wancli.storage.manifest_schema import Manifest

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Inside = Callable[[int], NDArray[numpy.bool_]]  # of the number of a frame, [Y, X]


def find_inside(body: Manifest | None) -> Inside | None:
    """Return which pixels lie in the area of any rule; None if a rule acts everywhere, or there is none.

    The edge of a feathered region is its middle, that of a mask the border of the tokens that are half white.
    A rule whose mask is gone or changed counts as acting everywhere.
    """
    areas = [rule.area for rule in body.injection] if body else []
    if not areas or None in areas:
        return None
    assert body
    masks, shapes = MaskReader(), []
    for area in areas:
        assert area
        mask = read_recorded_mask(area, body.shot, masks)
        if area.mask and not mask:
            return None
        shapes.append((area, mask))
    height, width = body.shot.height, body.shot.width

    def inside(frame: int) -> NDArray[numpy.bool_]:
        import numpy

        inside_YX = numpy.zeros((height, width), bool)
        for area, mask in shapes:
            if _has_frame(area, frame):
                inside_YX |= _cover(mask, frame, height, width) if mask else _span(area, height, width)
        return inside_YX

    return inside


def _span(area: AreaRecord, height: int, width: int) -> NDArray[numpy.bool_]:
    """Return which pixels lie in a region, [Y, X]."""
    import numpy

    x_X, y_Y = ((numpy.arange(count) + 0.5) / count for count in (width, height))
    left, top, right, bottom = area.region or (0, 0, 1, 1)
    return ((top <= y_Y) & (y_Y < bottom))[:, None] & (left <= x_X) & (x_X < right)


def _cover(mask: Mask, frame: int, height: int, width: int) -> NDArray[numpy.bool_]:
    """Return which pixels lie in tokens that a mask covers by half or more in a frame, [Y, X]."""

    weights_YX = mask.weights_FYX[min(frame, len(mask.weights_FYX) - 1)]
    rows, columns = weights_YX.shape
    half_YX: NDArray[numpy.bool_] = weights_YX >= 0.5
    return half_YX.repeat(height // rows, axis=0).repeat(width // columns, axis=1)


def _has_frame(area: AreaRecord, frame: int) -> bool:
    return area.frames is None or area.frames[0] <= frame <= area.frames[1]
