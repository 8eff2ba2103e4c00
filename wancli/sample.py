"""Stage 2: noise to latent, one yield per step.

Letters of shapes: C latent channels, T latent frames, Y X the latent grid, N E a prompt's rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from wancli.errors import InjectionMissed, NotFinite
from wancli.experts import Stage
from wancli.inject import Branch, Cell, Concat, Expr, Lerp, Table, Text
from wancli.models.context import Context, concat, lerp
from wancli.models.dit import WanModel
from wancli.models.layers import Mix
from wancli.probe import Measured
from wancli.solvers import SOLVERS, Schedule, State


def noise(shape_CTYX: tuple[int, ...], seed: int, device: str = "cpu") -> Tensor:
    """The starting latent, fp32. Drawn on the CPU a seed means the same on every machine."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape_CTYX, generator=generator, device=device, dtype=torch.float32)


class Contexts:
    """Turns the exprs of a table into contexts of a model, each once; every expert projects its own.

    `rows_NE` holds the encoder's rows of every prompt a table names.
    """

    def __init__(self, model: WanModel, rows_NE: Mapping[str, Tensor]) -> None:
        self._model = model
        self._rows_NE = rows_NE
        self._made: dict[Expr, Context] = {}

    def context(self, expr: Expr) -> Context:
        if expr not in self._made:
            self._made[expr] = self._make(expr)
        return self._made[expr]

    def _make(self, expr: Expr) -> Context:
        match expr:
            case Text(id):
                return self._model.project(self._rows_NE[id])
            case Lerp(a, b, weight):
                return lerp(self.context(a), self.context(b), weight)
            case Concat(a, b, weight):
                return concat(self.context(a), self.context(b), weight)

    def forget(self) -> None:
        """Makes every context anew when next asked for: the model's weights have changed."""
        self._made.clear()

    def mix(self, cell: Cell) -> Mix:
        return tuple((self.context(expr), weight) for expr, weight in cell)


class Reads(Sequence[Mix]):
    """The contexts of one forward; notes which blocks came for theirs, the proof of injection."""

    def __init__(self, contexts: Contexts, table: Table, step: int, branch: Branch) -> None:
        self.step = step
        self.branch: Branch = branch
        self.cells: set[tuple[int, Branch, int]] = set()
        self._contexts = contexts
        self._row = table.row(step, branch)
        self._base: Cell = ((table.base[branch], 1.0),)

    def __len__(self) -> int:
        return len(self._row)

    @overload
    def __getitem__(self, block: int) -> Mix: ...
    @overload
    def __getitem__(self, block: slice) -> Sequence[Mix]: ...
    def __getitem__(self, block: int | slice) -> Mix | Sequence[Mix]:
        if isinstance(block, slice):
            raise TypeError("blocks read their contexts one by one")
        mix = self._contexts.mix(self._row[block])
        self.cells.add((self.step, self.branch, block))
        return mix

    @property
    def base(self) -> Mix:
        """What every block would read without injection."""
        return self._contexts.mix(self._base)

    @property
    def injected(self) -> tuple[int, ...]:
        """Blocks whose cell a rule changed."""
        return tuple(block for block, cell in enumerate(self._row) if cell != self._base)


@dataclass(frozen=True)
class Sampled:
    """What one step left: the solver's state before step `step`, and the cells the model read."""

    step: int
    state: State
    read: frozenset[tuple[int, Branch, int]]


def denoise(
    model: WanModel,
    state: State,
    schedule: Schedule,
    solver: str,
    table: Table,
    contexts: Contexts,
    stage: Stage,
    measured: Measured | None = None,
) -> Iterator[Sampled]:
    """Walks the steps of one stage from where `state` is; yields after every step. After the last step
    of the schedule the state holds the finished latent.

    v = v_uncond + guidance·(v_cond - v_uncond), two forwards, cond first; a step without an
    uncond branch takes v_cond as it is. Raises NotFinite naming step, branch and block.
    """
    forward = measured or model
    for i in stage.steps:
        t = schedule.timesteps[i]
        read: set[tuple[int, Branch, int]] = set()
        velocities: dict[Branch, Tensor] = {}
        for branch in table.branches_at(i):
            reads = Reads(contexts, table, i, branch)
            velocities[branch] = forward(state.x[None], t, reads)[0]
            read |= reads.cells
        v_CTYX = velocities["cond"]
        if "uncond" in velocities:
            v_CTYX = velocities["uncond"] + stage.guidance * (v_CTYX - velocities["uncond"])
        after = SOLVERS[solver].step(schedule.sigmas, i, state, v_CTYX)
        if not torch.isfinite(after.x).all():
            raise NotFinite(_blame(model, state.x, t, i, table, contexts))
        state = after
        yield Sampled(i + 1, state, frozenset(read))


def _blame(model: WanModel, x_CTYX: Tensor, t: float, step: int, table: Table, contexts: Contexts) -> str:
    """Runs the bad step again, block by block, to say where the first NaN or Inf comes from."""
    for branch in table.branches_at(step):
        reads = Reads(contexts, table, step, branch)
        for block, x_BLD in enumerate(model.residuals(x_CTYX[None], t, reads)):
            if not torch.isfinite(x_BLD).all():
                return f"NaN or Inf at step {step}, {branch} branch, first in block {block}"
    return f"NaN or Inf at step {step}, after the last block"


def check_hits(table: Table, read: frozenset[tuple[int, Branch, int]]) -> None:
    """Raises InjectionMissed when a cell that a rule changed was never read by its block."""
    for index, reached in enumerate(table.reached):
        missed = [cell for cell in reached if cell not in read]
        if missed:
            raise InjectionMissed(
                f"inject.{index} reached {len(reached) - len(missed)} of {len(reached)} planned cells",
                hint="This render would not show the injection, so it is not kept.",
            )
