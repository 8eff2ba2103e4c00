"""The commands. Parse, call, and turn what was raised into an exit code; no logic, no torch.

stdout carries results only: paths, or one JSON document. Everything else goes to stderr.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shlex
import sys
import tempfile
import traceback
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wancli import __version__
from wancli.errors import ExitStatus, JobError, Stopped, WancliError, stack
from wancli.events import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wancli.flags import Flags
    from wancli.jobfile import JobFile
    from wancli.pipeline import Outcome
    from wancli.shot import Plan
    from wancli.store import Store

app = typer.Typer(
    name="wancli",
    help="Render Wan text-to-video in batches, with a second prompt injected into chosen blocks.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache_app = typer.Typer(help="List, verify or shrink the embedding cache.")
app.add_typer(cache_app, name="cache")


class LogLevel(StrEnum):
    off = "off"
    basic = "basic"
    verbose = "verbose"
    trace = "trace"


class ProgressMode(StrEnum):
    auto = "auto"
    bar = "bar"
    plain = "plain"
    none = "none"


JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="A job file; - reads it from stdin.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout instead of text.")]
Force = Annotated[
    bool, typer.Option("--force", help="Render again; what is there moves aside as NAME.old-1.mp4.")
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="The embedding cache. Default: $WANCLI_CACHE, else the user's cache folder."
    ),
]
Level = Annotated[
    LogLevel, typer.Option(help="verbose measures what each block's injection changed; trace adds stacks.")
]
Progressing = Annotated[ProgressMode, typer.Option(help="How to show progress on stderr.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Only errors on stderr.")]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a key of every shot: sampler.steps=20. Repeatable."
    ),
]
Sweeps = Annotated[
    list[str] | None,
    typer.Option(
        "--sweep",
        metavar="KEY=VALUES",
        help="Render every shot with each value: seed=1,2,3. Repeatable; replaces an axis of `matrix`.",
    ),
]
Items = Annotated[
    str | None, typer.Option("--items", metavar="RANGES", help="Only these shots, from 0: 0-9,12 or 1-9:2.")
]
SaveEvery = Annotated[
    str | None,
    typer.Option(
        "--save-every",
        metavar="TIME|STEPS",
        help="How often the state of sampling goes to disk: 30s, 5min, or 5 for five steps. Default: 60s.",
    ),
]
Shard = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="I/N",
        help="Only part I, from 0, of N: neighbouring shots, which share the most work.",
    ),
]
ModelDir = Annotated[
    Path | None,
    typer.Option(
        "--model", metavar="DIR", help="The checkpoint: a folder, a file, or a name. Default: wan-mini."
    ),
]


def main() -> None:
    """The `wancli` command."""
    # Threads that spin while they wait stall each other when a machine runs more of them than it has
    # cores, as farms do: seconds instead of milliseconds a step. Waiting quietly costs next to nothing.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Tensors of many MB in large pages: touching fresh memory costs a third of the time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name in Chinese on a terminal in latin-1
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs one command line and returns its exit code; the only place where errors become codes."""
    try:
        code = int(app(arguments, prog_name="wancli", standalone_mode=False) or 0)
    except WancliError as error:
        complain(error)
        if isinstance(error, Stopped):
            print(printable(f"  go on: wancli {shlex.join(arguments)}"), file=sys.stderr)
        return error.status
    except typer.TyperException as error:
        print(
            f"wancli: {error.format_message()}\n  `wancli COMMAND --help` lists what there is.",
            file=sys.stderr,
        )
        return ExitStatus.USAGE
    except Exception:
        with tempfile.NamedTemporaryFile("w", prefix="wancli-", suffix=".log", delete=False) as log:
            traceback.print_exc(file=log)
        print(f"wancli: a bug in wancli {__version__}; please report it with {log.name}", file=sys.stderr)
        return ExitStatus.BUG
    if code == ExitStatus.INTERRUPTED:  # typer makes this of Ctrl-C, and exits with 1 when stdout is closed
        print("wancli: interrupted; finished shots are kept, run again to go on", file=sys.stderr)
    return code


def complain(error: WancliError, prefix: str = "") -> None:
    """The message, then the way out, on stderr."""
    for line in str(error).split("\n"):
        print(printable(f"wancli: {prefix}{line}"), file=sys.stderr)
    for line in error.hint.splitlines():
        print(printable(f"  {line}"), file=sys.stderr)


