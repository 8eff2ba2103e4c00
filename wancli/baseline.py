"""Which shots of a job are compared, and beside which of them the others are judged."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from wancli.errors import JobError
from wancli.job import Compare
from wancli.jobfile import JobFile
from wancli.shot import Comparison, Shot


def decide(jobs: JobFile, shots: Sequence[Shot]) -> Comparison | None:
    """All shots that say `compare`; None where none does. The baseline is the one that they name, else the
    first that injects nothing and has no LoRA, else the first. Raises JobError."""
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
                where=jobs.items[shot.index].where("compare"),
                hint="Say it once, above `items`; `compare: false` leaves a shot out.",
            )
    if first.baseline is not None and first.baseline not in said:
        near = difflib.get_close_matches(first.baseline, said, 1)
        raise JobError(
            f"no shot that is compared has the id {first.baseline!r}",
            where=jobs.items[asked[0].index].where("compare", "baseline"),
            hint=f"did you mean {near[0]!r}?" if near else f"ids: {', '.join(list(said)[:8])}",
        )
    plain = [shot.id for shot in asked if not shot.injects and not shot.loras]
    return Comparison(tuple(said), first.baseline or [*plain, *said][0], first.sheet, first.video)
