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
Socket = Annotated[
    str | None,
    typer.Option(
        "--socket",
        metavar="auto|PATH",
        envvar="WANCLI_SOCKET",
        help="Let `wancli serve` render, there; auto: if one serves at the user's own place.",
    ),
]
