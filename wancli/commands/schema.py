"""`wancli schema`: the JSON Schema of a job file or of events."""

from __future__ import annotations

from typing import Annotated

import typer

from wancli.commands._common import print_json
from wancli.errors import ExitStatus


def schema_command(
    events: Annotated[
        bool,
        typer.Option("--events", help="Print the schema of the lines of `render --json-stream` instead."),
    ] = False,
) -> int:
    """Print the JSON Schema of a job file.

    Editors use it to complete and check keys.
    """
    from wancli.job import json_schema
    from wancli.report import event_schema

    print_json(event_schema.build_event_schema() if events else json_schema.job_schema())
    return ExitStatus.OK
