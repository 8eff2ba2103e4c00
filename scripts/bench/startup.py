"""Measure start-up times of commands: whole processes, medians of several runs."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
WANCLI = [sys.executable, "-m", "wancli"]


def rows(repeats: int = 5) -> list[tuple[str, float]]:
    """Measure (what, seconds): help, a plan, and process start to the first step of a tiny render."""
    with tempfile.TemporaryDirectory() as folder:
        job = _write_job(Path(folder))
        environment = os.environ | {"WANCLI_CACHE": f"{folder}/cache"}
        run_wancli(["render", str(job), "-q", "--force"], environment)  # fills the cache
        first_steps = []
        for _ in range(repeats):
            report = run_wancli(["render", str(job), "-q", "--force", "--json"], environment)
            first_steps.append(float(json.loads(report)["first_step_after"]))
        return [
            ("wancli --help", time_command(["--help"], environment, repeats)),
            ("wancli plan", time_command(["plan", str(job)], environment, repeats)),
            ("process start to first step, prompts cached", statistics.median(first_steps)),
        ]


def _write_job(folder: Path) -> Path:
    path = folder / "job.yaml"
    model = ROOT / "tests/fixtures/wan21-tiny"
    path.write_text(
        f"model: {model}\nprompt: A cat.\nnegative: fog\nsize: 64x64\nframes: 1\nsampler: {{steps: 2}}\n"
    )
    return path


def time_command(arguments: list[str], environment: dict[str, str], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run_wancli(arguments, environment)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def run_wancli(arguments: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(
        [*WANCLI, *arguments], env=environment, check=True, capture_output=True, text=True
    ).stdout
