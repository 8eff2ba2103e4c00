"""`wancli export`: a job for a scheduler."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wancli.commands._common import collect_flags
from wancli.commands._options import Items, JobArgument
from wancli.errors import JobError

if TYPE_CHECKING:
    from wancli.job.cli_overrides import Flags
    from wancli.job.loader import Item


app = typer.Typer(help="Write a job for a scheduler, to stdout.", rich_markup_mode=None)


# What these do not know themselves are options of `wancli render`.
_PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}


Gpus = Annotated[
    int | None,
    typer.Option(min=0, help="GPUs of each task. Default: 1, or 0 where memory.device of all shots is cpu."),
]


@app.command("slurm", context_settings=_PASS_THROUGH)
def slurm_command(
    context: typer.Context,
    job: JobArgument,
    shards: Annotated[int, typer.Option(min=1, help="Tasks of the array; each renders a part.")] = 1,
    gpus: Gpus = None,
    time: Annotated[str, typer.Option(help="How long a task may take before it queues again.")] = "8:00:00",
    cpus: Annotated[int | None, typer.Option(min=1, help="Cores of each task.")] = None,
    mem: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory of each task: 64G.")] = None,
    margin: Annotated[
        int, typer.Option(min=10, help="Seconds before the end at which it saves; longer than a step.")
    ] = 180,
) -> None:
    """A batch script for sbatch: an array of parts that save and queue again when their time is over.

    Further options are those of wancli render.
    """
    from wancli.farm.slurm_export import SlurmOptions, build_script

    path, flags, _ = _parse_render_options(job, context.args, "--shard")
    shots = _load_items(path, flags)
    if shards > (count := len(shots)):
        raise JobError(f"{shards} is more than there are shots ({count})", where="--shards")
    for flag, said in (("--time", time), ("--mem", mem or "0")):
        if not re.fullmatch(r"[0-9:.-]+[KMGT]?", said):
            raise JobError(f"{said!r} is nothing that Slurm reads", where=flag, hint="8:00:00, or 64G.")
    command = [_find_wancli(), "render", str(path), "--progress", "plain", *context.args]
    options = SlurmOptions(shards, _count_gpus(shots) if gpus is None else gpus, time, cpus, mem, margin)
    print(build_script(command, Path.cwd(), path.stem, options), end="")


@app.command("openjd", context_settings=_PASS_THROUGH)
def openjd_command(
    context: typer.Context,
    job: JobArgument,
    gpus: Gpus = None,
    at_once: Annotated[int, typer.Option(min=1, help="Shots of a task, which share the most work.")] = 1,
    items: Items = None,
) -> None:
    """A job template for Open Job Description: a model per session, some shots per task.

    Further options are those of wancli render.
    """
    from wancli.farm.openjd_export import build_template

    path, flags, cache = _parse_render_options(job, context.args, "--shard", "--items")
    shots = _load_items(path, replace(flags, items=items))
    chosen = items or f"0-{len(shots) - 1}"
    gpus = _count_gpus(shots) if gpus is None else gpus
    served = [word for said in flags.sets for word in ("--set", said)]
    served += ["--cache-dir", str(cache)] if cache else []
    text = build_template(
        _find_wancli(), path, chosen, served, context.args, name=path.stem, gpus=gpus, at_once=at_once
    )
    print(text, end="")


def _parse_render_options(job: str, options: list[str], *ours: str) -> tuple[Path, Flags, Path | None]:
    """Where the job is, and the flags and the cache among the options of a render. Raises what that would."""
    from wancli.commands.render import render

    if job == "-":
        raise JobError("must be a file, which the tasks read", where="JOB")
    probe = typer.Typer(add_completion=False, rich_markup_mode=None)
    probe.command()(render)
    with typer.main.get_command(probe).make_context("wancli render", [job, *options]) as said:
        given = said.params
    for name in (*ours, "--socket", "--prompt", "--output"):
        if any(word == name or word.startswith(f"{name}=") for word in options):
            raise JobError("is for the exported job to say", where=name)
    if given["force"]:
        raise JobError(
            "would begin anew in every task that queues again",
            where="--force",
            hint="Move the old videos away, or give the job another output.",
        )
    flags = collect_flags(given["sets"], given["sweeps"], given["items"], given["shard"])
    return Path(job).resolve(), flags, given["cache_dir"]


def _load_items(job: Path, flags: Flags) -> list[Item]:
    """Those that are asked for. Raises JobError for what is wrong with the job, and for items that are not
    there."""
    from wancli.job.loader import load

    jobs = load(job, flags)
    return [jobs.items[index] for index in jobs.chosen]


def _count_gpus(shots: list[Item]) -> int:
    return int(any(item.job.memory.device != "cpu" for item in shots))


def _find_wancli() -> str:
    """The command that runs now, where the tasks find it, too, if they share its folder."""
    beside = Path(sys.executable).with_name("wancli")
    return str(beside) if beside.exists() else "wancli"
