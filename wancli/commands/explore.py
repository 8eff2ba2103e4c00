"""`wancli explore`: a page about models, without a render."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wancli.errors import ExitStatus


def explore_command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="A released model by name, a name of models.yaml, or a checkpoint."
        ),
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The page.")] = Path(
        "explore.html"
    ),
) -> int:
    """Make a page about models, without a render.

    Shapes, the cost of every part of a block, and a memory calculator, for all released Wan models
    or for yours. Prints its path.
    """
    from wancli.report.html import explore, page

    page.publish_page(output, page.render_html(explore.explore_document(model)))
    print(output)
    return ExitStatus.OK
