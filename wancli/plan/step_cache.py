"""Decide which forwards of a shot reuse the residual of an earlier one: `cache` of a job."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from wancli.errors import JobError
from wancli.job.loader import Item
from wancli.job.schema_cache import CacheOptions
from wancli.plan.prefix_sharing import PrefixTree
from wancli.plan.shot import Shot
from wancli.sampling.solvers import SOLVERS
from wancli.sampling.step_cache import CacheSettings, StepCache, reuse_by_magnitude
from wancli.storage import disk
from wancli.units import format_ranges

MIN_STEPS = 12  # with fewer every step matters


def compile_cache(shot: Shot, item: Item) -> StepCache | None:
    """Return the step cache that a job asks for; None if it asks for none. Raises JobError."""
    options = item.job.cache_options
    if options is None:
        return None
    _refuse_few_steps(shot, item, options)
    table = _find_table(shot, item, options)
    wanted = {key: getattr(options, key) for key in ("threshold", "skips", "retention", "expert")}
    usual = {"expert": "both"} | {key: table[key] for key in wanted if key in table}
    given = {key: value for key, value in wanted.items() if value is not None}
    settings = CacheSettings(method=options.method, table=table["name"], **usual | given)
    stages = [stage.steps for stage in shot.stages if settings.expert in ("both", stage.expert)]
    changed = PrefixTree().changed_steps(shot)
    reused = []
    for branch, runs_at in shot.table.steps_by_branch.items():
        found = reuse_by_magnitude(table[branch], settings, shot.steps, stages, changed)
        reused.append((branch, tuple(step for step in found if step in runs_at)))
    return StepCache(settings, tuple(reused))


def refuse_measuring_reuse(shot: Shot, item: Item) -> None:
    """Raise JobError if effects or attention maps are to be measured in forwards that run no block."""
    if not shot.reused:
        return
    steps = {step for step, _ in shot.reused}
    if shot.measure and shot.injects:
        _refuse_in("effects are", sorted(steps), item, "measure")
    if shot.attention and (both := sorted(step for step in steps if shot.attention.blocks_at(step))):
        _refuse_in("attention maps are", both, item, "attention")


def _refuse_in(measured: str, steps: list[int], item: Item, key: str) -> NoReturn:
    raise JobError(
        f"{measured} measured in blocks, and at the steps {format_ranges(steps)} the cache runs none",
        where=item.location(key),
        hint="Leave out `cache`, whose plan stays the same, or measure a shot with `cache: none`.",
    )


def _refuse_few_steps(shot: Shot, item: Item, options: CacheOptions) -> None:
    if options.force or (SOLVERS[shot.solver].steps is None and shot.steps >= MIN_STEPS):
        return
    raise JobError(
        f"a cache needs {MIN_STEPS} steps and a model that is not distilled: with {shot.solver} and "
        f"{shot.steps} steps every step matters",
        where=item.location("cache"),
        hint="Leave out `cache`, or write `cache: {force: true}` to have it anyway.",
    )


def _find_table(shot: Shot, item: Item, options: CacheOptions) -> dict[str, Any]:
    """Return the published ratios of a model, its own or the named one, with the settings made for them."""
    tables = _published()
    name = shot.model.checkpoint.variant.name
    wanted = options.table or (f"{name}-image" if shot.pictures and f"{name}-image" in tables else name)
    if wanted not in tables:
        raise JobError(
            f"{wanted} is not a table" if options.table else f"no table of {wanted} is published",
            where=item.location("cache", "table") if options.table else item.location("cache"),
            hint=f"`cache: {{table: NAME}}` takes that of another model: {', '.join(tables)}.",
        )
    experts = {stage.expert for stage in shot.stages}
    if options.expert in ("high", "low") and options.expert not in experts:
        raise JobError(f"no step is of the expert {options.expert!r}", where=item.location("cache", "expert"))
    return tables[wanted] | {"name": wanted}


@cache
def _published() -> dict[str, dict[str, Any]]:
    path = Path(__file__).parents[1] / "assets" / "magcache.json"
    tables: dict[str, dict[str, Any]] = json.loads(disk.read_bytes(path))
    return tables