def emit(document: Any) -> None:
    json.dump(document, sys.stdout, indent=2)
    print()


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        print(f"wancli {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def render(
    job: Annotated[
        str | None, typer.Argument(metavar="JOB", help="A job file; - reads it from stdin.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Instead of a job: one video of this, by wan-mini.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="FILE", help="Where it goes. Default: {slug}.mp4"),
    ] = None,
    sets: Sets = None,
    sweeps: Sweeps = None,
    items: Items = None,
    shard: Shard = None,
    save_every: SaveEvery = None,
    force: Force = False,
    as_json: Json = False,
    cache_dir: CacheDir = None,
    log_level: Level = LogLevel.basic,
    progress: Progressing = ProgressMode.auto,
    quiet: Quiet = False,
) -> int:
    """Render every shot of a job, or a prompt.

    Writes MP4s, a manifest beside each, and a report. A shot whose manifest verifies is not
    rendered again, one that was stopped on its way goes on. Prints one path per finished shot.
    """
    from wancli import events, pipeline, rates, signals
    from wancli.report import data, terminal
    from wancli.tools import Tools

    _hush(quiet)
    measuring = log_level in (LogLevel.verbose, LogLevel.trace)
    every = [] if save_every is None else [f"save_every={save_every}"]
    flags = _flags([*(sets or []), *every], sweeps, items, shard)
    plan = _plan(_said(job, prompt, output, flags), cache_dir, measure=measuring)
    display = events.progress(sys.stderr, "none" if quiet else progress.value)
    for warning in plan.warnings:
        display.warn(warning)
    outcomes: list[pipeline.Outcome] = []
    known = rates.read(_rates(cache_dir))
    expected = data.time_of(plan.shots, _store(cache_dir), known)["phases"]
    stopped: Stopped | None = None
    try:
        with signals.listening() as stop:
            tools = Tools(_store(cache_dir), display, force, stop)
            for outcome in _traced(pipeline.render(plan, tools), log_level):
                outcomes.append(outcome)
                if outcome.error:
                    complain(outcome.error, f"shot {outcome.shot.id}: ")
                elif outcome.record and not as_json:
                    print(outcome.shot.output, flush=True)
    except Stopped as error:
        stopped = error
    except BaseException:
        if outcomes:
            with suppress(WancliError):  # the first error is the one to tell
                data.write(plan, data.build(plan, outcomes))
        raise
    fresh = [(o.shot, o.record) for o in outcomes if o.status == "rendered" and o.record]
    rates.remember(_rates(cache_dir), rates.learned(fresh))
    report = data.build(plan, outcomes, expected)
    path = data.write(plan, report)
    if as_json:
        emit(report)
    if not quiet:
        shown = terminal.summary(report, path, injections=log_level is not LogLevel.off, effects=measuring)
        terminal.show(shown, stderr=True)
    if stopped:
        raise stopped
    return ExitStatus.SOME_FAILED if any(o.error for o in outcomes) else ExitStatus.OK


@app.command("plan")
def plan_command(
    job: JobArgument,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Also prompts, sigmas and the strip of blocks.")
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Plan for this much, 24GiB; also show what other settings need."),
    ] = None,
    sets: Sets = None,
    sweeps: Sweeps = None,
    items: Items = None,
    shard: Shard = None,
    as_json: Json = False,
    cache_dir: CacheDir = None,
) -> int:
    """Show what a render would do.

    Shots, noise levels, injection per block, prompts to encode, memory, time. Loads no model.
    """
    from wancli import choose, rates
    from wancli.report import data, planned, terminal
    from wancli.units import parse_size

    budget = None if memory is None else parse_size(memory, "--memory")
    plan = _plan(_job(job, _flags(sets, sweeps, items, shard)), cache_dir, budget=budget)
    store, known = _store(cache_dir), rates.read(_rates(cache_dir))
    if as_json:
        emit(data.of_plan(plan, store, known))
    else:
        terminal.show(planned.plan_tables(plan, store, known, verbose=verbose, others=budget is not None))
        for warning in plan.warnings:
            print(printable(f"wancli: warning: {warning}"), file=sys.stderr)
    for shot in plan.shots:
        if data.state(shot) != "done":
            choose.require(shot, encoded=all(text["cached"] for text in data.cached([shot], store)))
    return ExitStatus.OK


@app.command("schema")
def schema_command() -> int:
    """Print the JSON Schema of a job file.

    Editors complete and check keys with it.
    """
    from wancli import schema

    emit(schema.of_job())
    return ExitStatus.OK


