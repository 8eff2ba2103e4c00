"""Which shots of a job are compared, and beside which of them each is judged."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace

from wancli.errors import JobError
from wancli.job.loader import JobFile
from wancli.job.schema import Compare
from wancli.plan.shot import Comparison, Shot


def decide(jobs: JobFile, shots: Sequence[Shot]) -> Comparison | None:
    """All shots that say `compare`; None where none does. The baseline of all is the one that they name.
    Where they name none it is, for each, the shot that has neither injections nor LoRAs and differs from it
    in nothing else; for those without such a shot the first that has neither, else the first.

    Raises JobError."""
    asked = [shot for shot in shots if jobs.items[shot.index].job.compare]
    if not asked:
        return None
    said = {
        shot.id: Compare() if wish is True else wish
        for shot in asked
        if (wish := jobs.items[shot.index].job.compare)
    }
    first = said[asked[0].id]
    for shot in asked:
        if said[shot.id] != first:
            raise JobError(
                f"shots {asked[0].id} and {shot.id} want other comparisons",
                where=jobs.items[shot.index].location("compare"),
                hint="Say it once, above `items`; `compare: false` leaves a shot out.",
            )
    if first.baseline is not None and first.baseline not in said:
        near = difflib.get_close_matches(first.baseline, said, 1)
        raise JobError(
            f"no shot that is compared has the id {first.baseline!r}",
            where=jobs.items[asked[0].index].location("compare", "baseline"),
            hint=f"did you mean {near[0]!r}?" if near else f"ids: {', '.join(list(said)[:8])}",
        )
    plain = [shot for shot in asked if _is_plain(shot)]
    baseline = first.baseline or [*plain, *asked][0].id
    own = {} if first.baseline else _own(asked, plain)
    beside = {shot.id: own.get(_stripped(shot), baseline) for shot in asked}
    return Comparison(beside, baseline, first.sheet, first.video)


def _own(asked: Sequence[Shot], plain: Sequence[Shot]) -> dict[str, str]:
    """The first plain shot of each kind that others are of, too: by what is left of those when stripped."""
    wanted = {_stripped(shot) for shot in asked if not _is_plain(shot)}
    found: dict[str, str] = {}
    for shot in plain:
        if (key := _stripped(shot)) in wanted:
            found.setdefault(key, shot.id)
    return found


def _is_plain(shot: Shot) -> bool:
    return not shot.injects and not shot.loras


def _stripped(shot: Shot) -> str:
    """The same for shots that differ in nothing but injections and LoRAs."""
    return replace(shot, rules=(), injected=(), loras=()).key
