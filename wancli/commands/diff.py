"""`wancli diff`: how different two prompts are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wancli.commands._common import collect_flags, create_display, hashes_path, open_store, print_json
from wancli.commands._options import (
    CacheDir,
    Items,
    Json,
    ModelDir,
    Quiet,
    Sets,
    Shard,
    Sweeps,
)
from wancli.errors import ExitStatus


def diff_command(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="A B", help="Two prompts.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Read both from a file: a job (prompt against injections), a text, an embedding file.",
        ),
    ] = None,
    model: ModelDir = None,
    dit: Annotated[
        bool, typer.Option("--dit/--no-dit", help="Also compare the inputs of the transformer's blocks.")
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

    As the model reads them. Aim for more than 50 % before you inject one prompt into the other.
    """
    from wancli.commands import _prompt_inputs
    from wancli.engine.context import RenderContext
    from wancli.report import prompt_text, terminal

    display = create_display("auto", quiet)
    flags = collect_flags(sets, sweeps, items, shard)
    pairs = _prompt_inputs.read_pairs(prompts or [], file, model, hashes_path(cache_dir), flags)
    context = RenderContext(open_store(cache_dir), display)
    differences = [_prompt_inputs.compare_pair(pair, context, dit=dit) for pair in pairs]
    if as_json:
        print_json([d.as_dict() for d in differences] if len(differences) > 1 else differences[0].as_dict())
    else:
        terminal.show(prompt_text.format_differences(differences))
    return ExitStatus.OK
