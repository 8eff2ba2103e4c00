"""Measure from process start to the first block, prompt cached: wancli and diffusers on the same file.

    python -m scripts.bench.first_block [--dir DIR] [--rounds N]

Each runs one forward of 1.3B on one frame of 256x256, imports counted, in alternation. Peaks are those of
the processes, up to the end of that forward. diffusers maps the file, which is its default.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.bench.markdown import describe_machine, table
from scripts.bench.process import WANCLI, run_python

PAIRS = (("fp32", "float32"), ("bf16", "float32"))  # of the file, of the run
SHORT = {"float32": "fp32", "bfloat16": "bf16"}
JOB = """\
model:
  transformer: {folder}/transformer
  text_encoder: {folder}/small/models_t5_umt5-xxl-enc-bf16.safetensors
  tokenizer: {folder}/small/google/umt5-xxl/spiece.model
  vae: {folder}/small/Wan2.1_VAE.pth
output: {folder}/out.mp4
prompt: A gray tabby cat walks through a sunlit garden.
size: 256x256
frames: 1
sampler: {{steps: 4, guidance: 1}}
memory: {{device: cpu, dtype: {dtype}, residency: resident}}
"""
COLUMNS = (
    *("file, run, program", "first block begins s", "first block done s", "all blocks done s"),
    *("peak GiB", "of the weights"),
)


@dataclass(frozen=True)
class Start:
    """Seconds from launch to begin and end of the first block and to the end of the last; peak in bytes."""

    begins: float
    ends: float
    all_end: float
    peak: int


def measure_start(who: str, folder: Path, dtype: str) -> Start:
    """Run one process, `ours` or `theirs`."""
    arguments = ["-m", "scripts.bench.first_block_process", who, str(folder), dtype]
    process = run_python([*arguments, repr(time.time())], {"WANCLI_CACHE": str(folder / "cache")})
    begins, ends, all_end = json.loads(process.stdout)
    return Start(begins, ends, all_end, process.peak)


def median(starts: Sequence[Start]) -> Start:
    """Return the median of each time, and the largest peak."""
    begins, ends, all_end = (
        statistics.median(getattr(start, figure) for start in starts)
        for figure in ("begins", "ends", "all_end")
    )
    return Start(begins, ends, all_end, max(start.peak for start in starts))


def cells(what: str, start: Start, weights: int) -> list[str]:
    seconds = (f"{figure:.2f}" for figure in (start.begins, start.ends, start.all_end))
    return [what, *seconds, f"{start.peak / 2**30:.2f}", f"{start.peak / weights:.2f}x"]


def rows(folder: Path, model: str, stored: str, dtype: str, rounds: int) -> list[list[str]]:
    """Measure the first run of wancli, which hashes the files; then medians of both, in alternation."""
    if not folder.exists():
        run_python(["-m", "scripts.bench.first_block_process", "make", str(folder), model, stored])
    (folder / f"{dtype}.yaml").write_text(JOB.format(folder=folder, dtype=SHORT[dtype]))
    cached = {"WANCLI_CACHE": str(folder / "cache")}
    run_python([*WANCLI, "encode", str(folder / f"{dtype}.yaml"), "-q"], cached)
    measure_start("theirs", folder, dtype)  # from here on the files are in the page cache
    (folder / "cache" / "hashes.json").unlink()
    first = measure_start("ours", folder, dtype)
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(measure_start("ours", folder, dtype))
        theirs.append(measure_start("theirs", folder, dtype))
    weights = sum(path.stat().st_size for path in (folder / "transformer").glob("*.safetensors"))
    weights = weights * (2 if (stored, dtype) == ("bf16", "float32") else 1)
    a, b = median(ours), median(theirs)
    what = f"{stored}, {SHORT[dtype]}"
    return [
        cells(f"{what}, wancli", a, weights),
        cells(f"{what}, wancli, files not hashed yet", first, weights),
        cells(f"{what}, diffusers", b, weights),
        [f"{what}, speed-up", *(f"{b_s / a_s:.1f}x" for a_s, b_s in zip(_seconds(a), _seconds(b))), "", ""],
    ]


def _seconds(start: Start) -> tuple[float, float, float]:
    return start.begins, start.ends, start.all_end


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="From process start to the first block running.")
    parser.add_argument("--dir", type=Path, help="folder of the checkpoints; missing ones are made")
    parser.add_argument("--model", default="1.3B", help="as for make_random_checkpoint.py")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    all_rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for stored, dtype in PAIRS:
            folder = (args.dir or Path(temporary)) / f"first-block-{args.model}-{stored}"
            all_rows += rows(folder, args.model, stored, dtype, args.rounds)
    print(table(COLUMNS, all_rows))
    print(f"{describe_machine()}, medians of {args.rounds} runs")


if __name__ == "__main__":
    main(sys.argv[1:])
