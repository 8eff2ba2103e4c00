"""`wancli report`: a page about rendered shots."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wancli.commands._common import load_job, plan_job, thumbnails_dir
from wancli.commands._options import CacheDir
from wancli.errors import ExitStatus
from wancli.storage import disk


def report_command(
    what: Annotated[
        str,
        typer.Argument(metavar="DIR|JOB", help="A folder of renders, of any number of jobs; or a job file."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="The page. Default: beside the outputs."),
    ] = None,
    table: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Also a CSV file with a line per shot.")
    ] = None,
    cache_dir: CacheDir = None,
) -> int:
    """Make a page about rendered shots.

    One HTML file: shapes, blocks, memory, prompts, time, videos, and a table of all shots.
    Prints its path.
    """
    from wancli.job.cli_overrides import NO_OVERRIDES
    from wancli.report import batch_report, shots_table
    from wancli.report.html import collect, page

    if disk.is_folder(Path(what)):
        path = Path(what) / "report.html"
        found = collect.collect_folder(Path(what))
    else:
        plan = plan_job(load_job(what, NO_OVERRIDES), cache_dir)
        report = batch_report.report_path(plan)
        found, path = collect.collect_plan(plan, report), report.with_suffix(".html")
    path = output or path
    page.publish_page(path, page.render_page(found, path.absolute(), thumbnails_dir(cache_dir), make=True))
    print(path)
    if table:
        rows = [shots_table.shot_row(entry, job) for job, entry in found.entries]
        shots_table.write_csv(table, shots_table.to_csv(rows, [entry.labels for _, entry in found.entries]))
        print(table)
    return ExitStatus.OK
