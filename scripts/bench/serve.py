"""Measure how soon a render begins: in a process of its own, and by a server with the model in memory.

    python -m scripts.bench.serve [--repeats 5]

wan-mini, one frame of 128x128, prompts in the cache. From the start of the command's process, by its events:
until sampling begins, until the first step is over, and until the command ends, after 2 steps and decoding.
Medians, in alternation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from datetime import datetime
from pathlib import Path

from scripts.bench.startup import WANCLI, run_wancli

JOB = """\
output: out/clip.mp4
prompt: A red circle drifts to the left across dark stripes.
frames: 1
size: 128x128
seed: 3
sampler: {steps: 2}
"""
WHAT = ("until sampling begins", "until the first step is over", "the whole command")


def measure(arguments: list[str], environment: dict[str, str]) -> tuple[float, float, float]:
    """Render once; return the seconds of each event in WHAT."""
    start = time.time()
    output = run_wancli(["render", *arguments, "-q", "--force", "--json-stream"], environment)
    end = time.time()
    events = [json.loads(line) for line in output.splitlines()]
    sampling = [event for event in events if event.get("name") == "sample"]
    begins = next(event for event in sampling if event["type"] == "phase")
    first = next(event for event in sampling if event["type"] == "step")
    began, stepped = (datetime.fromisoformat(event["time"]).timestamp() for event in (begins, first))
    return began - start, stepped - start, end - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        job, socket = str(Path(folder, "job.yaml")), f"{folder}/private/socket"
        Path(job).write_text(JOB, encoding="utf-8")
        environment = os.environ | {"WANCLI_CACHE": f"{folder}/cache"}
        measure([job], environment)  # fills the cache
        server = [*WANCLI, "serve", job, "--socket", socket]
        subprocess.run([*server, "--daemonize", "--wait-ready"], env=environment, check=True)
        try:
            served = ["--socket", socket]
            measure([job, *served], environment)  # the first job
            pairs = [
                (measure([job], environment), measure([job, *served], environment)) for _ in range(repeats)
            ]
        finally:
            subprocess.run([*server[:-3], "--stop", "--socket", socket], env=environment, check=True)
    for index, what in enumerate(WHAT):
        alone, second = (statistics.median(pair[who][index] for pair in pairs) for who in (0, 1))
        print(
            f"{what}: alone {alone:.2f} s, by the server {second:.2f} s, {alone / second:.1f} times as soon"
        )


if __name__ == "__main__":
    main()
