"""The area of a rule as `wancli plan -v` draws it: its frames as a strip, its region as a small picture."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from wancli.injection.area import Area, TokenGrid, compute_weights
from wancli.progress import make_printable
from wancli.report.terminal import draw_bar
from wancli.units import format_ranges
from wancli.video.metrics import average_cells

if TYPE_CHECKING:
    from wancli.injection.area import Weights

STRIP_WIDTH, PICTURE_WIDTH = 60, 24  # columns
SHADES = "·░▒▓█"


def describe_area(area: Area, grid: TokenGrid) -> str:
    """Describe an area: `frames 8-12, region [0.5, 0, 1, 1], feather 0.1: 280 of 560 tokens`."""
    weights_TYX = compute_weights(area, grid)
    parts = []
    if area.frames:
        parts.append(f"frames {format_ranges(range(area.frames[0], area.frames[1] + 1))}")
    if area.region:
        parts.append(f"region [{', '.join(f'{side:g}' for side in area.region)}]")
    if area.mask:
        width, height = area.mask.size
        parts.append(f"mask {make_printable(area.mask.path.name)} of {width}x{height}, stretched")
    if area.feather:
        parts.append(f"feather {area.feather:g}")
    return f"{', '.join(parts)}: {int((weights_TYX > 0).sum()):,} of {grid.tokens:,} tokens"


def draw_area(area: Area, grid: TokenGrid) -> Iterator[tuple[str, str]]:
    """Yield lines, each with its title: the latent frames as a strip, and where they differ over the picture
    the mean of those that have any.
    """
    weights_TYX = compute_weights(area, grid)
    peak = weights_TYX.max()
    by_frame_T = weights_TYX.max(axis=(1, 2)) / peak
    if by_frame_T.min() < 1:
        yield "latent frames", draw_bar(average_cells(by_frame_T[None], STRIP_WIDTH)[0])
    if area.region or area.mask:
        mean_YX = weights_TYX[by_frame_T > 0].mean(axis=0)
        for number, line in enumerate(draw_picture(mean_YX / mean_YX.max())):
            yield "" if number else "region", line


def draw_picture(shares_YX: Weights) -> Iterator[str]:
    """Draw shares, 0 to 1, as lines of shades. A character is twice as high as wide."""
    rows, columns = shares_YX.shape
    width = min(PICTURE_WIDTH, 2 * columns)
    lines = max(1, round(width * rows / columns / 2))
    for band_YX in (shares_YX[part] for part in _split(rows, lines)):
        cells = [float(band_YX[:, part].mean()) for part in _split(columns, width)]
        yield "".join(SHADES[0 if cell == 0 else max(1, round(cell * 4))] for cell in cells)


def _split(length: int, parts: int) -> list[slice]:
    """Divide an axis into parts; if it is shorter, several parts are the same."""
    starts = [i * length // parts for i in range(parts + 1)]
    return [slice(start, max(start + 1, stop)) for start, stop in pairwise(starts)]
