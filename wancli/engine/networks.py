"""The networks of a checkpoint while they are in memory, and the LoRAs put into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING

from wancli.engine import manifest_body
from wancli.engine.manifest_body import Record
from wancli.errors import MachineError
from wancli.models.config import Expert
from wancli.plan.shot import ModelSpec
from wancli.resources.measure import PeakMemory
from wancli.weights.checkpoint import Checkpoint
from wancli.weights.lora.use import LoraUse

if TYPE_CHECKING:
    from torch import Tensor

    from wancli.models.dit import WanModel
    from wancli.models.vae import VAE
    from wancli.weights.lora.patch import Lora, Loras, Patches


@dataclass
class Networks:
    """The networks of a checkpoint, loaded when first used and kept for the next shot, of two experts one."""

    model: ModelSpec
    lazy: bool = False  # blocks may arrive when they first run; not where LoRAs are put into them before
    load_record: Record = field(default_factory=dict)  # what loading the transformer took
    _loaded: tuple[Expert, WanModel] | None = None
    _patches: Patches | None = None  # of the network that is loaded
    _loras: dict[str, Lora] = field(default_factory=dict)  # by SHA-256

    def transformer(self, expert: Expert) -> WanModel:
        """The network of an expert; the other one makes room first."""
        if self._loaded and self._loaded[0] == expert:
            return self._loaded[1]
        from wancli.models.dtypes import DTYPES
        from wancli.weights.loader import load_transformer

        self._loaded = self._patches = None
        with PeakMemory() as peak:
            network = load_transformer(
                self.model.checkpoint,
                DTYPES[self.model.compute_dtype],
                self.model.device,
                expert,
                self.model.residency,
                self._patch_fetched,
                self.model.dtype == "fp8",
                self.model.kernels,
                self.lazy,
            )
        self.load_record = manifest_body.phase_record("load", peak)
        self._loaded = expert, network
        return network

    def _patch_fetched(self, name: str, weight: Tensor) -> None:
        """Puts the LoRAs of the step into a weight that was just fetched."""
        if self._patches:
            self._patches.into(name, weight)

    @property
    def patches(self) -> Patches:
        """What puts LoRAs into the transformer that is loaded, and takes them out again."""
        from wancli.weights.loader import transformer_tensors
        from wancli.weights.lora.patch import Patches

        assert self._loaded
        if self._patches is None:
            expert, network = self._loaded
            base = partial(transformer_tensors, self.model.checkpoint, expert=expert)
            self._patches = Patches(dict(network.named_parameters()), base)
        return self._patches

    def loras(self, uses: Sequence[LoraUse]) -> Loras:
        """The LoRAs of a shot, each file read once."""
        from wancli.weights.formats.infer_config import parameter_shapes
        from wancli.weights.lora.patch import Loras, load

        shapes = parameter_shapes(self.model.checkpoint.transformer)
        for use in uses:
            if use.sha256 not in self._loras:
                self._loras[use.sha256] = load(use.path, shapes)
        return Loras(uses, [self._loras[use.sha256] for use in uses])

    def reuse(self) -> None:
        """The networks stay for another render, which loads nothing but its LoRAs."""
        self._loras.clear()
        with PeakMemory() as peak:
            pass
        self.load_record = manifest_body.phase_record("load", peak) | {"seconds": 0.0}

    def release(self) -> None:
        """Gives the memory back; what is used next is loaded anew."""
        self._loaded = self._patches = None
        self.__dict__.pop("vae", None)

    @cached_property
    def vae(self) -> VAE:
        from wancli.weights.loader import load_vae

        return load_vae(self.model.checkpoint, self.model.device)


class ModelCache:
    """Keeps the networks of the last model in memory from one render to the next."""

    def __init__(self) -> None:
        self._networks: Networks | None = None

    def get(self, model: ModelSpec, lazily: bool) -> Networks:
        """Those that are here if they are of this model and ran as it would, else new ones; what was here
        before is gone then."""
        here = self._networks
        if here and self.has(model) and lazily >= here.lazy:
            here.reuse()
            return here
        self._networks = here = None  # before others are loaded
        self._networks = Networks(model, lazily)
        return self._networks

    def has(self, model: ModelSpec) -> bool:
        """Whether the networks that are here are of this model, whose weights were checked then."""
        return self._networks is not None and _cache_key(self._networks.model) == _cache_key(model)

    def clear(self) -> None:
        """Gives the memory back."""
        self._networks = None


def _cache_key(model: ModelSpec) -> tuple[object, ...]:
    """All that a network in memory depends on."""
    weights = (model.checkpoint, model.transformer, model.vae)
    return (*weights, model.device, model.dtype, model.residency, model.kernels)


def check_weights(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for what would only show when the networks are loaded."""
    from wancli.weights.loader import check

    check(checkpoint)


def check_device(device: str) -> None:
    """Raises MachineError where a plan says `cuda` and torch has none."""
    if device != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        raise MachineError(
            "torch can use no CUDA device here",
            hint="Set memory.device: cpu and noise: cpu, or look at nvidia-smi.",
        )
