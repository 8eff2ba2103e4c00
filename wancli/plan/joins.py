"""`join:` of a job: chains of shots whose videos become one, without the frames that two of them share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wancli.errors import JobError
from wancli.job.loader import JobFile
from wancli.plan.outputs import resolve_output
from wancli.plan.pictures import Join
from wancli.plan.shot import Shot


def plan_joins(jobs: JobFile, shots: Sequence[Shot]) -> tuple[Join, ...]:
    """Plan the joined videos of a job. Raises JobError if shots are not a chain, or differ in format."""
    groups: dict[Path, list[Shot]] = {}
    for shot in shots:
        item = jobs.items[shot.index]
        if (template := item.job.join) is not None:
            path = resolve_output(jobs.directory, template, {"job": jobs.name}, item.location("join"))
            groups.setdefault(path, []).append(shot)
    outputs = {shot.output for shot in shots}
    for path, group in groups.items():
        where = jobs.items[group[0].index].location("join")
        if path in outputs:
            raise JobError(f"{path} is the output of a shot", where=where, hint="Choose another name.")
        _refuse_unequal(group, where)
    return tuple(Join(path, _order(group, jobs)) for path, group in groups.items())


def _order(group: Sequence[Shot], jobs: JobFile) -> tuple[int, ...]:
    """Return the indices of a chain in its order. Raises JobError unless each shot continues another."""
    members = {shot.index: shot for shot in group}
    following: dict[int, Shot] = {}
    starts = []
    for shot in group:
        source = shot.continues
        if source is None or source.shot not in members:
            starts.append(shot)
            continue
        where = jobs.items[shot.index].location("join")
        if source.shot in following:
            other = following[source.shot]
            raise JobError(f"{other.id} and {shot.id} both continue {source.id}", where=where)
        if source.frame != members[source.shot].frames - 1:
            message = f"{shot.id} begins with frame {source.frame} of {source.id}, not with the last one"
            raise JobError(message, where=where)
        following[source.shot] = shot
    if len(starts) != 1 or len(group) == 1:
        ids = " and ".join(shot.id for shot in starts[:2])
        raise JobError(
            f"{ids} {'do not continue one another' if len(starts) > 1 else 'is not a chain'}",
            where=jobs.items[starts[-1].index].location("join"),
            hint="Each shot but the first has image: {shot: ID, frame: last} of the one before.",
        )
    order = [starts[0]]
    while order[-1].index in following:
        order.append(following[order[-1].index])
    return tuple(shot.index for shot in order)


def _refuse_unequal(group: Sequence[Shot], where: str) -> None:
    formats = {(shot.width, shot.height, shot.fps): shot.id for shot in group}
    if len(formats) > 1:
        (size, one), (other_size, other), *_ = (
            (f"{w}x{h} at {fps} fps", id) for (w, h, fps), id in formats.items()
        )
        raise JobError(
            f"{one} is {size}, {other} is {other_size}", where=where, hint="Joined videos have one format."
        )
