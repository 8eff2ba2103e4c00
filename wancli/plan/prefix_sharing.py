"""Steps that shots share: shots that read the same up to some step are the same up to there, so that one
takes these steps for all and the others fork from it.

What a step reads is what was decided: the row of the table for each branch, guidance, and the LoRAs that
are on; how the rules were written does not matter. Pure, and without torch.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wancli.injection.table import Row, Table
    from wancli.plan.shot import Shot


@dataclass(frozen=True)
class Fork:
    """Where a shot leaves the way of another: after `step` steps, which it does not take itself."""

    parent: int  # the index of the other
    step: int


class PrefixTree:
    """The ways of shots of one model from noise to latent; each is added after those it may fork from. Of the
    tables it has seen it knows what its `kin` knows, and the other way round."""

    def __init__(self, kin: PrefixTree | None = None) -> None:
        self._nodes: dict[tuple[int, Hashable], int] = {}  # from a node by what is read to the next
        self._passes: dict[int, int] = {}  # the shot that goes through a node
        self._rows: dict[Row, int] = kin._rows if kin else {}
        # By the id of a table; held, so that it stays the id.
        self._tables: dict[int, tuple[Table, list[Hashable]]] = kin._tables if kin else {}

    def add(self, shot: Shot, start: int = 0) -> Fork | None:
        """Where the shot forks from one before it, as late as can be. `start` says after how many steps it
        has a state of its own: it does not fork before, and others cannot fork from it before."""
        node, fork = 0, None
        way = []
        for step, key in enumerate(self._reads(shot), 1):
            node = self._nodes.setdefault((node, key), len(self._nodes) + 1)
            way.append(node)
            if step > start and node in self._passes:
                fork = Fork(self._passes[node], step)
        own = fork.step if fork else start
        for node in way[max(own - 1, 0) :]:
            self._passes.setdefault(node, shot.index)
        return fork

    def _reads(self, shot: Shot) -> Iterator[Hashable]:
        """All that each step depends on, its number and the steps before it aside."""
        rows = self._rows_of(shot.table)
        sampler = (shot.solver, shot.steps, shot.shift, shot.measure)
        key: Hashable = (shot.seed, shot.noise, shot.latent_shape, sampler)
        for stage in shot.stages:
            of_stage = [use for use in shot.loras if use.expert in (None, stage.expert)]
            for step in stage.steps:
                loras = tuple(
                    (use.sha256, use.strength, use.blocks)
                    for use in of_stage
                    if use.steps is None or step in use.steps
                )
                yield key, rows[step], stage.guidance, loras
                key = None

    def _rows_of(self, table: Table) -> list[Hashable]:
        """Per step a number for the row of each branch; the same for equal rows of any table."""
        if id(table) not in self._tables:
            named: dict[int, int] = {}  # few rows of a table are distinct, and hashing one takes long
            found: list[Hashable] = []
            for step in range(table.steps):
                rows = [table.row(step, branch) for branch in table.branches_at(step)]
                for row in rows:
                    if id(row) not in named:
                        named[id(row)] = self._rows.setdefault(row, len(self._rows))
                found.append(tuple(named[id(row)] for row in rows))
            self._tables[id(table)] = table, found
        return self._tables[id(table)][1]

    def first_step_key(self, shot: Shot) -> Hashable:
        """What the first step reads: shots where it is the same share at least that one."""
        return next(self._reads(shot))
