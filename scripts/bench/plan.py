"""`python -m scripts.bench.plan`: time `wancli plan` of 1,000 shots, as a whole process."""

from __future__ import annotations

import datetime
import os
import sys
import tempfile
from pathlib import Path

from scripts.bench.startup import ROOT, time_command

JOB = f"""\
model: {ROOT / "tests/fixtures/wan21-tiny"}
prompt: A gray tabby cat walks through a sunlit garden between rows of colourful flowers.
size: 832x480
frames: 81
inject:
  - prompt: Schools of tropical fish swim between vibrant coral formations.
matrix:
  seed: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
  inject.0.blocks: [early, middle, late, all, sparse]
  inject.0.strength: [0.2, 0.4, 0.6, 0.8, 1.0]
  sampler.guidance: [3.0, 4.0, 5.0, 6.0]
"""


def rows(repeats: int = 5) -> list[tuple[str, float]]:
    """Measure (what, seconds) of the same command for one shot and for a thousand, medians."""
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "sweep.yaml"
        job.write_text(JOB)
        environment = os.environ | {"WANCLI_CACHE": f"{folder}/cache"}
        whole_sweep = ["plan", str(job)]
        one_shot = [*whole_sweep, *("--sweep", "seed=1", "--sweep", "sampler.guidance=5", "--sweep")]
        one_shot += ["inject.0.blocks=late", "--sweep", "inject.0.strength=1"]
        time_command(one_shot, environment, 1)  # hashes the weights
        return [
            ("wancli plan, 1 shot", time_command(one_shot, environment, repeats)),
            ("wancli plan, 1,000 shots", time_command(whole_sweep, environment, repeats)),
        ]


def main() -> None:
    for what, seconds in rows():
        print(f"- {what}: {seconds:.2f} s")
    print(f"- {datetime.date.today()}, {os.cpu_count()} cores, Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
