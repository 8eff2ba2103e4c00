"""`wancli export slurm`: an array job with one task for each part of the job. Each saves and queues again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wancli.units import pluralize

_BODY = """
# Submit it with sbatch; options of sbatch replace those below: `sbatch --qos=low FILE`. The parts are counted
# from 0, {parts}; `sbatch --array=3 FILE` runs one of them again. Logs go to the folder that it is
# submitted from: Slurm opens them before anything here could make a folder.
# {margin} s before its time is over Slurm sends USR1: the render saves its states, ends with 75, and the
# task queues itself again. The margin must be longer than a step and the writing of its state.

cd -- {folder} || exit 3
{command} --shard "$SLURM_ARRAY_TASK_ID/{shards}" &
render=$!
again=yes
trap 'kill -USR1 "$render"' USR1
trap 'again=no; kill -TERM "$render"' TERM # by an administrator or scancel: do not queue again
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
class SlurmOptions:
    """What a task requests from Slurm; None and 0 leave it to the cluster."""

    shards: int = 1
    gpus: int = 1
    gres: str | None = None  # instead of gpus, as the cluster names them: gpu:a100:1
    partition: str | None = None
    account: str | None = None
    time: str = "8:00:00"
    cpus: int | None = None
    memory: str | None = None
    margin: int = 180  # seconds


def build_script(
    command: Sequence[str], folder: Path, name: str, options: SlurmOptions, shots: int | None = None
) -> str:
    """Build the batch script around a render whose paths are relative to the folder.

    `shots` is the number of shots that are divided; None if chains are kept whole."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name)  # Slurm reads these lines before any shell does
    directives = {
        "job-name": f"wancli-{plain}",
        "array": f"0-{options.shards - 1}",
        "partition": options.partition,
        "account": options.account,
        "gres": options.gres or (f"gpu:{options.gpus}" if options.gpus else None),
        "cpus-per-task": options.cpus,
        "mem": options.memory,
        "time": options.time,
        "signal": f"B:USR1@{options.margin}",
        "open-mode": "append",
        "output": f"wancli-{plain}-%A_%a.log",
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in directives.items() if value is not None]
    quoted, words = shlex.quote(str(folder)), shlex.join(command)
    parts = "whole chains in each" if shots is None else _describe_parts(shots, options.shards)
    body = _BODY.format(
        margin=options.margin, folder=quoted, command=words, shards=options.shards, parts=parts
    )
    return "\n".join(["#!/bin/bash", *lines, "#SBATCH --requeue"]) + "\n" + body


def _describe_parts(shots: int, shards: int) -> str:
    """Say how many shots a part renders: `6 shots each`, `5 to 6 shots each`."""
    least, most = shots // shards, -(-shots // shards)
    return f"{pluralize(most, 'shot')} each" if least == most else f"{least} to {most} shots each"
