"""What will be done, frozen: a Plan of Shots. Nothing in them is left to decide."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from wancli import footprint
from wancli.encode import Encoder, Tokens
from wancli.experts import Expert, Stage, stages
from wancli.inject import Branch, Rule, Table
from wancli.memory import Phase, Residency
from wancli.models.config import Kernels, T5Config, VAE22Config, VAEConfig
from wancli.solvers import Schedule, schedule
from wancli.weights.identify import Checkpoint
from wancli.weights.lora_use import LoraUse

PIXELS = 1  # raised whenever a new version of wancli makes other pixels from the same job


@dataclass(frozen=True)
class Prompt:
    """A text and where its embedding is: in the store under `id`, or in a file."""

    id: str
    tokens: Tokens
    file: Path | None = None
    index: int = 0


@dataclass(frozen=True)
class Model:
    """A checkpoint with the sizes and fingerprints of its parts, and how it will run."""

    checkpoint: Checkpoint
    text_encoder: T5Config
    vae_sizes: VAEConfig | VAE22Config
    transformer: str  # SHA-256, of both experts where there are two
    vae: str  # SHA-256
    encoder: Encoder
    device: Literal["cpu", "cuda"]
    dtype: Literal["fp32", "bf16", "fp16", "fp8"]
    residency: Residency = "resident"  # of the transformer's blocks; changes no pixel
    kernels: Kernels = field(default_factory=Kernels)
    budget: int | None = None  # bytes that the process may take, on CUDA the device; None is what is free
    why: tuple[str, ...] = ()  # how the residencies and the chunk were chosen

    @property
    def computes(self) -> Literal["fp32", "bf16", "fp16"]:
        """The dtype of matmuls: weights in fp8 are unpacked for them."""
        if self.dtype != "fp8":
            return self.dtype
        return "fp32" if self.device == "cpu" else "bf16"

    @property
    def first_expert(self) -> Expert:
        """The network that takes the first steps."""
        return "only" if self.checkpoint.variant.boundary is None else "high"


@dataclass(frozen=True)
class Shot:
    """One video to be rendered; nothing in it is left to decide."""

    index: int
    id: str
    labels: dict[str, Any]
    model: Model
    prompt: Prompt
    negative: Prompt | None  # None when guidance is 1: no such forward runs
    injected: tuple[Prompt, ...]
    rules: tuple[Rule, ...]
    loras: tuple[LoraUse, ...]
    width: int
    height: int
    frames: int
    seed: int
    noise: Literal["cpu", "cuda"]
    solver: str
    steps: int
    shift: float
    guidance: float  # of the only network or the high-noise expert
    guidance_low: float | None  # of the low-noise expert, where there is one
    fps: int
    crf: int
    codec: str
    keep_latents: bool
    decode_chunk: int
    measure: bool
    output: Path
    waiting: int = 0  # bytes of other shots' latents that wait in host memory for an expert

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """[z, T, H/s, W/s], s being 8 or 16."""
        of = self.model.checkpoint.variant
        s = of.vae_stride
        return (of.latent_channels, (self.frames - 1) // 4 + 1, self.height // s, self.width // s)

    @property
    def tokens(self) -> int:
        """Video tokens the transformer sees: patches of 1 × 2 × 2."""
        _, t, y, x = self.latent_shape
        return t * (y // 2) * (x // 2)

    @property
    def latents(self) -> Path:
        return self.output.with_suffix(".latents.safetensors")

    @property
    def manifest(self) -> Path:
        return self.output.with_suffix(".manifest.json")

    @cached_property
    def schedule(self) -> Schedule:
        return schedule(self.solver, self.steps, self.shift)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        boundary = self.model.checkpoint.variant.boundary
        return stages(self.schedule.timesteps, boundary, self.guidance, self.guidance_low)

    @cached_property
    def table(self) -> Table:
        base: dict[Branch, str] = {"cond": self.prompt.id}
        if self.negative:
            base["uncond"] = self.negative.id
        unguided = {step for stage in self.stages if stage.guidance == 1 for step in stage.steps}
        depth = self.model.checkpoint.transformer.num_layers
        return Table(self.rules, base, depth, self.steps, unguided)

    @property
    def texts(self) -> tuple[Prompt, ...]:
        """Every prompt the shot needs, the injected ones last."""
        return (self.prompt, *([self.negative] if self.negative else []), *self.injected)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Predicted memory of encoding, sampling and decoding; the transformer stays while decoding."""
        return footprint.phases(self)

    @property
    def peak(self) -> int:
        """Predicted bytes of the whole process at most; on CUDA those of the device."""
        return footprint.process(self.model) + max(phase.total for phase in self.phases)

    @cached_property
    def latents_key(self) -> str:
        """Hash of all that the latent depends on."""
        low = self.guidance_low
        experts = [] if low is None else [low, self.model.checkpoint.variant.boundary]
        return _hash(
            {
                "pixels": PIXELS,
                "transformer": self.model.transformer,
                "sizes": asdict(self.model.checkpoint.transformer),
                "dtype": self.model.dtype,
                "texts": [prompt.id for prompt in self.texts],
                "rules": [asdict(rule) for rule in self.rules],
                "shape": self.latent_shape,
                "noise": [self.noise, self.seed],
                "sampler": [self.solver, self.steps, self.shift, self.guidance, *experts],
                **({"loras": [use.decided for use in self.loras]} if self.loras else {}),
            }
        )

    @cached_property
    def key(self) -> str:
        """Hash of all that the video depends on."""
        video = [self.model.vae, self.decode_chunk, self.fps, self.crf, self.codec]
        return _hash([self.latents_key, *video])


def waits(shot: Shot) -> int:
    """Bytes of what a shot leaves between its two experts: its latent, and with UniPC two x0 and the last
    latent. 0 where there is one network."""
    return 0 if shot.guidance_low is None else 4 * 4 * math.prod(shot.latent_shape)


@dataclass(frozen=True)
class Plan:
    """What will be rendered, and what the user should know before it starts."""

    name: str
    shots: tuple[Shot, ...]
    warnings: tuple[str, ...]


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
