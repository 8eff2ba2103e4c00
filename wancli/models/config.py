"""Sizes of the networks as plain numbers: any width, depth and number of heads. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

AttentionBackend = Literal[
    "auto", "flash", "efficient", "cudnn", "math", "flash-attn-2", "flash-attn-3", "sage"
]
Expert = Literal["only", "high", "low"]
ComputeDtype = Literal["fp32", "bf16", "fp16"]
Dtype = ComputeDtype | Literal["fp8"]
EXPERTS: tuple[Expert, ...] = get_args(Expert)  # `high` before `low`, the order of their steps


@dataclass(frozen=True)
class WanConfig:
    """Sizes of the diffusion transformer. The field names are those of the official config.json, up to `eps`.

    A model whose blocks also attend to pictures reads CLIP rows of width `image_dim`. `image_rows` is the
    number of these rows if each has a learned position, as in FLF2V, which reads two pictures.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    text_len: int = 512
    eps: float = 1e-6
    image_dim: int | None = None
    image_rows: int | None = None

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(f"dim {self.dim} does not split into {self.num_heads} heads of even width")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def joins_frames(self) -> bool:
        """Whether the network reads given frames beside the noise, as I2V does, and not in its place."""
        return self.in_dim > self.out_dim


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the Wan 2.1 causal VAE: stride (4, 8, 8), `z_dim` latent channels."""

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)

    @property
    def dec_dim(self) -> int:
        return self.dim


@dataclass(frozen=True)
class VAE22Config:
    """Sizes of the Wan 2.2 causal VAE: stride (4, 16, 16). Patches of 2 x 2 pixels make up half of the
    spatial stride.
    """

    dim: int = 160  # of the encoder
    dec_dim: int = 256
    z_dim: int = 48
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)

    def __post_init__(self) -> None:
        # The parameterless shortcuts turn four pixels into channels or channels into four pixels.
        if any(wide not in (narrow, 2 * narrow, 4 * narrow) for narrow, wide in pairwise(self.dim_mult)):
            raise ValueError(f"widths of {self.dim_mult} must stay, double or quadruple from stage to stage")


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of the CLIP vision tower: `num_layers` blocks, of which Wan runs all but the last."""

    dim: int = 1280
    num_heads: int = 16
    num_layers: int = 32
    mlp_dim: int = 5120
    patch: int = 14  # pixels of a side
    image: int = 224  # pixels of a side

    @property
    def rows(self) -> int:
        """The rows of a picture: one for each patch, after one for the whole picture."""
        return (self.image // self.patch) ** 2 + 1


@dataclass(frozen=True)
class T5Config:
    """Sizes of the UMT5 encoder. `d_model` is the width of the rows that the transformer reads."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_buckets: int = 32


EOS = 1  # the token `</s>`, which ends every prompt
TIED_EMBEDDING = "encoder.embed_tokens.weight"  # some files hold UMT5's `shared.weight` again under this name


@dataclass(frozen=True)
class ComputeOptions:
    """How a transformer computes. Changes nothing but rounding.

    `attention` is the backend of self-attention. `chunk` is how many tokens a forward without gradients takes
    at a time; None is all of them. `fp8_matmul` keeps the matrices of the blocks as e4m3 and multiplies in
    fp8.
    """

    attention: AttentionBackend = "auto"
    chunk: int | None = None
    fp8_matmul: bool = False


def compute_dtype(dtype: Dtype, device: str) -> ComputeDtype:
    """Return the dtype of matmuls: weights in fp8 are unpacked for them."""
    if dtype != "fp8":
        return dtype
    return "fp32" if device == "cpu" else "bf16"
