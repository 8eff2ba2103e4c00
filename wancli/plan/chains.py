"""Chains: shots that begin with a frame of another shot's video. Which shots they are, and in which order."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter

from wancli.errors import JobError
from wancli.job.loader import Item
from wancli.plan.shot import Shot


def order_items(items: Sequence[Item]) -> list[tuple[int, int | None]]:
    """Return the index of every item and of the item that it continues, each after the one it continues.

    Items keep their order as far as possible. Raises JobError, with all problems, if a shot is missing or
    shots wait for each other in a circle.
    """
    index_by_id = {item.id: index for index, item in enumerate(items)}
    parents: dict[int, int | None] = {}
    problems: list[str] = []
    hints: list[str] = []
    for index, item in enumerate(items):
        wanted = item.linked_id
        parents[index] = None if wanted is None else index_by_id.get(wanted)
        if wanted is not None and parents[index] is None:
            near = difflib.get_close_matches(wanted, index_by_id, 1)
            problems.append(f"{item.location('image', 'shot')}: no shot has the id {wanted!r}")
            hints.append(f"did you mean {near[0]!r}?" if near else f"ids: {', '.join([*index_by_id][:8])}")
    if problems:
        raise JobError("\n".join(problems), hint="\n".join(dict.fromkeys(hints)))
    try:
        order = TopologicalSorter(
            {index: () if parent is None else (parent,) for index, parent in parents.items()}
        ).static_order()
        return [(index, parents[index]) for index in order]
    except CycleError as error:
        circle: list[int] = error.args[1][::-1]
        ids = [items[index].id for index in circle]
        raise JobError(
            f"goes in a circle: {' continues '.join(ids)}",
            where=items[circle[0]].location("image", "shot"),
            hint="The first shot of a chain begins with a picture.",
        ) from None


def mark_kept_frames(shots: Sequence[Shot]) -> list[Shot]:
    """Note in every shot which of its frames other shots begin with."""
    wanted: dict[int, set[int]] = {}
    for shot in shots:
        if link := shot.continues:
            wanted.setdefault(link.shot, set()).add(link.frame)
    return [replace(shot, kept_frames=tuple(sorted(wanted.get(shot.index, ())))) for shot in shots]


def split_waves(shots: Sequence[Shot]) -> Iterator[list[Shot]]:
    """Yield the shots in waves: no shot continues one of its own wave or of a later one.

    A shot that continues one that is not among these shots is in the first wave.
    """
    left = {shot.index: shot for shot in shots}
    while left:
        wave = [shot for shot in left.values() if not (shot.continues and shot.continues.shot in left)]
        yield wave
        for shot in wave:
            del left[shot.index]
