"""Measure what a step cache costs and gains: wan-mini at several thresholds, each shot against the plain one.

    python -m scripts.bench.step_cache [--steps 50] [--size 64x64] [--thresholds 0.03,0.06,0.12,0.24,0.5]
        [--repeats 3]

Each shot is rendered alone, so that no shot takes steps for another. Seconds are those of sampling, the
smallest of several turns through all shots. Figures are those of `compare`. wan-mini has no table of its own:
it takes that of Wan2.1-T2V-1.3B.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from scripts.bench.markdown import describe_machine, table
from scripts.bench.startup import run_wancli

TABLE = "Wan2.1-T2V-1.3B"
COLUMNS = ("threshold", "forwards", "planned", "seconds", "gain", "latent distance", "PSNR", "SSIM")


def build_job(steps: int, size: str, thresholds: list[float]) -> dict[str, Any]:
    """Build a job of the plain shot and one shot for each threshold."""
    cached = [
        {"id": f"t{threshold:g}", "cache": {"table": TABLE, "threshold": threshold, "force": True}}
        for threshold in thresholds
    ]
    return {
        "output": "out/{id}.mp4",
        "prompt": "A red circle drifts to the left across dark stripes.",
        "seed": 3,
        "size": size,
        "sampler": {"steps": steps},
        "video": {"keep_latents": True},
        "compare": {"baseline": "plain", "sheet": False, "video": False},
        "items": [{"id": "plain"}, *cached],
    }


def measure(folder: Path, job: dict[str, Any], repeats: int) -> list[list[str]]:
    """Render every shot alone, several times, and compare them; return a row of the table for each."""
    environment = os.environ | {"WANCLI_CACHE": str(folder / "cache")}
    path = folder / "job.yaml"
    path.write_text(json.dumps(job))
    ids = [item["id"] for item in job["items"]]
    run_wancli(["render", str(path), "-q", "--pick", "plain"], environment)  # encodes the prompts
    seconds: dict[str, float] = {}
    for id in ids * repeats:
        took = _time_sampling(path, id, environment)
        seconds[id] = min(took, seconds.get(id, took))
    run_wancli(["render", str(path), "-q"], environment)
    plan = json.loads(run_wancli(["plan", str(path), "--json"], environment))
    compared = json.loads((folder / "out" / "job.compare.json").read_text())["shots"]
    figures = {shot["id"]: shot for shot in compared}
    return [_make_row(shot, seconds, figures[shot["id"]]) for shot in plan["shots"]]


def _time_sampling(path: Path, id: str, environment: dict[str, str]) -> float:
    """Render a shot; return the seconds of sampling."""
    options = ["-q", "--force", "--json", "--pick", id]
    report = json.loads(run_wancli(["render", str(path), *options], environment))
    return next(float(phase["seconds"]) for phase in report["memory"] if phase["name"] == "sample")


def _make_row(shot: dict[str, Any], seconds: dict[str, float], figures: dict[str, Any]) -> list[str]:
    id, steps = shot["id"], len(shot["timesteps"])
    reused = shot["cache"]["reused"]["cond"] if "cache" in shot else []
    computed = steps - len(reused)
    quality = ["latent_distance", "psnr", "ssim"]
    return [
        f"{shot['cache']['threshold']:g}" if "cache" in shot else "plain",
        f"{computed} of {steps}",
        f"{steps / computed:.2f}x",
        f"{seconds[id]:.2f}",
        f"{seconds['plain'] / seconds[id]:.2f}x",
        *("" if figures[key] is None else f"{figures[key]:.3f}" for key in quality),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Step caches of several thresholds against the plain shot.")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--size", default="64x64")
    parser.add_argument("--thresholds", default="0.03,0.06,0.12,0.24,0.5")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    thresholds = [float(text) for text in args.thresholds.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), build_job(args.steps, args.size, thresholds), args.repeats)
    print(table(COLUMNS, rows))
    print(f"{args.steps} steps of {args.size}, table {TABLE}; {describe_machine()}")


if __name__ == "__main__":
    main()
