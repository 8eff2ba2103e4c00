"""Measure the gain of prefix sharing: a sweep of eight variants, and the same eight one by one.

    python -m scripts.bench.prefix_sharing [--steps 20] [--size 128x128] [--repeats 3]

wan-mini; seven variants inject a second prompt from half the steps on, one is plain. The sweep is one
`wancli render`; each of the eight is another, in a process of its own. Latents must be the same.
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
from wancli.storage.tensor_file import load_latent

JOB: dict[str, Any] = {
    "output": "out/{id}.mp4",
    "prompt": "A red circle drifts to the left across dark stripes.",
    "frames": 17,
    "seed": 3,
    "video": {"keep_latents": True},
}
OTHER = "A blue triangle moves up in front of a white background."
ITEMS: list[dict[str, Any]] = [{"id": "plain"}] + [
    {
        "id": f"{blocks}-{strength}",
        "inject": [{"prompt": OTHER, "blocks": blocks, "strength": strength, "steps": "50-100%"}],
    }
    for blocks, strength in (
        ("early", 0.5),
        ("early", 1.0),
        ("middle", 0.5),
        ("middle", 1.0),
        ("late", 0.5),
        ("late", 1.0),
        ("all", 1.0),
    )
]


def measure(folder: Path, steps: int, size: str, repeats: int) -> tuple[list[float], list[float]]:
    """Return median seconds of sampling and of whole processes: the sweep, and the sum of eight renders.

    Raises AssertionError if latents differ.
    """
    environment = os.environ | {"WANCLI_CACHE": str(folder / "cache")}
    base = JOB | {"sampler": {"steps": steps}, "size": size}
    jobs = {"sweep": base | {"items": ITEMS}} | {item["id"]: base | {"items": [item]} for item in ITEMS}
    for name, job in jobs.items():
        (folder / name).mkdir()
        (folder / name / "job.yaml").write_text(json.dumps(job))
    together: list[tuple[float, float]] = []
    apart: list[tuple[float, float]] = []
    for turn in range(repeats + 1):
        took = {name: _time_render(folder / name / "job.yaml", environment) for name in jobs}
        if turn:  # the first run encodes the prompts
            together.append(took.pop("sweep"))
            apart.append((sum(s for s, _ in took.values()), sum(s for _, s in took.values())))
    for name in (item["id"] for item in ITEMS):
        one, other = (
            load_latent(folder / at / f"out/{name}.latents.safetensors")[0] for at in ("sweep", name)
        )
        if not one.equal(other):
            raise AssertionError(f"the latents of {name} differ")
    medians = [[statistics.median(part) for part in zip(*log)] for log in (together, apart)]
    return medians[0], medians[1]


def _time_render(job: Path, environment: dict[str, str]) -> tuple[float, float]:
    """Render a job; return the seconds of sampling and of the process."""
    began = time.perf_counter()
    report = json.loads(run_wancli(["render", str(job), "-q", "--force", "--json"], environment))
    whole = time.perf_counter() - began
    return next(float(p["seconds"]) for p in report["memory"] if p["name"] == "sample"), whole


def main() -> None:
    parser = argparse.ArgumentParser(description="Eight variants that share half their steps.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", default="128x128")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sweep, separate = measure(Path(folder), args.steps, args.size, args.repeats)
    print(f"8 variants, {args.steps} steps of {args.size}, injections from half on, the same latents:")
    for what, together, apart in zip(("sampling", "whole runs"), sweep, separate):
        print(f"{what:<10} one sweep {together:6.2f} s, eight renders {apart:6.2f} s: {together / apart:.2f}")


if __name__ == "__main__":
    main()
