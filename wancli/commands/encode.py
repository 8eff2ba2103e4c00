"""`wancli encode`: prompts to embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wancli.commands._common import display_of, emit, flags_of, memo_of, store_of
from wancli.commands._options import (
    CacheDir,
    Items,
    Json,
    ModelDir,
    Progressing,
    ProgressMode,
    Quiet,
    Sets,
    Shard,
    Sweeps,
)
from wancli.errors import ExitStatus


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
    from wancli.commands import _prompt_inputs
    from wancli.engine.context import RenderContext
    from wancli.report import terminal

    display = display_of(progress.value, quiet)
    flags = flags_of(sets, sweeps, items, shard)
    work = _prompt_inputs.requested(what, model, max_tokens, truncate, memo_of(cache_dir), flags)
    rows = _prompt_inputs.run(work, out, RenderContext(store_of(cache_dir) if cache else None, display))
    if as_json:
        emit(rows)
    else:
        terminal.show(terminal.encoded_lines(rows))
    return ExitStatus.OK
