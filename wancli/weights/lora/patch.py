"""LoRAs as tensors: the difference that they add to a parameter, and adding it.

All arithmetic is fp32, and a sum of several LoRAs is rounded once to the dtype of the weight.

Letters: R rank, O output and I input width of a matrix (a convolution's is [O, everything else]).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wancli.errors import CheckpointError
from wancli.models.config import Expert
from wancli.weights.formats.infer_config import Shapes
from wancli.weights.formats.read import iterate_tensors
from wancli.weights.lora.change import Change
from wancli.weights.lora.file import read_lora_file
from wancli.weights.lora.key_mapping import block_index
from wancli.weights.lora.match import Coverage, select_changes
from wancli.weights.lora.use import LoraUse

_ROW_FACTORS = {"diff", "diff_b", "up", "up_bias", "hada_w1_a", "hada_w2_a"}  # have the rows of the matrix


@dataclass(frozen=True, eq=False)
class Delta(ABC):
    """The difference that a LoRA adds to one parameter at strength 1."""

    shape: tuple[int, ...]  # of the parameter
    scale: float

    @abstractmethod
    def dense(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """Return the whole difference, in the shape of the parameter."""

    def _add_fp32(self, weight: Tensor, strength: float) -> None:
        """weight += strength * difference, in place, for an fp32 weight."""
        weight.add_(self.dense(device=weight.device), alpha=strength)


@dataclass(frozen=True, eq=False)
class Full(Delta):
    diff: Tensor

    def dense(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        return (_to_fp32(self.diff, device) * self.scale).to(dtype)


@dataclass(frozen=True, eq=False)
class LowRank(Delta):
    """scale * up @ down."""

    up_OR: Tensor
    down_RI: Tensor

    def dense(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        up_OR, down_RI = _to_fp32(self.up_OR, device), _to_fp32(self.down_RI, device)
        return (self.scale * (up_OR @ down_RI)).view(self.shape).to(dtype)

    def _add_fp32(self, weight: Tensor, strength: float) -> None:
        # Without the product in memory: it is as large as the weight.
        up_OR, down_RI = _to_fp32(self.up_OR, weight.device), _to_fp32(self.down_RI, weight.device)
        weight.view(len(weight), -1).addmm_(up_OR, down_RI, alpha=strength * self.scale)


@dataclass(frozen=True, eq=False)
class LoHa(Delta):
    """scale * (w1_a @ w1_b) * (w2_a @ w2_b), element by element."""

    w1_a_OR: Tensor
    w1_b_RI: Tensor
    w2_a_OR: Tensor
    w2_b_RI: Tensor

    def dense(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        one_OI = _to_fp32(self.w1_a_OR, device) @ _to_fp32(self.w1_b_RI, device)
        two_OI = _to_fp32(self.w2_a_OR, device) @ _to_fp32(self.w2_b_RI, device)
        return one_OI.mul_(two_OI).mul_(self.scale).view(self.shape).to(dtype)


@dataclass(frozen=True, eq=False)
class LoKr(Delta):
    """scale * kron(w1, w2); each of the two is one whole matrix or a product of factors."""

    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]

    def dense(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        w1, w2 = (
            _multiply([_to_fp32(factor, device) for factor in factors]) for factors in (self.w1, self.w2)
        )
        return torch.kron(w1, w2).mul_(self.scale).view(self.shape).to(dtype)


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA that fits a model: official parameter name -> its difference."""

    path: Path
    deltas: Mapping[str, Delta]
    coverage: Coverage
    scales: tuple[float, ...]  # the distinct ones: alpha / rank


def load_lora(path: Path, shapes: Shapes) -> Lora:
    """Load the changes of a LoRA file that apply to a model with these parameters.

    The tensors are mapped from the file. Raises CheckpointError like `read_lora_file` and `select_changes`,
    and for NaN or Inf, naming the key.
    """
    changes, coverage = select_changes(read_lora_file(path), shapes)
    wanted = {key for change in changes for key in change.keys.values()}
    factors = {name: tensor for name, tensor in iterate_tensors([path]) if name in wanted}
    for key, tensor in factors.items():
        if not tensor.float().isfinite().all():
            raise CheckpointError(
                f"{key} holds NaN or Inf", where=str(path), hint="The training of this LoRA went wrong."
            )
    deltas = {change.name: _build_delta(change, factors, shapes[change.name]) for change in changes}
    return Lora(path, deltas, coverage, tuple(sorted({delta.scale for delta in deltas.values()})))


