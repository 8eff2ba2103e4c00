"""What changed between two videos: colour, background, motion or structure, each from 0 to 1.

Frames come one by one. Pictures are uint8 [Y, X, 3]; T frames, Y rows, X columns, 3 colours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from wancli.video.metrics import PEAK, WINDOW, MotionMeter, ssim, to_luma

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Picture = NDArray[np.uint8]

KINDS = ("colour", "background", "motion", "structure")
_STILL = 8  # levels of luma that a pixel of the background changes at most, over all frames


def measure_kinds(
    read_plain: Callable[[], Iterable[Picture]], read_other: Callable[[], Iterable[Picture]]
) -> dict[str, float]:
    """Measure how a video of as many frames and pixels differs from the plain one, by KINDS.

    Colour: |difference| of the mean colour of a frame. Background: |difference| of pixels that stay as they
    are in the plain video, 0 if none does. Motion: |difference| of the mean change of luma from a frame to
    the next, 0 for a single frame. Structure: 1 - SSIM of luma, 0 for pictures smaller than its window.
    """
    import numpy as np

    still_YX = _find_still(read_plain())
    plain_motion, other_motion = MotionMeter(), MotionMeter()
    pairs: Iterator[tuple[Picture, Picture]] = zip(
        plain_motion.watch(read_plain()), other_motion.watch(read_other()), strict=True
    )
    rows = []
    for plain_YX3, other_YX3 in pairs:
        difference_YX3 = other_YX3.astype(np.float32) - plain_YX3
        colour = float(np.abs(difference_YX3.mean(axis=(0, 1))).mean()) / PEAK
        behind_N3 = difference_YX3[still_YX]
        background = float(np.abs(behind_N3).mean()) / PEAK if behind_N3.size else 0.0
        a_YX, b_YX = to_luma(plain_YX3), to_luma(other_YX3)
        structure = max(0.0, 1 - ssim(a_YX, b_YX)) if min(a_YX.shape) >= WINDOW else 0.0
        rows.append((colour, background, structure))
    colour, background, structure = (float(value) for value in np.mean(rows, axis=0))
    motion = abs((other_motion.mean or 0.0) - (plain_motion.mean or 0.0))
    return dict(zip(KINDS, (colour, background, motion, structure)))


def _find_still(frames: Iterable[Picture]) -> NDArray[np.bool_]:
    """Return the pixels [Y, X] that hardly change over the frames."""
    import numpy as np

    low_YX = high_YX = None
    for frame_YX3 in frames:
        luma_YX = to_luma(frame_YX3)
        low_YX = luma_YX if low_YX is None else np.minimum(low_YX, luma_YX)
        high_YX = luma_YX if high_YX is None else np.maximum(high_YX, luma_YX)
    assert low_YX is not None
    assert high_YX is not None
    still_YX: NDArray[np.bool_] = high_YX - low_YX <= _STILL
    return still_YX
