"""The networks of a checkpoint in memory, and the LoRAs patched into them."""

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
    """The networks of a checkpoint, loaded when first used and kept for the next shot.

    Of two experts one is in memory at a time.
    """

    model: ModelSpec
    lazy: bool = False  # blocks may arrive when they first run; not where LoRAs are put into them before
    load_record: Record = field(default_factory=dict)  # what loading the transformer took
    _loaded: tuple[Expert, WanModel] | None = None
    _patches: Patches | None = None  # of the network that is loaded
    _loras: dict[str, Lora] = field(default_factory=dict)  # by SHA-256

    def transformer(self, expert: Expert) -> WanModel:
        """Return the network of an expert; the other one is released before it is loaded."""
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
        """Patch the LoRAs of the step into a weight that was just fetched."""
        if self._patches:
            self._patches.patch(name, weight)

    @property
    def patches(self) -> Patches:
        """The patches that put LoRAs into the loaded transformer, and take them out again."""
        from wancli.weights.loader import iterate_transformer_tensors
        from wancli.weights.lora.patch import Patches

        assert self._loaded
        if self._patches is None:
            expert, network = self._loaded
            base = partial(iterate_transformer_tensors, self.model.checkpoint, expert=expert)
            self._patches = Patches(dict(network.named_parameters()), base)
        return self._patches

    def loras(self, uses: Sequence[LoraUse]) -> Loras:
        """Return the LoRAs of a shot; each file is read once."""
        from wancli.weights.formats.infer_config import transformer_shapes
        from wancli.weights.lora.patch import Loras, load_lora

        shapes = transformer_shapes(self.model.checkpoint.transformer_config)
        for use in uses:
            if use.sha256 not in self._loras:
                self._loras[use.sha256] = load_lora(use.path, shapes)
        return Loras(uses, [self._loras[use.sha256] for use in uses])

    def reuse(self) -> None:
        """Keep the networks for another render, which loads only its LoRAs."""
        self._loras.clear()
        with PeakMemory() as peak:
            pass
        self.load_record = manifest_body.phase_record("load", peak) | {"seconds": 0.0}

    def release(self) -> None:
        """Release the memory; a network that is used later is loaded again."""
        self._loaded = self._patches = None
        self.__dict__.pop("vae", None)

    @cached_property
    def vae(self) -> VAE:
        from wancli.weights.loader import load_vae

        return load_vae(self.model.checkpoint, self.model.device)


class ModelCache:
    """The networks of the last model, kept in memory from one render to the next."""

    def __init__(self) -> None:
        self._networks: Networks | None = None

    def get(self, model: ModelSpec, lazy: bool) -> Networks:
        """Return the cached networks if they run as this model would, else new ones in their place."""
        cached = self._networks
        if cached and self.has(model) and lazy >= cached.lazy:
            cached.reuse()
            return cached
        self._networks = cached = None  # before others are loaded
        self._networks = Networks(model, lazy)
        return self._networks

    def has(self, model: ModelSpec) -> bool:
        """Return whether the cached networks are of this model, whose weights were checked then."""
        return self._networks is not None and _cache_key(self._networks.model) == _cache_key(model)

    def clear(self) -> None:
        """Release the memory."""
        self._networks = None


def _cache_key(model: ModelSpec) -> tuple[object, ...]:
    """Return all that a network in memory depends on."""
    weights = (model.checkpoint, model.transformer, model.vae)
    return (*weights, model.device, model.dtype, model.residency, model.kernels)


def check_weights(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for damage that would only show when the networks are loaded."""
    from wancli.weights.loader import check_loadable

    check_loadable(checkpoint)


def check_device(device: str) -> None:
    """Raise MachineError if a plan says `cuda` and torch has no CUDA device."""
    if device != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        raise MachineError(
            "torch can use no CUDA device here",
            hint="Set memory.device: cpu and noise: cpu, or look at nvidia-smi.",
        )
