"""The networks of a checkpoint in memory, and the LoRAs patched into them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from wancli.engine import manifest_body
from wancli.engine.manifest_body import Record
from wancli.errors import MachineError
from wancli.models.config import Expert
from wancli.plan.model_spec import ModelSpec
from wancli.resources import machine
from wancli.resources.measure import PeakMemory
from wancli.weights.checkpoint import Checkpoint
from wancli.weights.lora.use import LoraUse

if TYPE_CHECKING:
    from torch import Tensor

    from wancli.models.clip import CLIPVision
    from wancli.models.dit import WanModel
    from wancli.models.vae import VAE
    from wancli.weights.lora.patch import Lora, Loras, Patches


@dataclass(frozen=True)
class _Loaded:
    expert: Expert
    network: WanModel
    record: Record  # the phase record of loading it


@dataclass
class Networks:
    """The networks of a checkpoint, loaded on first use and kept for the next shot; one expert at a time."""

    model: ModelSpec
    lazy: bool = False  # whether blocks may be converted on first use; not if LoRAs patch them before that
    _loaded: _Loaded | None = None
    _patches: Patches | None = None  # of the loaded transformer
    _loras: dict[str, Lora] = field(default_factory=dict)  # by SHA-256
    _vae: VAE | None = None
    _clip: CLIPVision | None = None

    def transformer(self, expert: Expert) -> WanModel:
        """Return the transformer of an expert, loading it if needed. The other expert is freed first."""
        return self.load(expert)[0]

    def load(self, expert: Expert) -> tuple[WanModel, Record]:
        """Return the transformer of an expert and the phase record of loading it."""
        if self._loaded is None or self._loaded.expert != expert:
            from wancli.models.attention import DTYPES
            from wancli.weights.loader import LoadOptions, load_transformer

            self._loaded = self._patches = None
            options = LoadOptions(
                DTYPES[self.model.compute_dtype],
                self.model.device,
                self.model.residency,
                fp8=self.model.dtype == "fp8",
                kernels=self.model.kernels,
                lazy=self.lazy,
            )
            with PeakMemory() as peak:
                network = load_transformer(self.model.checkpoint, options, expert, self._patch_fetched)
            self._loaded = _Loaded(expert, network, manifest_body.phase_record("load", peak))
        return self._loaded.network, self._loaded.record

    def _patch_fetched(self, name: str, weight: Tensor) -> None:
        """Apply the LoRAs of the current step to a weight that was just fetched."""
        if self._patches:
            self._patches.patch(name, weight)

    @property
    def patches(self) -> Patches:
        """The patches that apply LoRAs to the loaded transformer and undo them."""
        from wancli.weights.loader import iterate_transformer_tensors
        from wancli.weights.lora.patch import Patches

        assert self._loaded
        if self._patches is None:
            base = partial(iterate_transformer_tensors, self.model.checkpoint, expert=self._loaded.expert)
            self._patches = Patches(dict(self._loaded.network.named_parameters()), base)
        return self._patches

    def loras(self, uses: Sequence[LoraUse]) -> Loras:
        """Return the LoRAs of a shot. Each file is read once."""
        from wancli.weights.formats.infer_config import transformer_shapes
        from wancli.weights.lora.patch import Loras, load_lora

        shapes = transformer_shapes(self.model.checkpoint.transformer_config)
        for use in uses:
            if use.sha256 not in self._loras:
                self._loras[use.sha256] = load_lora(use.path, shapes)
        return Loras(uses, [self._loras[use.sha256] for use in uses])

    def reuse(self) -> None:
        """Prepare the networks for another render, which loads only its LoRAs."""
        self._loras.clear()
        self._clip = None
        if self._loaded:
            with PeakMemory() as peak:
                pass
            record = manifest_body.phase_record("load", peak) | {"seconds": 0.0}
            self._loaded = replace(self._loaded, record=record)

    @contextmanager
    def borrow_encoders(self, *, keep_clip: bool) -> Iterator[None]:
        """Free the VAE after a block that may load it, unless it was in memory before, and CLIP unless it is
        to be kept."""
        kept = self._vae
        try:
            yield
        finally:
            self._vae, self._clip = kept, self._clip if keep_clip else None

    def release_transformer(self) -> None:
        """Free the memory of the transformer, which is loaded again when it is next used."""
        self._loaded = self._patches = None

    def release(self) -> None:
        """Free the memory of the networks; they are loaded again when they are next used."""
        self._loaded = self._patches = self._vae = self._clip = None

    @property
    def clip(self) -> CLIPVision:
        """The image encoder, loaded on first use: in fp16 on a GPU, as in the official code."""
        if self._clip is None:
            import torch

            from wancli.weights.loader import load_clip

            dtype = torch.float16 if self.model.device == "cuda" else torch.float32
            self._clip = load_clip(self.model.checkpoint, self.model.device, dtype)
        return self._clip

    @property
    def vae(self) -> VAE:
        """The VAE, loaded on first use."""
        if self._vae is None:
            from wancli.weights.loader import load_vae

            self._vae = load_vae(self.model.checkpoint, self.model.device)
        return self._vae


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


def prepare_device(device: str) -> None:
    """Give torch no more threads than the process has cores, unless the user set their number.

    Raises MachineError if a plan says `cuda` and torch has no CUDA device.
    """
    import torch

    is_chosen = any(map(os.environ.get, machine.THREAD_VARIABLES))
    if not is_chosen and (cores := machine.usable_cores()) < torch.get_num_threads():
        torch.set_num_threads(cores)  # torch knows no CPU quota; threads beyond it only wait for one another
    if device == "cuda" and not torch.cuda.is_available():
        raise MachineError(
            "torch can use no CUDA device here",
            hint="Set memory.device: cpu and noise: cpu, or look at nvidia-smi.",
        )
