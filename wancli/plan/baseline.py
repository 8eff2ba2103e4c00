"""The comparison that a job asks for: the compared shots, and the baseline of each."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace

from wancli.errors import JobError
from wancli.job.loader import JobFile
from wancli.job.schema import Compare
from wancli.plan.shot import Comparison, Shot


def plan_comparison(jobs: JobFile, shots: Sequence[Shot]) -> Comparison | None:
    """Plan the comparison of all shots with `compare`. Returns None if no shot has it.

    A named baseline is that of all. Otherwise the baseline of a shot is the one with neither injections nor
    LoRAs that differs in nothing else; else the first shot with neither; else the first.

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
    plain = [shot for shot in compared if _is_plain(shot)]
    baseline = first.baseline or [*plain, *compared][0].id
    own = {} if first.baseline else _plain_counterparts(compared, plain)
    baselines = {shot.id: own.get(_key_without_injections(shot), baseline) for shot in compared}
    return Comparison(baselines, baseline, first.sheet, first.video)


def _plain_counterparts(compared: Sequence[Shot], plain: Sequence[Shot]) -> dict[str, str]:
    """Return the first plain shot that differs from others only in injections and LoRAs, by common key."""
    wanted = {_key_without_injections(shot) for shot in compared if not _is_plain(shot)}
    counterparts: dict[str, str] = {}
    for shot in plain:
        if (key := _key_without_injections(shot)) in wanted:
            counterparts.setdefault(key, shot.id)
    return counterparts


def _is_plain(shot: Shot) -> bool:
    return not shot.injects and not shot.loras


def _key_without_injections(shot: Shot) -> str:
    """Return a key that is the same for shots that differ only in injections and LoRAs."""
    return replace(shot, rules=(), injected=(), loras=()).key
