"""The comparison that a job asks for: the compared shots, and the baseline of each."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace

from wancli.errors import JobError
from wancli.job.loader import JobFile
from wancli.job.schema import Compare
from wancli.plan.render_plan import Comparison
from wancli.plan.shot import Shot


def plan_comparison(jobs: JobFile, shots: Sequence[Shot]) -> Comparison | None:
    """Plan the comparison of all shots with `compare`. Returns None if no shot has it.

    A named baseline is that of all. Otherwise the baseline of a shot is the plain one that differs in
    nothing else. A shot without such a baseline is compared with nothing. A plain shot has no injections, and
    no LoRAs and no step cache unless all shots have the same.

    Raises JobError."""
    compared = [shot for shot in shots if jobs.items[shot.index].job.compare]
    if not compared:
        return None
    requests = {
        shot.id: Compare() if request is True else request
        for shot in compared
        if (request := jobs.items[shot.index].job.compare)
    }
    first = requests[compared[0].id]
    for shot in compared:
        if requests[shot.id] != first:
            raise JobError(
                f"shots {compared[0].id} and {shot.id} want other comparisons",
                where=jobs.items[shot.index].location("compare"),
                hint="Say it once, above `items`; `compare: false` leaves a shot out.",
            )
    if first.baseline is not None and first.baseline not in requests:
        near = difflib.get_close_matches(first.baseline, requests, 1)
        raise JobError(
            f"no shot that is compared has the id {first.baseline!r}",
            where=jobs.items[compared[0].index].location("compare", "baseline"),
            hint=f"did you mean {near[0]!r}?" if near else f"ids: {', '.join(list(requests)[:8])}",
        )
    drops_loras = len({repr([use.pixel_settings for use in shot.loras]) for shot in compared}) > 1
    drops_cache = len({shot.cache and shot.cache.settings for shot in compared}) > 1
    keys = {shot.id: _key_without_injections(shot, drops_loras, drops_cache) for shot in compared}
    plain = [
        shot
        for shot in compared
        if not (shot.injects or (drops_loras and shot.loras) or (drops_cache and shot.cache))
    ]
    wanted = {keys[shot.id] for shot in compared if shot not in plain}
    own = {keys[shot.id]: shot.id for shot in reversed(plain) if keys[shot.id] in wanted}
    baselines = {id: first.baseline or own.get(key) for id, key in keys.items()}
    default = first.baseline or next((id for id in baselines.values() if id), compared[0].id)
    added = tuple(shot.id for shot in compared if jobs.items[shot.index].is_added)
    return Comparison(baselines, default, first.sheet, first.video, added)


def _key_without_injections(shot: Shot, drops_loras: bool, drops_cache: bool) -> str:
    """Return a key that is the same for shots that differ only in injections, emphasis and steering, and in
    LoRAs and step caches if these count. The forced steps of a cache are those of injections.
    """
    plain = replace(shot, rules=(), injected=(), emphasis=(), steering=(), steering_prompts=())
    plain = replace(plain, loras=() if drops_loras else shot.loras, cache=None)
    return f"{plain.key} {shot.cache and shot.cache.settings if not drops_cache else None}"
