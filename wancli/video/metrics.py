"""Measure how two videos differ (PSNR, SSIM, motion, a heat-map), and the distance of two latents.

Frames come one by one, so that the length of a video costs no memory. Letters: Y rows, X columns, 3 colours.
A picture is uint8 [Y, X, 3]; its luma is 0.2126 R + 0.7152 G + 0.0722 B (BT.709), 0..255, in fp32.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wancli.storage.manifest_schema import SKETCH_SIZE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Picture = NDArray[np.uint8]

PEAK = 255.0
WINDOW, SIGMA = 11, 1.5  # SSIM's Gaussian
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
HEATMAP_WIDTH = 32


@dataclass(frozen=True)
class FrameMetrics:
    """How a video differs from another.

    `frames` is the number of compared frames, `psnr` in dB (None if all are identical), `ssim` the mean (None
    for pictures smaller than its window), and the heat-map holds differences in 0..1. `psnr_inside` and
    `psnr_outside` are those of an area (None if nothing differs there, or if there is none).
    """

    frames: int
    identical: bool
    psnr: float | None
    ssim: float | None
    heatmap_YX: Floats
    psnr_inside: float | None = None
    psnr_outside: float | None = None


class SquaredErrors:
    """Adds up squared differences of luma, for PSNR."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._count = 0

    def add(self, squares: Floats) -> None:
        self._sum += float(squares.sum(dtype="float64"))
        self._count += squares.size

    @property
    def psnr(self) -> float | None:
        """In dB; None without any difference."""
        return 10 * math.log10(PEAK**2 * self._count / self._sum) if self._sum else None


def compare_frames(
    pairs: Iterable[tuple[Picture, Picture]], inside: Callable[[int], NDArray[np.bool_]] | None = None
) -> FrameMetrics:
    """Compare the frames of two videos of one size, pair by pair; at least one pair.

    PSNR is that of the mean squared error of luma over all frames, as ffmpeg's `average`. SSIM is that of
    luma (Wang et al. 2004) over all pixels, averaged over the frames. The heat-map is the mean over time and
    colours of |difference| / 255, averaged to at most 32 columns. `inside` returns by the number of a frame
    which pixels are in the area [Y, X].
    """
    import numpy as np

    count, ssim_sum, identical = 0, 0.0, True
    everywhere, in_area, around = SquaredErrors(), SquaredErrors(), SquaredErrors()
    apart_YX: Floats | None = None
    for a_YX3, b_YX3 in pairs:
        a_YX, b_YX = to_luma(a_YX3), to_luma(b_YX3)
        apart_YX3 = np.maximum(a_YX3, b_YX3) - np.minimum(a_YX3, b_YX3)
        frame_YX = average_cells(apart_YX3.mean(axis=2, dtype=np.float32) / np.float32(PEAK), HEATMAP_WIDTH)
        apart_YX = frame_YX if apart_YX is None else apart_YX + frame_YX
        identical = identical and np.array_equal(a_YX3, b_YX3)
        squares_YX = np.square(a_YX - b_YX)
        everywhere.add(squares_YX)
        if inside:
            inside_YX = inside(count)
            in_area.add(squares_YX[inside_YX])
            around.add(squares_YX[~inside_YX])
        ssim_sum += ssim(a_YX, b_YX) if min(a_YX.shape) >= WINDOW else math.nan
        count += 1
    if apart_YX is None:
        raise ValueError("no frames to compare")
    return FrameMetrics(
        count,
        identical,
        everywhere.psnr,
        None if math.isnan(ssim_sum) else ssim_sum / count,
        apart_YX / np.float32(count),
        in_area.psnr,
        around.psnr,
    )


def measure_motion(frames: Iterable[Picture]) -> float | None:
    """Return the mean |change of luma| from a frame to the next, 0..1; None for a single frame."""
    meter = MotionMeter()
    for _ in meter.watch(frames):
        pass
    return meter.mean


class MotionMeter:
    """Measures the motion of frames that pass by, for whoever needs them for something else, too."""

    def __init__(self) -> None:
        self._changes: list[float] = []

    def watch(self, frames: Iterable[Picture]) -> Iterator[Picture]:
        import numpy as np

        last_YX: Floats | None = None
        for frame_YX3 in frames:
            now_YX = to_luma(frame_YX3)
            if last_YX is not None:
                self._changes.append(float(np.abs(now_YX - last_YX).mean(dtype=np.float64)) / PEAK)
            last_YX = now_YX
            yield frame_YX3

    @property
    def mean(self) -> float | None:
        """The mean |change of luma| from a frame to the next, 0..1; None for a single frame."""
        return sum(self._changes) / len(self._changes) if self._changes else None