@app.command("encode")
def encode_command(
    what: Annotated[
        list[str], typer.Argument(metavar="JOB|PROMPT...", help="A job file, prompts, or - for stdin.")
    ],
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep the embeddings in the cache.")
    ] = True,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write them to a .safetensors file.")
    ] = None,
    model: ModelDir = None,
    max_tokens: Annotated[int, typer.Option(help="256 or 512; for prompts given here.")] = 256,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut longer prompts instead of refusing them.")
    ] = False,
    sets: Sets = None,
    sweeps: Sweeps = None,
    items: Items = None,
    shard: Shard = None,
    as_json: Json = False,
    cache_dir: CacheDir = None,
    progress: Progressing = ProgressMode.auto,
    quiet: Quiet = False,
) -> int:
    """Turn prompts into embeddings: stage 1 alone.

    Each is computed once ever and kept in the cache. Prints one key per prompt.
    """
    from wancli import events, stage1
    from wancli.report import terminal
    from wancli.tools import Tools

    _hush(quiet)
    display = events.progress(sys.stderr, "none" if quiet else progress.value)
    flags = _flags(sets, sweeps, items, shard)
    work = stage1.requested(what, model, max_tokens, truncate, _memo(cache_dir), flags)
    rows = stage1.run(work, out, Tools(_store(cache_dir) if cache else None, display))
    if as_json:
        emit(rows)
    else:
        terminal.show(terminal.encoded_lines(rows))
    return ExitStatus.OK


@app.command("decode")
def decode_command(
    latents: Annotated[
        Path, typer.Argument(metavar="NAME.latents.safetensors", help="A latent that a render left.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Default: the name it was made for.")
    ] = None,
    model: ModelDir = None,
    force: Force = False,
    progress: Progressing = ProgressMode.auto,
    quiet: Quiet = False,
) -> int:
    """Finish a shot from its latent.

    Decodes it, writes and verifies the MP4, prints its path. The latent stays.
    """
    from wancli import events, stage3
    from wancli.tools import Tools

    _hush(quiet)
    display = events.progress(sys.stderr, "none" if quiet else progress.value)
    print(stage3.decode_file(latents, output, model, _memo(None), Tools(None, display, force)))
    return ExitStatus.OK


@app.command("diff")
def diff_command(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="A B", help="Two prompts.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Both from a file: a job (prompt against injections), a text, an embedding file.",
        ),
    ] = None,
    model: ModelDir = None,
    dit: Annotated[
        bool, typer.Option("--dit/--no-dit", help="Also compare what the transformer's blocks read.")
    ] = True,
    sets: Sets = None,
    sweeps: Sweeps = None,
    items: Items = None,
    shard: Shard = None,
    as_json: Json = False,
    cache_dir: CacheDir = None,
    quiet: Quiet = False,
) -> int:
    """Measure how different two prompts are.

    As the model reads them. Aim for more than 50 % before you inject one into the other.
    """
    from wancli import events, stage1
    from wancli.report import terminal
    from wancli.tools import Tools

    _hush(quiet)
    display = events.progress(sys.stderr, "none" if quiet else "auto")
    flags = _flags(sets, sweeps, items, shard)
    pairs = stage1.pairs(prompts or [], file, model, _memo(cache_dir), flags)
    tools = Tools(_store(cache_dir), display)
    differences = [stage1.compared(pair, tools, dit=dit) for pair in pairs]
    if as_json:
        emit([d.as_dict() for d in differences] if len(differences) > 1 else differences[0].as_dict())
    else:
        terminal.show(terminal.difference_tables(differences))
    return ExitStatus.OK


@app.command("compare")
def compare_command(
    videos: Annotated[list[Path], typer.Argument(metavar="VIDEO...", help="MP4 files.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The picture.")] = Path(
        "contact-sheet.png"
    ),
) -> int:
    """Put videos side by side: a contact sheet.

    A PNG with frames of each, from first to last, under what its manifest says it is.
    """
    from wancli.report import sheet

    sheet.write(output, sheet.contact_sheet(videos))
    print(output)
    return ExitStatus.OK


