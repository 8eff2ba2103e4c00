"""How the layers of the VAE cut a frame into slices of rows on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

SLICE_VALUES = 2**19  # values of a row slice: a frame is processed in slices that stay in the cache
MIN_SLICE_ROWS = 16  # of a slice, because each slice also reads one row above and one below


def row_slices(height: int, width: int, channels: int) -> Iterator[tuple[int, int]]:
    """Yield the first row and the row after the last of each slice, from the top."""
    step = max(MIN_SLICE_ROWS, SLICE_VALUES // (width * channels))
    for top in range(0, height, step):
        yield top, min(top + step, height)
