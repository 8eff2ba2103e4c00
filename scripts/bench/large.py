"""Models larger than the machine: 14B, streamed, in 6 GiB; UMT5-XXL in 3 GiB. Measured beside predicted.

    python -m scripts.bench.large --dir DIR              # 14.5 GB of fp8, some ten minutes
    python -m scripts.bench.large --dir DIR --encoder    # 11.4 GB more
    python -m scripts.bench.large --dir DIR --dtype bf16 # 28.6 GB

Checkpoints of random weights are made in DIR where they are not there yet. Peaks are those of the whole
process, as the kernel counts them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bench.markdown import stamp, table
from scripts.bench.process import WANCLI, Ran, python

GIB = 2**30
LIMIT, ENCODER_LIMIT = 6 * GIB, 3 * GIB
STEPS = 4
PROMPT = "A gray tabby cat walks through a sunlit garden between rows of colourful flowers."
JOB = """\
model: {model}
output: {folder}/{name}.mp4
prompt: {prompt}
size: 256x256
frames: {frames}
sampler: {{steps: {steps}, guidance: {guidance}}}
memory: {{device: cpu, residency: streamed}}
"""
COLUMNS = ("what", "peak GiB", "predicted GiB", "off", "seconds", "s per step")


@dataclass(frozen=True)
class Case:
    name: str
    frames: int
    guidance: int

    @property
    def what(self) -> str:
        return f"256x256, frames: {self.frames}, steps: {STEPS}, guidance: {self.guidance}"


CASES = (Case("still", 1, 1), Case("clip", 5, 5))


@dataclass(frozen=True)
class Row:
    what: str
    peak: int
    predicted: int
    seconds: float
    step: float | None = None

    def cells(self) -> list[str]:
        step = "" if self.step is None else f"{self.step:.1f}"
        off = f"{self.predicted / self.peak - 1:+.1%}"
        sizes = f"{self.peak / GIB:.2f}", f"{self.predicted / GIB:.2f}"
        return [self.what, *sizes, off, f"{self.seconds:.0f}", step]


def checkpoint(folder: Path, *arguments: str) -> Path:
    """The folder, made by make_random_checkpoint.py where it is not there."""
    if not folder.exists():
        print(f"making {folder} ...", file=sys.stderr, flush=True)
        python(["scripts/make_random_checkpoint.py", str(folder), *arguments])
    return folder


def render(model: Path, case: Case, folder: Path) -> Row:
    """One shot by the command, a process of its own, and what `wancli plan` says before."""
    job = _job(model, case, folder)
    predicted = _predicted(_wancli(folder, "plan", str(job), "--json"))
    ran = _wancli(folder, "render", str(job), "--json", "-q")
    (shot,) = json.loads(ran.stdout)["shots"]
    sampling = sum(phase["seconds"] for phase in shot["phases"] if phase["name"] == "sample")
    return Row(case.what, ran.peak, max(predicted.values()), ran.seconds, sampling / STEPS)


def encode(model: Path, folder: Path) -> Row:
    """One prompt by `wancli encode`."""
    job = _job(model, CASES[0], folder)
    predicted = _predicted(_wancli(folder, "plan", str(job), "--json"))
    ran = _wancli(folder, "encode", str(job), "-q")
    return Row("UMT5-XXL, one prompt", ran.peak, predicted["encode"], ran.seconds)


def _job(model: Path, case: Case, folder: Path) -> Path:
    job = folder / f"{case.name}.yaml"
    said = JOB.format(model=model, folder=folder, prompt=PROMPT, steps=STEPS, **vars(case))
    job.write_text(said)
    return job


def _wancli(folder: Path, *arguments: str) -> Ran:
    return python([*WANCLI, *arguments], {"WANCLI_CACHE": str(folder / "cache")})


def _predicted(plan: Ran) -> dict[str, int]:
    """Bytes by phase: of the whole process where the plan says so."""
    rows: list[dict[str, Any]] = json.loads(plan.stdout)["memory"]
    return {row["name"]: row.get("peak", row["total"]) for row in rows}


def diffusers(model: Path, limit: int) -> str:
    """What becomes of diffusers' network of the same sizes in so much memory."""
    ran = python(["-m", "scripts.bench.hold", str(model / "config.json"), str(limit)])
    found = json.loads(ran.stdout)
    ending = f"fails: {found['error']}" if found["error"] else "holds it"
    needs, given = found["needs"] / GIB, limit / GIB
    return f"diffusers needs {needs:.1f} GiB for these weights in bf16; given {given:.1f} GiB it {ending}"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="Models larger than the machine.")
    parser.add_argument("--dir", type=Path, required=True, help="where the checkpoints are, or are made")
    parser.add_argument("--dtype", choices=("fp8", "bf16"), default="fp8")
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--model", default="14B", help="as make_random_checkpoint.py takes it")
    parser.add_argument("--encoder", action="store_true", help="UMT5-XXL instead of the transformer")
    said = parser.parse_args(argv)
    name = f"random-{said.model}-{said.dtype}-{said.blocks}"
    sizes = ["--model", said.model, "--dtype", said.dtype, "--blocks", str(said.blocks)]
    with tempfile.TemporaryDirectory(dir=said.dir) as folder:
        if said.encoder:
            model = checkpoint(
                said.dir / "random-umt5-xxl", "--model", "1.3B", "--blocks", "1", "--text-encoder", "xxl"
            )
            rows, limit = [encode(model, Path(folder))], ENCODER_LIMIT
        else:
            model = checkpoint(said.dir / name, *sizes)
            rows, limit = [], LIMIT
            for case in CASES:
                rows.append(render(model, case, Path(folder)))
                print(" | ".join(rows[-1].cells()), file=sys.stderr, flush=True)
    print(table(COLUMNS, [row.cells() for row in rows]))
    if not said.encoder:
        print(f"{diffusers(model, limit)}\n")
    print(stamp())
    over = [row.what for row in rows if row.peak > limit]
    if over:
        sys.exit(f"more than {limit / GIB:.0f} GiB: {', '.join(over)}")


if __name__ == "__main__":
    main(sys.argv[1:])
