"""How soon the first step is over: a process of its own, and a render by a server that has the model.

    python -m scripts.bench.serve [--repeats 5]

wan-mini, one frame of 128x128, prompts in the cache. As the command counts it: from the start of its process
to the end of its first step; and the whole command, 2 steps and decoding included. In turn, medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from scripts.bench.startup import WANCLI, _run

JOB = """\
output: out/clip.mp4
prompt: A red circle drifts to the left across dark stripes.
frames: 1
size: 128x128
seed: 3
sampler: {steps: 2}
"""


def measured(arguments: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds to the first step and to the end."""
    start = time.perf_counter()
    report = _run(["render", *arguments, "-q", "--force", "--json"], environment)
    return float(json.loads(report)["first_step_after"]), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        job, socket = str(Path(folder, "job.yaml")), f"{folder}/private/socket"
        Path(job).write_text(JOB)
        environment = os.environ | {"WANCLI_CACHE": f"{folder}/cache"}
        measured([job], environment)  # fills the cache
        server = [*WANCLI, "serve", job, "--socket", socket]
        subprocess.run([*server, "--daemonize", "--wait-ready"], env=environment, check=True)
        try:
            served = ["--socket", socket]
            measured([job, *served], environment)  # the first job
            found = [
                (measured([job], environment), measured([job, *served], environment)) for _ in range(repeats)
            ]
        finally:
            subprocess.run([*server[:-3], "--stop", "--socket", socket], env=environment, check=True)
    for index, what in enumerate(("process start to first step", "the whole command")):
        alone, second = (statistics.median(pair[who][index] for pair in found) for who in (0, 1))
        print(
            f"{what}: alone {alone:.2f} s, by the server {second:.2f} s, {alone / second:.1f} times as soon"
        )


if __name__ == "__main__":
    main()
