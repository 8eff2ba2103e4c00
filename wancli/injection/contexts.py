"""Turn the exprs of a table into contexts of a model, and record which blocks read them.

Letters of shapes: N E rows of a prompt or of CLIP, B batch, L video tokens, D width, C T Y X a latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import overload

import torch
from torch import Tensor

from wancli.injection.area import TokenGrid
from wancli.injection.attention_maps import AttentionMaps
from wancli.injection.exprs import (
    AreaWeight,
    Branch,
    Cell,
    Concat,
    Emphasis,
    Expr,
    Image,
    Lerp,
    Nag,
    Select,
    Steer,
    Text,
    Weight,
)
from wancli.injection.table import Table
from wancli.injection.token_sums import TokenSums, group_by_expr
from wancli.models.attention_guidance import Guide
from wancli.models.dit import Request, WanModel
from wancli.models.dit_layers import Mix
from wancli.models.text_context import Context, concat, emphasize, lerp, pick, pool, select, steer
from wancli.models.token_weights import TokenWeights


class ContextCache:
    """The contexts of one model (of each expert its own), each computed once.

    `rows_NE` holds the encoder's rows of every prompt that a table names, and `image_rows_NE` the CLIP rows
    of every picture.
    """

    def __init__(
        self,
        model: WanModel,
        rows_NE: Mapping[str, Tensor],
        image_rows_NE: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self._model = model
        self._rows_NE = rows_NE
        self._image_rows_NE = image_rows_NE
        self._contexts: dict[Expr, Context] = {}
        self._vectors: dict[tuple[tuple[str, ...], tuple[str, ...]], Tensor] = {}

    def context(self, expr: Expr) -> Context:
        if expr not in self._contexts:
            self._contexts[expr] = self._build(expr)
        return self._contexts[expr]

    def _build(self, expr: Expr) -> Context:
        match expr:
            case Text(id):
                return self._model.project(self._rows_NE[id])
            case Image(id):
                return self._model.project_image(self._image_rows_NE[id])
            case Lerp(a, b, weight):
                return lerp(self.context(a), self.context(b), weight)
            case Concat(a, b, weight, rows):
                joined = self.context(b) if rows is None else pick(self.context(b), rows)
                return concat(self.context(a), joined, weight)
            case Select(a, b, rows):
                return select(self.context(a), self.context(b), rows)
            case Steer(inner, toward, away, strength):
                return steer(self.context(inner), self._vector(toward, away), strength)
            case Emphasis(inner, biases):
                return emphasize(self.context(inner), biases)

    def _vector(self, toward: tuple[str, ...], away: tuple[str, ...]) -> Tensor:
        """Return the mean of the pooled contexts of some prompts, minus that of others [D]."""
        if (toward, away) not in self._vectors:
            means = []
            for ids in (toward, away):
                pooled = [pool(self.context(Text(id))) for id in ids]
                means.append(torch.stack(pooled).mean(dim=0) if pooled else torch.tensor(0.0))
            self._vectors[toward, away] = means[0] - means[1].to(means[0].device)
        return self._vectors[toward, away]

    def _read(self, expr: Expr | Nag) -> Context | Guide:
        if isinstance(expr, Nag):
            return Guide(self.context(expr.negative), expr.scale, expr.alpha, expr.tau)
        return self.context(expr)

    def clear(self) -> None:
        """Drop all contexts, after the weights of the model have changed."""
        self._contexts.clear()
        self._vectors.clear()

    def mix(self, cell: Cell, areas: TokenAreas) -> Mix:
        """Return the contexts of a cell and their weights. An expr that has several, inside and outside of
        areas, is attended to once, with their sum.
        """
        if not any(isinstance(weight, AreaWeight) for _, weight in cell):
            return tuple((self._read(expr), weight) for expr, weight in cell)  # type: ignore[misc]
        summed = ((expr, areas.sum(weights)) for expr, weights in group_by_expr(cell).items())
        return tuple((self._read(expr), weight) for expr, weight in summed if weight != 0.0)


class TokenAreas:
    """The areas of a shot as weights of its tokens on a device, each computed once."""

    def __init__(self, grid: TokenGrid, device: torch.device) -> None:
        self._sums = TokenSums(grid)
        self._device = device
        self._known: dict[tuple[Weight, ...], float | TokenWeights] = {}

    @classmethod
    def of_latent(cls, z_CTYX: Tensor) -> TokenAreas:
        """Return the areas of a video by its latent, whose tokens are patches of 1 x 2 x 2."""
        _, frames, rows, columns = z_CTYX.shape
        return cls(TokenGrid(frames, rows // 2, columns // 2), z_CTYX.device)

    def sum(self, weights: tuple[Weight, ...]) -> float | TokenWeights:
        """Return the sum of weights: a number if it is the same for all tokens."""
        if weights not in self._known:
            total_L = torch.from_numpy(self._sums.sum(weights))
            first = total_L[0].item()
            same = bool((total_L == first).all())
            self._known[weights] = first if same else TokenWeights(total_L.float(), self._device)
        return self._known[weights]


class BlockContexts(Sequence[Mix]):
    """The contexts of one forward. Records which blocks read theirs: the proof of injection."""

    def __init__(
        self, contexts: ContextCache, table: Table, areas: TokenAreas, step: int, branch: Branch
    ) -> None:
        self.step = step
        self.branch: Branch = branch
        self.cells_read: set[tuple[int, Branch, int]] = set()
        self._contexts = contexts
        self._areas = areas
        self._row = table.row(step, branch)
        self._base = table.base_cell(branch)

    def __len__(self) -> int:
        return len(self._row)

    @overload
    def __getitem__(self, block: int) -> Mix: ...
    @overload
    def __getitem__(self, block: slice) -> Sequence[Mix]: ...
    def __getitem__(self, block: int | slice) -> Mix | Sequence[Mix]:
        if isinstance(block, slice):
            raise TypeError("blocks read their contexts one by one")
        mix = self._contexts.mix(self._row[block], self._areas)
        self.cells_read.add((self.step, self.branch, block))
        return mix

    @property
    def base(self) -> Mix:
        """The contexts that every block would read without injection."""
        return self._contexts.mix(self._base, self._areas)

    def own_prompt(self, block: int) -> Context:
        """Return the context of the shot's own prompt, emphasised and steered if the block reads it so."""
        own = next(expr for expr, _ in self._base if isinstance(expr, Text))
        exprs = (expr for expr, _ in self._row[block] if isinstance(expr, Emphasis | Steer))
        return self._contexts.context(next((expr for expr in exprs if _untuned(expr) == own), own))

    @property
    def injected_blocks(self) -> tuple[int, ...]:
        """The blocks whose cell a rule changed."""
        return tuple(block for block, cell in enumerate(self._row) if cell != self._base)


def _untuned(expr: Expr) -> Expr:
    while isinstance(expr, Emphasis | Steer):
        expr = expr.expr
    return expr


@dataclass(frozen=True)
class Effect:
    """The effect of the injection on one forward.

    `velocity` and `blocks` are relative L2 changes of the velocity and of each injected block's
    cross-attention output; `changed_percent` counts elements of that output that moved by more
    than 0.01.
    """

    step: int
    branch: str
    velocity: float
    blocks: dict[int, float]
    changed_percent: dict[int, float]


@dataclass(frozen=True)
class Forward(Request):
    """One forward of denoising: one branch of one step.

    Its effects are measured if `effects` is a list, and added to its attention maps if it has some. With a
    `reused_BLD` no block runs: it is the residual of an earlier forward.
    """

    contexts: BlockContexts
    effects: list[Effect] | None = None
    attention: AttentionMaps | None = None
    reused_BLD: Tensor | None = None