def to_luma(picture_YX3: Picture) -> Floats:
    """Return the luma of a picture, 0..255."""
    import numpy as np

    return (picture_YX3 @ np.array([0.2126, 0.7152, 0.0722], np.float32)).astype(np.float32, copy=False)


def ssim(a_YX: Floats, b_YX: Floats) -> float:
    """Return the mean structural similarity of two pictures, https://doi.org/10.1109/TIP.2003.819861.

    The Gaussian window is 11 x 11 with sigma 1.5; it counts only if it lies within the picture.
    """
    import numpy as np

    # about 128, where fp32 loses less of the squares
    a_YX, b_YX = a_YX - np.float32(128), b_YX - np.float32(128)
    mean_a, mean_b = _blur(a_YX), _blur(b_YX)
    both = mean_a * mean_b
    squared = np.square(mean_a) + np.square(mean_b)
    variances = _blur(np.square(a_YX) + np.square(b_YX)) - squared
    covariance = _blur(a_YX * b_YX) - both
    shift = 128 * (mean_a + mean_b) + 128.0**2
    light = (2 * (both + shift) + C1) / (squared + 2 * shift + C1)
    return float((light * ((2 * covariance + C2) / (variances + C2))).mean(dtype=np.float64))


def _blur(x_YX: Floats) -> Floats:
    """Blur by the Gaussian, first the columns, then the rows; leave out pixels whose window is not full."""
    import numpy as np

    middle = WINDOW // 2
    kernel = np.exp(-np.square(np.arange(WINDOW) - middle) / (2 * SIGMA**2))
    kernel = (kernel / kernel.sum()).astype(np.float32)
    for _ in range(2):
        rows = len(x_YX) - WINDOW + 1
        blurred = kernel[middle] * x_YX[middle : middle + rows]
        for tap in range(middle):
            blurred += kernel[tap] * (x_YX[tap : tap + rows] + x_YX[WINDOW - 1 - tap :][:rows])
        x_YX = blurred.T
    return x_YX


def average_cells(map_YX: Floats, width: int) -> Floats:
    """Average squares so that at most `width` columns remain; squares at the ends may be cut."""
    import numpy as np

    step = -(-map_YX.shape[1] // width)
    rows, columns = (np.arange(0, length, step) for length in map_YX.shape)
    sums = np.add.reduceat(np.add.reduceat(map_YX, rows, axis=0), columns, axis=1)
    heights, widths = (np.diff([*starts, length]) for starts, length in zip((rows, columns), map_YX.shape))
    means_YX: Floats = (sums / np.outer(heights, widths)).astype(np.float32)
    return means_YX


def sketch_latent(z: Floats) -> dict[str, Any]:
    """Summarise a latent for its manifest, so that distances can be estimated after the latent is deleted.

    The sketch is its shape, its norm, and 251 sums of its elements with random signs (Johnson and
    Lindenstrauss).
    """
    import numpy as np

    norm = float(np.linalg.norm(z.astype(np.float64)))
    # RandomState, which numpy has promised never to change
    signs = np.unpackbits(np.frombuffer(np.random.RandomState(0).bytes(-(-z.size // 8)), np.uint8))
    signed = np.where(signs[: z.size], z.ravel(), -z.ravel())
    sums = np.pad(signed, (0, -z.size % SKETCH_SIZE)).reshape(-1, SKETCH_SIZE).sum(axis=0, dtype=np.float64)
    text = base64.b64encode(sums.astype("<f4").tobytes()).decode()
    return {"shape": [*z.shape], "norm": norm, "sketch": text}


def relative_distance(z: Floats, baseline: Floats) -> float | None:
    """Return |z - baseline| / |baseline|; None if the baseline is zero."""
    import numpy as np

    norm = float(np.linalg.norm(baseline.astype(np.float64)))
    return float(np.linalg.norm(z.astype(np.float64) - baseline)) / norm if norm else None


def sketched_relative_distance(latent: Mapping[str, Any], baseline: Mapping[str, Any]) -> float | None:
    """Estimate that distance from two sketches of one shape, to 4.5 % of itself (one standard deviation)."""
    import numpy as np

    a, b = (
        np.frombuffer(base64.b64decode(of["sketch"]), "<f4").astype(np.float64) for of in (latent, baseline)
    )
    return float(np.linalg.norm(a - b)) / baseline["norm"] if baseline["norm"] else None