def _build_delta(change: Change, factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Delta:
    parts = {part: factors[key] for part, key in change.keys.items() if part != "alpha"}
    if change.rows:  # factors with other rows are shared
        parts |= {part: parts[part][slice(*change.rows)] for part in _ROW_FACTORS & parts.keys()}
    scale = change.scale
    match change.kind:
        case "full":
            return Full(shape, scale, *parts.values())
        case "low-rank":
            return LowRank(shape, scale, _as_matrix(parts["up"]), _as_matrix(parts["down"]))
        case "loha":
            return LoHa(shape, scale, *(_as_matrix(tensor) for tensor in parts.values()))
        case "lokr":
            whole = {part: _as_matrix(tensor) for part, tensor in parts.items()}
            w1, w2 = (
                tuple(tensor for part, tensor in whole.items() if part.startswith(f"lokr_{w}"))
                for w in ("w1", "w2")
            )
            return LoKr(shape, scale, w1, w2)


@dataclass(frozen=True, eq=False)
class Loras:
    """The LoRAs of a shot, with the blocks and steps at which each applies."""

    uses: Sequence[LoraUse] = ()
    loras: Sequence[Lora] = ()

    @property
    def names(self) -> set[str]:
        """Every parameter that some LoRA changes."""
        return {name for lora in self.loras for name in lora.deltas}

    def terms_for(self, name: str, step: int, expert: Expert = "only") -> list[tuple[Delta, float]]:
        """Return the differences of a parameter at a step, with strengths, in the order of the job."""
        terms = []
        for use, lora in zip(self.uses, self.loras, strict=True):
            strength = use.strength_at(step, block_index(name), expert)
            if strength and name in lora.deltas:
                terms.append((lora.deltas[name], strength))
        return terms


@torch.no_grad()
def add_deltas(weight: Tensor, terms: Iterable[tuple[Delta, float]]) -> None:
    """weight += the sum of strength * difference, in fp32 and rounded once, in place.

    The weight may have any float dtype and device, if it is contiguous. Raises ValueError for another shape,
    before anything is changed.
    """
    terms = list(terms)
    for delta, _ in terms:
        if delta.shape != tuple(weight.shape):
            raise ValueError(f"a difference of {list(delta.shape)} to a weight of {list(weight.shape)}")
    total = weight.float()  # the weight itself if it is fp32
    for delta, strength in terms:
        delta._add_fp32(total, strength)
    if weight.dtype != torch.float32:
        weight.copy_(total)


class Patches:
    """Keeps the weights of a model equal to those of its files plus the LoRAs of a step.

    A change is undone exactly, and without a copy in memory: if other LoRAs or another step need the original
    weights, `read_base` reads them from the files. Weights on the meta device are fetched each time they are
    needed, and `patch` changes them each time.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        base: Callable[[AbstractSet[str]], Iterable[tuple[str, Tensor]]],
    ) -> None:
        self._state = state
        self._read_base = base
        self._applied: dict[str, list[tuple[Delta, float]]] = {}

    def apply_step(self, loras: Loras, step: int, expert: Expert = "only") -> bool:
        """Bring the weights to a step. Returns whether any of them changed."""
        wanted = {name: terms for name in loras.names if (terms := loras.terms_for(name, step, expert))}
        changed = {
            name
            for name in wanted.keys() | self._applied.keys()
            if wanted.get(name) != self._applied.get(name)
        }
        fetched = {name for name in changed if self._state[name].is_meta}
        for name in fetched:
            self._applied.pop(name, None)
            if name in wanted:
                self._applied[name] = wanted[name]
        self._restore((changed - fetched) & self._applied.keys())
        for name in sorted((changed - fetched) & wanted.keys()):
            self._applied[name] = []  # neither the original nor the wanted weight, should this stop half way
            add_deltas(self._state[name], wanted[name])
            self._applied[name] = wanted[name]
        return bool(changed)

    def patch(self, name: str, weight: Tensor) -> None:
        """Add the LoRAs of the step to a weight that was just fetched; called by OffloadedBlocks."""
        if terms := self._applied.get(name):
            add_deltas(weight, terms)

    @torch.no_grad()
    def _restore(self, names: AbstractSet[str]) -> None:
        if not names:
            return
        for name, tensor in self._read_base(names):
            self._state[name].copy_(tensor)
            del self._applied[name]
        if lost := sorted(names & self._applied.keys()):
            raise CheckpointError(f"{lost[0]} was in the checkpoint and is now missing")


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor.flatten(1)


def _to_fp32(tensor: Tensor, device: torch.device | str) -> Tensor:
    return tensor.to(device=device, dtype=torch.float32)


def _multiply(factors: Sequence[Tensor]) -> Tensor:
    first, *rest = factors
    return first @ rest[0] if rest else first
