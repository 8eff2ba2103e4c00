"""Measure the overhead of a batch per shot: planning, preflight, claims, records, reports; not the phases.

    python -m scripts.bench.overhead [--shots 40] [--repeats 5]

A batch of tiny shots is rendered in this process. The manifests have the time of its phases (encoding,
loading, sampling, decoding with ffmpeg); the rest of the wall time is overhead. The overhead of a batch of
one is subtracted, and the difference is divided by the number of other shots. The least of several tries.
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
    """Return seconds of overhead per shot."""
    with tempfile.TemporaryDirectory() as folder:
        _time_outside_phases(Path(folder), 1)  # imports, and fills the cache
        one = min(_time_outside_phases(Path(folder), 1) for _ in range(repeats))
        many = min(_time_outside_phases(Path(folder), shots) for _ in range(repeats))
    return (many - one) / (shots - 1)


def _time_outside_phases(folder: Path, shots: int) -> float:
    """Render a batch; return the seconds outside its phases."""
    job = folder / "job.yaml"
    content: dict[str, Any] = {
        "model": str(ROOT / "tests/fixtures/wan21-tiny"),
        "output": f"{time.monotonic_ns()}/{{seed}}.mp4",
        "prompt": "A cat.",
        "negative": "fog",
        "size": "64x64",
        "frames": 1,
        "sampler": {"steps": 2},
        "matrix": {"seed": list(range(shots))},
    }
    job.write_text(json.dumps(content))
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
    parser = argparse.ArgumentParser(description="Measure the overhead of a batch per shot.")
    parser.add_argument("--shots", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    seconds = per_shot(args.shots, args.repeats)
    print(f"{1000 * seconds:.1f} ms per shot outside its phases; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
