"""Measure the gain of batching over streamed weights: four shots, one by one and together.

    python -m scripts.bench.batching [--dtype fp8] [--size 128x128] [--repeats 3]

Writes a random checkpoint of some hundred MB with the widths of Wan 1.3B, renders the same job with
`batch: 1` and `batch: auto` in alternation, each in a process of its own, and compares the latents. The file
is in the page cache; if every pass reads a disk, batching gains more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts.bench.startup import run_wancli
from scripts.make_random_checkpoint import write_checkpoint
from wancli.models.config import WanConfig
from wancli.storage.tensor_file import load_latent

CONFIG = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=4)  # the widths of 1.3B
SHOTS = 4
JOB = """model: {model}
output: out/{{id}}.mp4
prompt: A gray tabby cat walks through a sunlit garden between rows of colourful flowers.
negative: fog
size: {size}
frames: 1
sampler: {{steps: 6}}
memory: {{residency: streamed}}
video: {{keep_latents: true}}
batch: {batch}
items: {items}
"""


def measure(folder: Path, dtype: str, size: str, repeats: int) -> dict[str, tuple[float, float]]:
    """Return median seconds of sampling and of the whole process, by `batch`.

    Raises AssertionError if latents differ.
    """
    model = folder / "model"
    write_checkpoint(model, CONFIG, dtype=dtype, text_encoder="tiny", vae="tiny")
    environment = os.environ | {"WANCLI_CACHE": str(folder / "cache")}
    seconds: dict[str, list[tuple[float, float]]] = {"1": [], "auto": []}
    for batch in seconds:
        (folder / batch).mkdir()
        items = json.dumps([{"id": str(seed), "seed": seed} for seed in range(SHOTS)])
        text = JOB.format(model=model, size=size, batch=batch, items=items)
        (folder / batch / "job.yaml").write_text(text)
    for turn in range(repeats + 1):
        for batch, log in seconds.items():
            began = time.perf_counter()
            output = run_wancli(
                ["render", str(folder / batch / "job.yaml"), "-q", "--force", "--json"], environment
            )
            whole = time.perf_counter() - began
            if turn:  # the first run fills caches
                log.append((_sampling_seconds(json.loads(output)), whole))
    for seed in range(SHOTS):
        one, other = (load_latent(folder / batch / f"out/{seed}.latents.safetensors")[0] for batch in seconds)
        if not one.equal(other):
            raise AssertionError(f"the latents of seed {seed} differ")
    return {
        batch: (statistics.median(s for s, _ in log), statistics.median(s for _, s in log))
        for batch, log in seconds.items()
    }


def _sampling_seconds(report: dict[str, Any]) -> float:
    return next(float(phase["seconds"]) for phase in report["memory"] if phase["name"] == "sample")


def main() -> None:
    parser = argparse.ArgumentParser(description="Four streamed shots, one by one and together.")
    parser.add_argument("--dtype", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--size", default="64x64")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), args.dtype, args.size, args.repeats)
    print(f"{SHOTS} shots of {args.size}, {args.dtype}, the same latents:")
    for what, alone, together in zip(("sampling", "whole run"), results["1"], results["auto"]):
        print(f"{what:<9} batch 1 {alone:6.2f} s, auto {together:6.2f} s: {alone / together:.2f}x")


if __name__ == "__main__":
    main()
