"""The pixels of a video in which its rules act, to score them apart from the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from wancli.storage.injection_schema import AreaRecord
from wancli.storage.manifest_schema import Manifest

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Inside = Callable[[int], NDArray[numpy.bool_]]  # of the number of a frame, [Y, X]


def find_inside(body: Manifest | None) -> Inside | None:
    """Return which pixels lie in the area of any rule; None if a rule acts everywhere, or there is none.

    The edge of a feathered region is its middle. Masks are not recorded: a rule with one counts as acting
    everywhere.
    """
    areas = [rule.area for rule in body.injection] if body else []
    if not areas or any(area is None or area.mask for area in areas):
        return None
    assert body
    import numpy

    width, height = body.shot.width, body.shot.height
    x_X, y_Y = ((numpy.arange(count) + 0.5) / count for count in (width, height))

    def inside(frame: int) -> NDArray[numpy.bool_]:
        inside_YX = numpy.zeros((height, width), bool)
        for area in areas:
            assert area
            if _has_frame(area, frame):
                left, top, right, bottom = area.region or (0, 0, 1, 1)
                inside_YX |= ((top <= y_Y) & (y_Y < bottom))[:, None] & (left <= x_X) & (x_X < right)
        return inside_YX

    return inside


def _has_frame(area: AreaRecord, frame: int) -> bool:
    return area.frames is None or area.frames[0] <= frame <= area.frames[1]
