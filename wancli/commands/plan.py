"""`wancli plan`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from wancli.commands._common import load_job, open_store, plan_job, print_json, rates_path
from wancli.commands._option_groups import JobChanges, takes_groups
from wancli.commands._options import CacheDir, JobArgument, Json
from wancli.errors import ExitStatus
from wancli.progress import make_printable


@takes_groups
def plan_command(
    job: JobArgument,
    *,
    verbose: Annotated[
        bool,
        typer.Option(
            "-v", "--verbose", help="Also show prompts, sigmas and the injection strength of each block."
        ),
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Plan for this much memory, 24GiB; also show what other settings need."
        ),
    ] = None,
    changes: JobChanges,
    as_json: Json = False,
    cache_dir: CacheDir = None,
) -> int:
    """Show what a render would do.

    Shots, noise levels, injection per block, prompts to encode, memory, time. Loads no model.
    """
    from wancli.engine import preflight
    from wancli.plan import memory_policy, throughput
    from wancli.report import plan_document, plan_tables, terminal
    from wancli.units import parse_size

    budget = None if memory is None else parse_size(memory, "--memory")
    plan = plan_job(load_job(job, changes.flags), cache_dir, budget=budget)
    store, known = open_store(cache_dir), throughput.read_rates(rates_path(cache_dir))
    outputs = plan_document.output_states(plan.shots)
    if as_json:
        print_json(plan_document.plan_document(plan, outputs, store, known))
    else:
        tables = plan_tables.format_plan(
            plan, outputs, store, known, verbose=verbose, others=budget is not None
        )
        terminal.show(tables)
        missing = preflight.missing_capabilities(plan.shots)
        unreadable = plan_document.unreadable_outputs(plan.shots, outputs)
        for warning in (*plan.warnings, *missing, *unreadable):
            print(make_printable(f"wancli: warning: {warning}"), file=sys.stderr)
    for shot, found in zip(plan.shots, outputs):
        if found.state != "done":
            encoded = all(text["cached"] for text in plan_document.prompt_rows([shot], store))
            memory_policy.require(shot, plan.schedule.placement(shot), encoded=encoded)
    return ExitStatus.OK
