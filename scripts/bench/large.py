"""Render models larger than the machine: 14B streamed in 6 GiB, UMT5-XXL in 3 GiB; measured and predicted.

    python -m scripts.bench.large --dir DIR              # 14.5 GB of fp8, some ten minutes
    python -m scripts.bench.large --dir DIR --encoder    # 11.4 GB more
    python -m scripts.bench.large --dir DIR --dtype bf16 # 28.6 GB

Missing checkpoints, of random weights, are made in DIR. Peaks are those of the whole process, as the
kernel counts them.
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

from scripts.bench.markdown import describe_machine, table
from scripts.bench.process import WANCLI, ProcessResult, run_python

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
    """Return the folder; make it by make_random_checkpoint.py if it does not exist."""
    if not folder.exists():
        print(f"making {folder} ...", file=sys.stderr, flush=True)
        run_python(["scripts/make_random_checkpoint.py", str(folder), *arguments])
    return folder


def render(model: Path, case: Case, folder: Path) -> Row:
    """Render one shot in a process of its own, and compare it with `wancli plan`."""
    job = _write_job(model, case, folder)
    predicted = _predicted_peaks(_run_wancli(folder, "plan", str(job), "--json"))
    process = _run_wancli(folder, "render", str(job), "--json", "-q")
    (shot,) = json.loads(process.stdout)["shots"]
    sampling = sum(phase["seconds"] for phase in shot["phases"] if phase["name"] == "sample")
    return Row(case.what, process.peak, max(predicted.values()), process.seconds, sampling / STEPS)


def encode(model: Path, folder: Path) -> Row:
    """Encode one prompt by `wancli encode`."""
    job = _write_job(model, CASES[0], folder)
    predicted = _predicted_peaks(_run_wancli(folder, "plan", str(job), "--json"))
    process = _run_wancli(folder, "encode", str(job), "-q")
    return Row("UMT5-XXL, one prompt", process.peak, predicted["encode"], process.seconds)


def _write_job(model: Path, case: Case, folder: Path) -> Path:
    job = folder / f"{case.name}.yaml"
    job.write_text(JOB.format(model=model, folder=folder, prompt=PROMPT, steps=STEPS, **vars(case)))
    return job


def _run_wancli(folder: Path, *arguments: str) -> ProcessResult:
    return run_python([*WANCLI, *arguments], {"WANCLI_CACHE": str(folder / "cache")})


def _predicted_peaks(plan: ProcessResult) -> dict[str, int]:
    """Return bytes by phase, those of the whole process if the plan has them."""
    rows: list[dict[str, Any]] = json.loads(plan.stdout)["memory"]
    return {row["name"]: row.get("peak", row["total"]) for row in rows}


def try_diffusers(model: Path, limit: int) -> str:
    """Build diffusers' network of the same sizes under a memory limit, and describe the result."""
    process = run_python(["-m", "scripts.bench.diffusers_memory", str(model / "config.json"), str(limit)])
    result = json.loads(process.stdout)
    ending = f"fails: {result['error']}" if result["error"] else "holds it"
    needs, given = result["needs"] / GIB, limit / GIB
    return f"diffusers needs {needs:.1f} GiB for these weights in bf16; given {given:.1f} GiB it {ending}"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="Models larger than the machine.")
    parser.add_argument(
        "--dir", type=Path, required=True, help="folder of the checkpoints; missing ones are made"
    )
    parser.add_argument("--dtype", choices=("fp8", "bf16"), default="fp8")
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--model", default="14B", help="as for make_random_checkpoint.py")
    parser.add_argument("--encoder", action="store_true", help="UMT5-XXL instead of the transformer")
    args = parser.parse_args(argv)
    name = f"random-{args.model}-{args.dtype}-{args.blocks}"
    sizes = ["--model", args.model, "--dtype", args.dtype, "--blocks", str(args.blocks)]
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        if args.encoder:
            model = checkpoint(
                args.dir / "random-umt5-xxl", "--model", "1.3B", "--blocks", "1", "--text-encoder", "xxl"
            )
            rows, limit = [encode(model, Path(folder))], ENCODER_LIMIT
        else:
            model = checkpoint(args.dir / name, *sizes)
            rows, limit = [], LIMIT
            for case in CASES:
                rows.append(render(model, case, Path(folder)))
                print(" | ".join(rows[-1].cells()), file=sys.stderr, flush=True)
    print(table(COLUMNS, [row.cells() for row in rows]))
    if not args.encoder:
        print(f"{try_diffusers(model, limit)}\n")
    print(describe_machine())
    over = [row.what for row in rows if row.peak > limit]
    if over:
        sys.exit(f"more than {limit / GIB:.0f} GiB: {', '.join(over)}")


if __name__ == "__main__":
    main(sys.argv[1:])
