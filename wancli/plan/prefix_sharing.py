"""Prefix sharing: one shot takes the first steps of several shots.

If shots read the same up to a step, their latents are equal up to that step. One shot takes these steps, and
the other shots fork from it.

What a step reads is the decision, not how the rules were written: the row of the table for each branch, the
expert, its guidance, and the LoRAs that are on. With a step cache it is also which forwards reuse a residual,
in this step and in the next: all shots that share a step keep the same residuals after it. Pure, and without
torch.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wancli.injection.exprs import Row
    from wancli.injection.table import Table
    from wancli.plan.shot import Shot


@dataclass(frozen=True)
class Fork:
    """The point where a shot forks from another: after `step` steps, which it does not take itself."""

    parent: int  # the index of the other shot
    step: int


class PrefixTree:
    """A prefix tree over what each denoising step of one model's shots reads.

    Add a shot after the shots that it may fork from. Trees that share a memo number the rows of tables alike.
    """

    def __init__(self, share_memo_with: PrefixTree | None = None) -> None:
        other = share_memo_with
        self._nodes: dict[tuple[int, Hashable], int] = {}  # from a node by what is read to the next
        self._shot_at: dict[int, int] = {}  # by node the first shot that passes it
        self._row_numbers: dict[Row, int] = other._row_numbers if other else {}
        # By the id of a table; the table is held, so that the id stays its own.
        self._tables: dict[int, tuple[Table, list[Hashable]]] = other._tables if other else {}

    def add(self, shot: Shot, start: int = 0) -> Fork | None:
        """Add a shot and return the latest fork from a shot before it.

        `start` is the number of steps after which the shot has a state of its own: it forks only later than
        that, and others fork from it only at that step or later.
        """
        node, fork = 0, None
        path = []
        for step, key in enumerate(self._step_keys(shot), 1):
            node = self._nodes.setdefault((node, key), len(self._nodes) + 1)
            path.append(node)
            if step > start and node in self._shot_at:
                fork = Fork(self._shot_at[node], step)
        own = fork.step if fork else start
        for node in path[max(own - 1, 0) :]:
            self._shot_at.setdefault(node, shot.index)
        return fork

    def changed_steps(self, shot: Shot) -> frozenset[int]:
        """Return the steps that read, run or guide otherwise than the step before."""
        reads = list(self._step_reads(shot))
        return frozenset(step for step in range(1, len(reads)) if reads[step] != reads[step - 1])

    def _step_keys(self, shot: Shot) -> Iterator[Hashable]:
        """Yield all that each step depends on, except its number and the steps before it."""
        sampler = (shot.solver, shot.steps, shot.shift, shot.measure, shot.attention)
        pictures = shot.pictures and shot.pictures.pixel_settings
        key: Hashable = (shot.seed, shot.noise, shot.latent_shape, sampler, pictures)
        reused = shot.reused
        for step, reads in enumerate(self._step_reads(shot)):
            here = frozenset((i - step, branch) for i, branch in reused if i in (step, step + 1))
            yield key, reads, here
            key = None

    def _step_reads(self, shot: Shot) -> Iterator[Hashable]:
        """Yield what each step reads, the network that it runs, and its guidance."""
        rows = self._number_rows(shot.table)
        for stage in shot.stages:
            of_stage = [use for use in shot.loras if use.expert in (None, stage.expert)]
            for step in stage.steps:
                loras = tuple(
                    (use.sha256, use.strength, use.blocks)
                    for use in of_stage
                    if use.steps is None or step in use.steps
                )
                yield rows[step], stage.expert, stage.guidance, loras

    def _number_rows(self, table: Table) -> list[Hashable]:
        """Return per step a number for the row of each branch; equal rows of any table have the same."""
        if id(table) not in self._tables:
            numbers: dict[int, int] = {}  # few rows of a table are distinct, and hashing one takes long
            by_step: list[Hashable] = []
            for step in range(table.steps):
                rows = [table.row(step, branch) for branch in table.branches_at(step)]
                for row in rows:
                    if id(row) not in numbers:
                        numbers[id(row)] = self._row_numbers.setdefault(row, len(self._row_numbers))
                by_step.append(tuple(numbers[id(row)] for row in rows))
            self._tables[id(table)] = table, by_step
        return self._tables[id(table)][1]

    def first_step_key(self, shot: Shot) -> Hashable:
        """Return what the first step reads: shots with the same key share at least that step."""
        return next(self._step_keys(shot))
