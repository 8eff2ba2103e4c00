"""`wancli export slurm`: an array job, one task a part of the job, that saves and queues itself again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_BODY = """
# Submit it with sbatch. Parts are counted from 0; `sbatch --array=3 FILE` runs one of them again. Logs go
# to the folder that it is submitted from: Slurm opens them before anything here could make a folder.
# {margin} s before its time is over Slurm sends USR1: the render saves where it is, ends with 75, and the
# task queues itself again. The margin must be longer than a step and the writing of its state.

cd -- {folder} || exit 3
{command} --shard "$SLURM_ARRAY_TASK_ID/{shards}" &
render=$!
again=yes
trap 'kill -USR1 "$render"' USR1
trap 'again=no; kill -TERM "$render"' TERM # of an administrator or scancel, who know what they want
while kill -0 "$render" 2>/dev/null; do # a signal ends a wait; bash runs no trap while a command runs
  wait "$render"
done
wait "$render"
code=$?
if [ "$code" -eq 75 ] && [ "$again" = yes ]; then
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
exit "$code"
"""


@dataclass(frozen=True)
class Wanted:
    """What a task asks Slurm for; None and 0 leave it to the cluster."""

    shards: int = 1
    gpus: int = 1
    time: str = "8:00:00"
    cpus: int | None = None
    memory: str | None = None
    margin: int = 180  # seconds


def script(command: Sequence[str], folder: Path, name: str, wanted: Wanted) -> str:
    """The batch script around a render, whose paths start in the folder."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name)  # Slurm reads these lines before any shell does
    asked = {
        "job-name": f"wancli-{plain}",
        "array": f"0-{wanted.shards - 1}",
        "gres": f"gpu:{wanted.gpus}" if wanted.gpus else None,
        "cpus-per-task": wanted.cpus,
        "mem": wanted.memory,
        "time": wanted.time,
        "signal": f"B:USR1@{wanted.margin}",
        "open-mode": "append",
        "output": f"wancli-{plain}-%A_%a.log",
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in asked.items() if value is not None]
    where, words = shlex.quote(str(folder)), shlex.join(command)
    body = _BODY.format(margin=wanted.margin, folder=where, command=words, shards=wanted.shards)
    return "\n".join(["#!/bin/bash", *lines, "#SBATCH --requeue"]) + "\n" + body
