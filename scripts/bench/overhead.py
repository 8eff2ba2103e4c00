"""What the batch layer costs per shot: planning, preflight, claims, records, reports; not the phases.

    python -m scripts.bench.overhead [--shots 40] [--repeats 5]

A batch of tiny shots is rendered in this process. What its phases (encoding, loading, sampling, decoding with
ffmpeg) took stands in the manifests; the rest of the wall time is the batch layer. That of a batch of one is
taken off, and what is left is divided by the other shots. The least of several tries.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts.bench.startup import ROOT
from wancli.cli import run


def per_shot(shots: int, repeats: int) -> float:
    """Seconds."""
    with tempfile.TemporaryDirectory() as folder:
        _rest(Path(folder), 1)  # imports, and fills the cache
        one = min(_rest(Path(folder), 1) for _ in range(repeats))
        many = min(_rest(Path(folder), shots) for _ in range(repeats))
    return (many - one) / (shots - 1)


def _rest(folder: Path, shots: int) -> float:
    """Seconds of a batch that none of its phases took."""
    job = folder / "job.yaml"
    said: dict[str, Any] = {
        "model": str(ROOT / "tests/fixtures/wan21-tiny"),
        "output": f"{time.monotonic_ns()}/{{seed}}.mp4",
        "prompt": "A cat.",
        "negative": "fog",
        "size": "64x64",
        "frames": 1,
        "sampler": {"steps": 2},
        "matrix": {"seed": list(range(shots))},
    }
    job.write_text(json.dumps(said))
    out = io.StringIO()
    began = time.perf_counter()
    with contextlib.redirect_stdout(out):
        code = run(["render", str(job), "-q", "--json", "--cache-dir", str(folder / "cache")])
    wall = time.perf_counter() - began
    if code:
        raise SystemExit(f"the render ended with {code}")
    report = json.loads(out.getvalue())
    return wall - sum(float(phase["seconds"]) for phase in report["memory"])


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of the batch layer per shot.")
    parser.add_argument("--shots", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    said = parser.parse_args()
    took = per_shot(said.shots, said.repeats)
    print(f"{1000 * took:.1f} ms per shot beside its phases; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
