"""`make bench`: compare wancli with diffusers, in one process, as a table in Markdown. About nine minutes.

GFLOP/s count the arithmetic of the plain network for both, even if an implementation needs less.
"""

from __future__ import annotations

import os
import time

# Large pages for tensors of many MB, for both implementations; read when torch is first imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch

from scripts.bench import dit, startup, vae
from scripts.bench.machine import Row, matmul_peak
from scripts.bench.markdown import describe_machine, table
from wancli.models.dit_layers import linear

COLUMNS = (
    "what",
    "wancli s",
    "diffusers s",
    "speed-up",
    "wancli GFLOP/s",
    "diffusers GFLOP/s",
    "wancli MiB",
    "diffusers MiB",
)


def main() -> None:
    peaks_before = measure_peaks()
    rows = [to_cells(row) for row in (*dit.rows(), *vae.rows())]
    mm, onednn = map(max, zip(peaks_before, measure_peaks()))
    print(table(COLUMNS, rows))
    print(f"- {describe_machine()}")
    print(f"- matmul of 2048 x 2048: torch.mm {mm:.0f} GFLOP/s, oneDNN {onednn:.0f} GFLOP/s")
    for what, seconds in startup.rows():
        print(f"- {what}: {seconds:.2f} s")


def measure_peaks() -> tuple[float, float]:
    """Measure GFLOP/s of a large square matmul by torch.mm and by oneDNN, the best of several runs."""
    large = torch.randn(2048, 2048), torch.randn(2048, 2048), torch.zeros(2048)
    seconds = []
    with torch.inference_mode():
        for _ in range(8):
            start = time.perf_counter()
            linear(*large)
            seconds.append(time.perf_counter() - start)
    return matmul_peak(), 2 * 2048**3 / min(seconds) / 1e9


def to_cells(row: Row) -> list[str]:
    return [
        row.what,
        f"{row.ours_s:.3f}",
        f"{row.theirs_s:.3f}",
        f"{row.speedup:.2f}x",
        f"{row.flop / row.ours_s / 1e9:.0f}",
        f"{row.flop / row.theirs_s / 1e9:.0f}",
        f"{row.ours_mib:.0f}",
        f"{row.theirs_mib:.0f}",
    ]


if __name__ == "__main__":
    main()
