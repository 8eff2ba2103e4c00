"""`wancli plan`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from wancli.commands._common import emit, flags_of, job_of, plan_of, rates_of, store_of
from wancli.commands._options import CacheDir, Items, JobArgument, Json, Sets, Shard, Sweeps
from wancli.errors import ExitStatus
from wancli.progress import make_printable


def plan_command(
    job: JobArgument,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Also prompts, sigmas and the strip of blocks.")
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Plan for this much, 24GiB; also show what other settings need."),
    ] = None,
    sets: Sets = None,
    sweeps: Sweeps = None,
    items: Items = None,
    shard: Shard = None,
    as_json: Json = False,
    cache_dir: CacheDir = None,
) -> int:
    """Show what a render would do.

    Shots, noise levels, injection per block, prompts to encode, memory, time. Loads no model.
    """
    from wancli.engine import preflight
    from wancli.plan import memory_policy, throughput
    from wancli.report import batch_report, plan_tables, terminal
    from wancli.units import parse_size

    budget = None if memory is None else parse_size(memory, "--memory")
    plan = plan_of(job_of(job, flags_of(sets, sweeps, items, shard)), cache_dir, budget=budget)
    store, known = store_of(cache_dir), throughput.read_rates(rates_of(cache_dir))
    states = batch_report.output_states(plan.shots)
    if as_json:
        emit(batch_report.plan_document(plan, states, store, known))
    else:
        tables = plan_tables.plan_tables(
            plan, states, store, known, verbose=verbose, others=budget is not None
        )
        terminal.show(tables)
        for warning in (*plan.warnings, *preflight.missing_capabilities(plan.shots)):
            print(make_printable(f"wancli: warning: {warning}"), file=sys.stderr)
    for shot, found in zip(plan.shots, states):
        if found != "done":
            encoded = all(text["cached"] for text in batch_report.prompt_rows([shot], store))
            memory_policy.require(shot, plan.schedule.placement(shot), encoded=encoded)
    return ExitStatus.OK
