"""The model of a shot as typed data: a part of its record."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from wancli.storage.schema import Count, Data, PathText, Positive

Chunk: TypeAlias = Annotated[int, Field(strict=True, ge=1, lt=2**63)]  # tokens at a time


class Fingerprints(Data):
    """SHA-256 of the weights of each network."""

    transformer: str
    text_encoder: str
    vae: str


class KernelRecord(Data):
    """How the transformer computed."""

    attention: str = "auto"
    chunk: Chunk | None = None
    fp8_matmul: bool = False


class CheckpointFiles(Data):
    """The files of a checkpoint that was named file by file."""

    transformer: PathText | None = None
    high_noise: PathText | None = None
    low_noise: PathText | None = None
    text_encoder: PathText | None = None
    tokenizer: PathText | None = None
    vae: PathText | None = None
    image_encoder: PathText | None = None
    heads: Positive | None = None
    variant: str | None = None


class Sizes(Data):
    """The sizes of the transformer: the fields of a WanConfig."""

    dim: Positive
    ffn_dim: Positive
    num_heads: Positive
    num_layers: Annotated[int, Field(ge=1, le=1000)]
    in_dim: Positive = 16
    out_dim: Positive = 16
    text_dim: Positive = 4096
    freq_dim: Positive = 256
    text_len: Positive = 512
    eps: float = 1e-6
    image_dim: Positive | None = None
    image_rows: Positive | None = None

    @model_validator(mode="after")
    def _heads_are_even(self) -> Self:
        if self.dim % (2 * self.num_heads):
            raise ValueError("dim does not split into heads of even width")
        return self


class EncoderSizes(Data):
    """The sizes of the text encoder: the fields of a T5Config."""

    vocab_size: Positive
    d_model: Positive
    d_kv: Positive
    d_ff: Positive
    num_layers: Positive
    num_heads: Positive
    num_buckets: Positive = 32


class VaeSizes(Data):
    """The sizes of the VAE: the fields of a VAEConfig, or with `dec_dim` of a VAE22Config."""

    dim: Positive
    dec_dim: Positive | None = None
    z_dim: Positive
    dim_mult: tuple[Positive, Positive, Positive, Positive]
    num_res_blocks: Positive
    temporal_downsample: tuple[bool, bool, bool]


class StoredMatrices(Data):
    """The matrices of a network as its files hold them, in bytes."""

    plain: bool  # not quantized
    matrices: Count
    largest: Count
    scales: Count


class StoredNetworks(Data):
    transformer: StoredMatrices
    text_encoder: StoredMatrices


class NetworkSizes(Data):
    """The sizes of the networks beside the transformer, and what the files of both hold."""

    text_encoder: EncoderSizes
    vae: VaeSizes
    vae_in_fp32: bool
    stored: StoredNetworks


class ModelRecord(Data):
    """The model of a shot, and how it ran."""

    root: PathText
    files: CheckpointFiles | None = None
    variant: str
    sizes: Sizes
    networks: NetworkSizes | None = None
    dtype: str
    residency: str = "resident"
    text_encoder: str = "resident"
    chunk: Chunk | None = None
    why: list[str] = Field(default_factory=list)
    device: Literal["cpu", "cuda"]
    kernels: KernelRecord = KernelRecord()
    attention: dict[str, str] = Field(default_factory=dict)
    sha256: Fingerprints
