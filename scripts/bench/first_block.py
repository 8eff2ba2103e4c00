"""From process start to the first block running, prompt cached: wancli beside diffusers on the same file.

    python -m scripts.bench.first_block [--dir DIR] [--rounds N]

Each runs one forward of 1.3B on one frame of 256x256, imports counted, in turn. Peaks are those of the
processes, up to the end of that forward. diffusers loads as it does by default: mapped.
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

from scripts.bench.markdown import stamp, table
from scripts.bench.process import WANCLI, python

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
    """Seconds from launch to the first block's begin and end, and the last one's end; bytes at the peak."""

    begins: float
    ends: float
    all_end: float
    peak: int


def start(who: str, folder: Path, dtype: str) -> Start:
    """One process, `ours` or `theirs`."""
    arguments = ["-m", "scripts.bench.starts", who, str(folder), dtype]
    ran = python([*arguments, repr(time.time())], {"WANCLI_CACHE": str(folder / "cache")})
    begins, ends, all_end = json.loads(ran.stdout)
    return Start(begins, ends, all_end, ran.peak)


def median(starts: Sequence[Start]) -> Start:
    """Of each figure; the largest of the peaks."""
    begins, ends, all_end = (
        statistics.median(getattr(one, figure) for one in starts) for figure in ("begins", "ends", "all_end")
    )
    return Start(begins, ends, all_end, max(one.peak for one in starts))


def cells(what: str, one: Start, weights: int) -> list[str]:
    seconds = (f"{figure:.2f}" for figure in (one.begins, one.ends, one.all_end))
    return [what, *seconds, f"{one.peak / 2**30:.2f}", f"{one.peak / weights:.2f}x"]


def rows(folder: Path, model: str, stored: str, dtype: str, rounds: int) -> list[list[str]]:
    """wancli for the first time ever, when it hashes the files; then both in turn, medians."""
    if not folder.exists():
        python(["-m", "scripts.bench.starts", "make", str(folder), model, stored])
    (folder / f"{dtype}.yaml").write_text(JOB.format(folder=folder, dtype=SHORT[dtype]))
    cached = {"WANCLI_CACHE": str(folder / "cache")}
    python([*WANCLI, "encode", str(folder / f"{dtype}.yaml"), "-q"], cached)
    start("theirs", folder, dtype)  # the files are in the kernel's cache from here on
    (folder / "cache" / "hashes.json").unlink()
    first = start("ours", folder, dtype)
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(start("ours", folder, dtype))
        theirs.append(start("theirs", folder, dtype))
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


def _seconds(one: Start) -> tuple[float, float, float]:
    return one.begins, one.ends, one.all_end


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="From process start to the first block running.")
    parser.add_argument("--dir", type=Path, help="where the checkpoints are, or are kept when made")
    parser.add_argument("--model", default="1.3B", help="as make_random_checkpoint.py takes it")
    parser.add_argument("--rounds", type=int, default=3)
    said = parser.parse_args(argv)
    found: list[list[str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for stored, dtype in PAIRS:
            folder = (said.dir or Path(temporary)) / f"first-block-{said.model}-{stored}"
            found += rows(folder, said.model, stored, dtype, said.rounds)
    print(table(COLUMNS, found))
    print(f"{stamp()}, medians of {said.rounds} runs")


if __name__ == "__main__":
    main(sys.argv[1:])
