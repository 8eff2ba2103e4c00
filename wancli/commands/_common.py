"""Shared helpers of commands: options to values; results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from wancli.errors import WancliError
from wancli.progress import make_printable
from wancli.storage import disk
from wancli.storage.paths import expand_home, user_folder

if TYPE_CHECKING:
    import typer

    from wancli.engine.networks import ModelCache
    from wancli.farm.server import RunCommand
    from wancli.job.cli_overrides import CliOverrides
    from wancli.job.loader import JobFile
    from wancli.plan.render_plan import Plan
    from wancli.progress import Mode, Progress
    from wancli.storage.cache import Store


@dataclass(frozen=True)
class Invocation:
    """The runner of command lines, the networks that the process keeps in memory, and the start time."""

    run: RunCommand
    model_cache: ModelCache | None = None
    began: float | None = None


def print_error(error: WancliError, prefix: str = "") -> None:
    """Print the message of an error, then its hint, on stderr."""
    for line in str(error).split("\n"):
        print(make_printable(f"wancli: {prefix}{line}"), file=sys.stderr)
    for line in error.hint.splitlines():
        print(make_printable(f"  {line}"), file=sys.stderr)


def print_json(document: Any) -> None:
    json.dump(document, sys.stdout, indent=2)
    print()


def print_result(text: str) -> None:
    """Print a result on stdout. If it has no reader any more, say so on stderr and continue: the outputs are
    on disk."""
    from wancli.stdio import write_line

    write_line(sys.stdout, text)


def rerun_command(context: typer.Context, items: str, without: str = "") -> str:
    """Return this command line, quoted for a shell, for these shots alone and without one of its options."""
    words = context.command_path.split()
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name in ("items", "picks", "shard", without) or source is None or source.name != "COMMANDLINE":
            continue
        values = context.params[name]
        for value in values if isinstance(values, (list, tuple)) else [values]:
            option = [] if parameter.param_type_name == "argument" else [max(parameter.opts, key=len)]
            words += option if value is True else [*option, str(getattr(value, "value", value))]
    return shlex.join([*words, "--items", items])


def create_display(mode: Mode | Literal["openjd"], quiet: bool, as_stream: bool = False) -> Progress:
    """Create the display of progress: for programs on stdout, else for people on stderr.

    `quiet` also turns off the log, which reports the hashing of large files.
    """
    from wancli import progress

    logging.getLogger("wancli").disabled = quiet
    if as_stream:
        from wancli.report.json_stream import JsonStream

        return JsonStream(sys.stdout)
    if mode == "openjd":
        from wancli.report.openjd_progress import OpenJdProgress

        return OpenJdProgress(sys.stdout)
    return progress.create_progress(sys.stderr, "none" if quiet else mode)


def collect_flags(
    sets: list[str] | None,
    sweeps: list[str] | None = None,
    items: str | None = None,
    shard: str | None = None,
    picks: list[str] | None = None,
) -> CliOverrides:
    from wancli.job.cli_overrides import CliOverrides

    return CliOverrides(tuple(sets or ()), tuple(sweeps or ()), items, shard, tuple(picks or ()))


def load_job(job: str, flags: CliOverrides) -> JobFile:
    from wancli.job.extends import read_file
    from wancli.job.loader import load, parse

    path = Path(job)
    if job == "-":
        return parse(sys.stdin.buffer.read(), "stdin", "stdin", Path.cwd(), flags)
    with disk.reading_for_job(job):
        is_pipe = disk.is_pipe(path)
    if is_pipe:  # as of `render <(...)`: it can be read once, and its folder is no place for outputs
        return parse(read_file(path), job, "pipe", Path.cwd(), flags)
    return load(path, flags)


def plan_job(
    jobs: JobFile, cache_dir: Path | None, *, measure: bool = False, budget: int | None = None
) -> Plan:
    from wancli.plan import planner

    return planner.build_plan(jobs, hashes_path(cache_dir), measure=measure, budget=budget)


def resolve_cache_dir(cache_dir: Path | None) -> Path:
    """Return the folder of the cache; one that takes no files, with a warning, if there is no home folder."""
    if cache_dir:
        return expand_home(cache_dir, "--cache-dir")
    if variable := os.environ.get("WANCLI_CACHE"):
        return expand_home(variable, "$WANCLI_CACHE")
    return user_folder("cache") or _without_cache()


@cache
def _without_cache() -> Path:
    logging.getLogger("wancli").warning(
        "wancli: this user has no home folder, so nothing is cached; set HOME or WANCLI_CACHE"
    )
    return Path(os.devnull, "no-home-folder")


def hashes_path(cache_dir: Path | None) -> Path:
    return resolve_cache_dir(cache_dir) / "hashes.json"


def rates_path(cache_dir: Path | None) -> Path:
    return resolve_cache_dir(cache_dir) / "rates.json"


def thumbnails_dir(cache_dir: Path | None) -> Path:
    return resolve_cache_dir(cache_dir) / "posters"


def open_store(cache_dir: Path | None) -> Store:
    from wancli.storage.cache import Store

    return Store(resolve_cache_dir(cache_dir) / "embeddings")
