"""`wancli export`: a job for a scheduler."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wancli.commands._options import Items, JobArgument
from wancli.commands._render_options import RenderOptions
from wancli.errors import JobError
from wancli.storage import disk

if TYPE_CHECKING:
    from wancli.job.cli_overrides import CliOverrides
    from wancli.job.loader import Item


app = typer.Typer(help="Write a job for a scheduler, to stdout.", rich_markup_mode=None)


# Options that the export commands do not have are options of `wancli render`.
_PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}


Gpus = Annotated[
    int | None,
    typer.Option(min=0, help="GPUs of each task. Default: 1, or 0 if memory.device of all shots is cpu."),
]


@app.command("slurm", context_settings=_PASS_THROUGH)
def slurm_command(
    context: typer.Context,
    job: JobArgument,
    shards: Annotated[
        int, typer.Option(min=1, help="Tasks of the array; each renders a part of the job.")
    ] = 1,
    gpus: Gpus = None,
    time: Annotated[
        str, typer.Option(help="Time limit of a task; then it saves and queues again.")
    ] = "8:00:00",
    cpus: Annotated[int | None, typer.Option(min=1, help="Cores of each task.")] = None,
    mem: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory of each task: 64G.")] = None,
    partition: Annotated[str | None, typer.Option(help="Partition of the cluster.")] = None,
    account: Annotated[str | None, typer.Option(help="Account that pays.")] = None,
    gres: Annotated[
        str | None, typer.Option(help="GPUs as the cluster names them, instead of --gpus: gpu:a100:1.")
    ] = None,
    margin: Annotated[
        int,
        typer.Option(min=10, help="Seconds before the time limit at which a task saves; longer than a step."),
    ] = 180,
) -> None:
    """Write a batch script for sbatch: an array of tasks that save and queue again at their time limit.

    Further options are those of wancli render.
    """
    from wancli.farm.slurm_export import SlurmOptions, build_script

    render = _parse_render_options(job, context.args, "--shard")
    path = disk.resolve(Path(job))
    shots, count = _load_items(path, render.flags)
    if shards > count:
        raise JobError(f"{shards} is more than there are shots and chains ({count})", where="--shards")
    for flag, value in (("--time", time), ("--mem", mem or "0")):
        if not re.fullmatch(r"[0-9:.-]+[KMGT]?", value):
            raise JobError(f"{value!r} is not a value that Slurm reads", where=flag, hint="8:00:00, or 64G.")
    for flag, name in (("--partition", partition), ("--account", account), ("--gres", gres)):
        if name is not None and not re.fullmatch(r"[A-Za-z0-9_.,:=@+-]+", name):
            raise JobError(f"{name!r} is not a name that Slurm reads", where=flag)
    if gres is not None and gpus is not None:
        raise JobError("says the same as --gpus; give one of them", where="--gres")
    command = [_find_wancli(), "render", str(path), "--progress", "plain", *context.args]
    asked = _count_gpus(shots) if gpus is None else gpus
    options = SlurmOptions(shards, asked, gres, partition, account, time, cpus, mem, margin)
    divided = len(shots) if count == len(shots) else None
    print(build_script(command, Path.cwd(), path.stem, options, divided), end="")


@app.command("openjd", context_settings=_PASS_THROUGH)
def openjd_command(
    context: typer.Context,
    job: JobArgument,
    gpus: Gpus = None,
    at_once: Annotated[
        int, typer.Option(min=1, help="Shots of each task; neighbouring shots share the most work.")
    ] = 1,
    items: Items = None,
) -> None:
    """Write a job template for Open Job Description: a model per session, some shots per task.

    Further options are those of wancli render.
    """
    from wancli.farm.openjd_export import build_template

    render = _parse_render_options(job, context.args, "--shard", "--items", "--pick")
    path = disk.resolve(Path(job))
    shots, count = _load_items(path, replace(render.flags, items=items))
    if count < len(shots):
        hint = "wancli export slurm keeps a chain in one task."
        raise JobError("a shot continues another one, and tasks of OpenJD do not wait", where=job, hint=hint)
    chosen = items or f"0-{len(shots) - 1}"
    gpus = _count_gpus(shots) if gpus is None else gpus
    served = [word for change in render.sets or () for word in ("--set", change)]
    served += ["--cache-dir", str(render.cache_dir)] if render.cache_dir else []
    text = build_template(
        _find_wancli(), path, chosen, served, context.args, name=path.stem, gpus=gpus, at_once=at_once
    )
    print(text, end="")


def _parse_render_options(job: str, words: list[str], *own: str) -> RenderOptions:
    """Parse the options of `wancli render` that are given for the tasks.

    Raises what the render would raise, and JobError for options that the exported job sets itself.
    """
    if job == "-" or disk.is_pipe(Path(job)):
        raise JobError("must be a file, which the tasks read", where="JOB")
    options = RenderOptions.parse([job, *words])
    for name in (*own, "--socket", "--prompt"):
        if any(word == name or word.startswith(f"{name}=") for word in words):
            raise JobError("is set by the exported job", where=name)
    if options.force:
        raise JobError(
            "would start again from the first step in every task that queues again",
            where="--force",
            hint="Move the old videos away, or give the job another output.",
        )
    return options


def _load_items(job: Path, flags: CliOverrides) -> tuple[list[Item], int]:
    """Load the items that the flags choose; return them, and their number if each chain counts as one.

    Raises JobError if the job is wrong or an item does not exist.
    """
    from wancli.job.loader import find_chain_starts, load

    jobs = load(job, flags)
    starts = find_chain_starts(jobs.items)
    return [jobs.items[index] for index in jobs.selected], len({starts[index] for index in jobs.selected})


def _count_gpus(shots: list[Item]) -> int:
    """Return the GPUs of a task. Tasks run this installation: with a CPU build of torch they use none."""
    devices = {item.job.memory.device for item in shots}
    return int("cuda" in devices or ("auto" in devices and not metadata.version("torch").endswith("+cpu")))


def _find_wancli() -> str:
    """Return the path of the running command, which the tasks also find if they share its folder."""
    path = Path(sys.executable).with_name("wancli")
    return str(path) if disk.exists(path) else "wancli"
