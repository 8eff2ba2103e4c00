"""`wancli encode`: prompts to embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wancli.commands._common import create_display, hashes_path, open_store, print_json
from wancli.commands._option_groups import JobChanges, takes_groups
from wancli.commands._options import (
    CacheDir,
    Json,
    ModelDir,
    ProgressMode,
    ProgressOption,
    Quiet,
)
from wancli.errors import ExitStatus


@takes_groups
def encode_command(
    what: Annotated[
        list[str] | None,
        typer.Argument(metavar="JOB|PROMPT...", help="A job file, prompts, or - for stdin."),
    ] = None,
    *,
    toward: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Write --out for `steer`: steer toward this prompt. Repeatable."),
    ] = None,
    away: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="As --toward: steer away from it. Repeatable.")
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep the embeddings in the cache.")
    ] = True,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the embeddings to a .safetensors file.")
    ] = None,
    model: ModelDir = None,
    max_tokens: Annotated[int, typer.Option(help="256 or 512, for prompts on the command line.")] = 256,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut longer prompts instead of rejecting them.")
    ] = False,
    changes: JobChanges,
    as_json: Json = False,
    cache_dir: CacheDir = None,
    progress: ProgressOption = ProgressMode.auto,
    quiet: Quiet = False,
) -> int:
    """Turn prompts into embeddings: stage 1 alone.

    Each embedding is computed once ever and kept in the cache. Prints one key per prompt.
    """
    from wancli.commands import _prompt_inputs
    from wancli.engine.context import RenderContext
    from wancli.report import prompt_text, terminal

    display = create_display(progress.value, quiet)
    hashes = hashes_path(cache_dir)
    texts, roles = _prompt_inputs.list_roles(what or [], toward or [], away or [], out)
    if roles:
        work = _prompt_inputs.tokenize_texts(texts, model, max_tokens, truncate, hashes)
    else:
        work = _prompt_inputs.read_prompts(texts, model, max_tokens, truncate, hashes, changes.flags)
    rows = _prompt_inputs.encode_prompts(
        work, out, RenderContext(open_store(cache_dir) if cache else None, display), roles
    )
    if as_json:
        print_json(rows)
    else:
        terminal.show(prompt_text.format_encoded(rows))
    return ExitStatus.OK
