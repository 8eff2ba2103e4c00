"""`wancli diff`: how different two prompts are."""

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
    Quiet,
)
from wancli.errors import ExitStatus


@takes_groups
def diff_command(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="A B", help="Two prompts.")] = None,
    *,
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
    changes: JobChanges,
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
    pairs = _prompt_inputs.read_pairs(prompts or [], file, model, hashes_path(cache_dir), changes.flags)
    context = RenderContext(open_store(cache_dir), display)
    differences = [_prompt_inputs.compare_pair(pair, context, dit=dit) for pair in pairs]
    if as_json:
        print_json([d.as_dict() for d in differences] if len(differences) > 1 else differences[0].as_dict())
    else:
        terminal.show(prompt_text.format_differences(differences))
    return ExitStatus.OK
