"""The options that several commands have."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class LogLevel(StrEnum):
    off = "off"
    basic = "basic"
    verbose = "verbose"
    trace = "trace"


class Engine(StrEnum):
    local = "local"
    ray = "ray"


class ProgressMode(StrEnum):
    auto = "auto"
    bar = "bar"
    plain = "plain"
    none = "none"


class RenderProgress(StrEnum):
    auto = "auto"
    bar = "bar"
    plain = "plain"
    none = "none"
    openjd = "openjd"


JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="A job file; - reads it from stdin.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout instead of text.")]
JsonEvents = Annotated[
    bool,
    typer.Option(
        "--json-stream",
        help="Events on stdout as they happen, one JSON document per line; see `wancli schema --events`.",
    ),
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Render again; an existing output moves aside as NAME.old-1.mp4.")
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="The embedding cache. Default: $WANCLI_CACHE, else the user's cache folder."
    ),
]
LogLevelOption = Annotated[
    LogLevel, typer.Option(help="verbose measures what each block's injection changed; trace adds stacks.")
]
ProgressOption = Annotated[ProgressMode, typer.Option(help="How to show progress on stderr.")]
RenderProgressOption = Annotated[
    RenderProgress,
    typer.Option(
        help="How to show progress on stderr; openjd: on stdout, in the format of Open Job Description."
    ),
]
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
Picks = Annotated[
    list[str] | None,
    typer.Option("--pick", metavar="ID[,ID]", help="Only the shots with these ids. Repeatable."),
]
SaveEvery = Annotated[
    str | None,
    typer.Option(
        "--save-every",
        metavar="TIME|STEPS",
        help="How often the state of sampling is saved: 30s, 5min, or 5 for five steps. Default: 60s.",
    ),
]
FailFast = Annotated[bool, typer.Option("--fail-fast", help="End at the first shot that fails.")]
MaxFailures = Annotated[
    int | None,
    typer.Option("--max-failures", metavar="N", min=1, help="End when N shots have failed."),
]
Retries = Annotated[
    int,
    typer.Option(
        "--retries",
        metavar="N",
        min=0,
        help="Try a shot up to N more times after an error that may pass: ffmpeg, disk, memory.",
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
EngineOption = Annotated[
    Engine,
    typer.Option("--engine", help="ray: workers on a Ray cluster, one for each GPU. Needs wancli[ray]."),
]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="auto|HOST:PORT",
        help="The Ray cluster. Default: a new one on this machine, for this command.",
    ),
]
CpusPerWorker = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Cores of each worker of --engine ray without GPUs. Default: all."),
]
NoWait = Annotated[
    bool,
    typer.Option("--no-wait", help="Exit with 75 instead of waiting for shots that other workers claimed."),
]
ModelDir = Annotated[
    Path | None,
    typer.Option(
        "--model", metavar="DIR", help="The checkpoint: a folder, a file, or a name. Default: wan-mini."
    ),
]
Socket = Annotated[
    str | None,
    typer.Option(
        "--socket",
        metavar="auto|PATH",
        envvar="WANCLI_SOCKET",
        help="Render on the `wancli serve` at this socket; auto: on the user's own server, if there is one.",
    ),
]