@app.command("inspect")
def inspect_command(
    path: Annotated[
        Path, typer.Argument(metavar="FILE-OR-FOLDER", help="Weights: a checkpoint, a part of one, a LoRA.")
    ],
    deep: Annotated[
        bool, typer.Option("--deep", help="Also look for NaN and Inf in every tensor, and hash the files.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Say what a file or folder of weights is.

    Model and variant, sizes, precision, quantization, LoRA targets, what is missing. Reads headers only.
    """
    from wancli import inspect
    from wancli.report import terminal, weights

    document = inspect.inspect(path, deep=deep)
    if as_json:
        emit(document)
    else:
        terminal.show(weights.inspect_lines(document))
    return ExitStatus.INTEGRITY if inspect.damaged(document) else ExitStatus.OK


@cache_app.command("ls")
def cache_ls(as_json: Json = False, cache_dir: CacheDir = None) -> int:
    """List the embeddings in the cache, last used first."""
    from wancli.report import data, terminal

    rows = data.of_cache(_store(cache_dir))
    if as_json:
        emit(rows)
    else:
        terminal.show(terminal.cache_table(rows))
    return ExitStatus.OK


@cache_app.command("verify")
def cache_verify(as_json: Json = False, cache_dir: CacheDir = None) -> int:
    """Read every entry back.

    Lists damaged ones and exits with 4; a render computes them again.
    """
    store = _store(cache_dir)
    count, damaged = len(store.entries()), [str(entry.path) for entry in store.verify()]
    if as_json:
        emit({"entries": count, "damaged": damaged})
    else:
        print(*damaged, f"{count - len(damaged)} of {count} entries verify", sep="\n")
    return ExitStatus.INTEGRITY if damaged else ExitStatus.OK


@cache_app.command("prune")
def cache_prune(
    max_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Keep the newest up to this: 500MiB, 2GiB.")
    ] = None,
    older_than: Annotated[
        float | None, typer.Option(metavar="DAYS", min=0, help="Remove what was not used for so long.")
    ] = None,
    as_json: Json = False,
    cache_dir: CacheDir = None,
) -> int:
    """Remove old or surplus entries.

    Damaged ones, the oldest beyond a size, those older than some days.
    """
    from wancli.units import parse_size, size

    most = None if max_size is None else parse_size(max_size, "--max-size")
    removed = _store(cache_dir).prune(most, older_than)
    total = sum(entry.bytes for entry in removed)
    if as_json:
        emit({"removed": [entry.key for entry in removed], "bytes": total})
    else:
        print(f"removed {len(removed)} entries, {size(total)}")
    return ExitStatus.OK


def _hush(quiet: bool) -> None:
    """Whether what is logged, the hashing of large files, stays unsaid."""
    logging.getLogger("wancli").disabled = quiet


def _traced(outcomes: Iterator[Outcome], log_level: LogLevel) -> Iterator[Outcome]:
    """With --log-level trace, an error also shows its stack and the tensors in it."""
    try:
        for outcome in outcomes:
            if outcome.error and log_level is LogLevel.trace:
                print(stack(outcome.error), file=sys.stderr)
            yield outcome
    except Exception as error:
        if log_level is LogLevel.trace:
            print(stack(error), file=sys.stderr)
        raise


def _said(job: str | None, prompt: str | None, output: str | None, flags: Flags) -> JobFile:
    from wancli.jobfile import of_prompt

    if prompt is not None and job is None:
        return of_prompt(prompt, output or "{slug}.mp4", flags)
    if job is None or prompt is not None or output is not None:
        raise JobError(
            "give a job file, or --prompt",
            hint='wancli render JOB, or wancli render --prompt "A red circle drifts to the left" -o out.mp4',
        )
    return _job(job, flags)


def _flags(sets: list[str] | None, sweeps: list[str] | None, items: str | None, shard: str | None) -> Flags:
    from wancli.flags import Flags

    return Flags(tuple(sets or ()), tuple(sweeps or ()), items, shard)


def _job(job: str, flags: Flags) -> JobFile:
    from wancli.jobfile import load, parse

    if job == "-":
        return parse(sys.stdin.buffer.read(), "stdin", "stdin", Path.cwd(), flags)
    return load(Path(job), flags)


def _plan(jobs: JobFile, cache_dir: Path | None, *, measure: bool = False, budget: int | None = None) -> Plan:
    from wancli import plan

    return plan.plan(jobs, _memo(cache_dir), measure=measure, budget=budget)


def _cache(cache_dir: Path | None) -> Path:
    from platformdirs import user_cache_path

    said = os.environ.get("WANCLI_CACHE")
    return (cache_dir or (Path(said) if said else user_cache_path("wancli"))).expanduser()


def _memo(cache_dir: Path | None) -> Path:
    return _cache(cache_dir) / "hashes.json"


def _rates(cache_dir: Path | None) -> Path:
    return _cache(cache_dir) / "rates.json"


def _store(cache_dir: Path | None) -> Store:
    from wancli.store import Store

    return Store(_cache(cache_dir) / "embeddings")
