"""A checkpoint as a shot uses it: its parts, their fingerprints, and how it will run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from wancli.models.config import (
    ComputeOptions,
    Expert,
    T5Config,
    VAE22Config,
    VAEConfig,
    compute_dtype,
)
from wancli.pictures.sizes import Method
from wancli.plan.keys import hash_settings
from wancli.plan.pictures import (
    CLIP_ROWS,
    ClipPictures,
    LinkedFrame,
    PictureFile,
    ShotPictures,
)
from wancli.resources.memory_model import Residency
from wancli.text.encoder import EncoderSpec
from wancli.weights.checkpoint import Checkpoint


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint with the sizes and fingerprints of its parts, and how it will run."""

    checkpoint: Checkpoint
    text_encoder: T5Config
    vae_sizes: VAEConfig | VAE22Config
    transformer: str  # SHA-256, of both experts if there are two
    vae: str  # SHA-256
    encoder: EncoderSpec
    device: Literal["cpu", "cuda"]
    dtype: Literal["fp32", "bf16", "fp16", "fp8"]
    clip: str = ""  # SHA-256 of the image encoder; empty if the blocks attend to text alone
    residency: Residency = "resident"  # of the transformer's blocks; changes no pixel
    kernels: ComputeOptions = field(default_factory=ComputeOptions)
    budget: int | None = None  # the memory limit that the user set; None: what was free
    # Bytes that the process may take at its peak, on CUDA those of the device. Read once, by the planner.
    memory_limit: int = field(default=sys.maxsize, compare=False)
    # How the residencies and the chunk were chosen. Models of the same settings are the same.
    residency_reasons: tuple[str, ...] = field(default=(), compare=False)

    @property
    def compute_dtype(self) -> Literal["fp32", "bf16", "fp16"]:
        """The dtype of matmuls: weights in fp8 are unpacked for them."""
        return compute_dtype(self.dtype, self.device)

    @property
    def first_expert(self) -> Expert:
        """The network that takes the first steps."""
        return "only" if self.checkpoint.variant.boundary is None else "high"

    def read_with_clip(
        self, sources: Sequence[PictureFile | LinkedFrame], method: Method
    ) -> ClipPictures | None:
        """Return what the blocks read of these pictures; None if they attend to text alone.

        FLF2V has places for the rows of two pictures. All others read the first, as the official code does.
        """
        if not self.clip:
            return None
        count = (self.checkpoint.transformer_config.image_rows or CLIP_ROWS) // CLIP_ROWS
        read = (*sources, *sources)[:count]
        pixels = [[source.pixels_key, method] for source in read]
        return ClipPictures(hash_settings(["clip", self.clip, self.device, pixels]), read, method)

    def read_given(self, pictures: ShotPictures | None) -> ClipPictures | None:
        """Return what the blocks read of given frames, if there are any; as `read_with_clip`."""
        if pictures is None:
            return None
        return self.read_with_clip([frame.source for frame in pictures.frames], pictures.first.how.method)
