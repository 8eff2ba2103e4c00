"""Many renders in one process: 40 in CI, 200 with `make soak`. The memory stays as after the first ten."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import shutil
import sys
from pathlib import Path

import forked
from batch import job
from jobs import write_job

RENDERS, WARM = int(os.environ.get("WANCLI_SOAK", "40")), 10
SLACK = 0.05


def resident() -> int:
    """Bytes of this process in memory, after what is free was given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024


def soak(path: Path) -> list[int]:
    """Renders a batch again and again; the memory after each."""
    import torch

    from wancli.cli import run

    torch.set_num_threads(1)
    sizes = []
    for _ in range(RENDERS):
        shutil.rmtree(path.parent / "out", ignore_errors=True)
        if run(["render", str(path), "-q"]) != 0:
            raise AssertionError("a render failed")
        sizes.append(resident())
        if len(sizes) == 1:
            gc.freeze()  # what is imported by now, which no collection needs to look at again
    return sizes


def test_the_memory_after_many_renders_is_that_after_the_first_ten(one_block: Path, tmp_path: Path) -> None:
    path = write_job(tmp_path, job(one_block))
    ended = forked.run(
        path,
        program=Path(__file__).read_text(),
        env=os.environ | {"WANCLI_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        timeout=3600,
    )
    assert ended.returncode == 0, ended.stderr
    sizes = [int(size) for size in ended.stderr.split()]
    assert len(sizes) == RENDERS > WARM
    assert sizes[-1] <= (1 + SLACK) * sizes[WARM - 1], [size // 10**6 for size in sizes[WARM - 1 :: 10]]


if __name__ == "__main__":
    sys.stderr.write(" ".join(map(str, soak(Path(sys.argv[1])))))
