"""Loads named tensors into networks, ready to run.

A network is built on the meta device, where tensors have a shape and no storage, and then takes over the
tensors of its files: mapped if the dtype fits, else converted one at a time, after which the pages of the
file are released. So weights are never in memory twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wancli.models import t5
from wancli.models.clip import CLIPVision
from wancli.models.config import TIED_EMBEDDING, ComputeOptions, Expert, VAE22Config, VAEConfig
from wancli.models.dit import WanModel
from wancli.models.vae import VAE, WanVAE
from wancli.models.vae22 import WanVAE22
from wancli.resources.memory_model import Residency
from wancli.weights.checkpoint import Checkpoint, clip_config, vae_config
from wancli.weights.component import Component
from wancli.weights.disk_reader import Mappings, OnDisk, keep_on_disk
from wancli.weights.formats.infer_config import find_mismatches, infer_t5_config, mismatch_error
from wancli.weights.formats.packed import Packed, pack_fp8
from wancli.weights.formats.read import read_packed
from wancli.weights.fp8_linear import replace_with_fp8
from wancli.weights.offload import (
    AfterUnpack,
    DiskEmbedding,
    LazyBlocks,
    OffloadedBlocks,
    matrix_names,
    place_weights,
)

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

CLIP_UNUSED = ("post_norm.", "head")  # what follows the rows that Wan reads
FP32_PARAMETERS = ("norm", "modulation", "time_", "text_embedding", "patch_embedding", "img_emb", "head.")


def load_into(
    module: nn.Module,
    tensors: Iterable[tuple[str, Tensor | Packed]],
    *,
    rename: Callable[[str], str],
    dtype: torch.dtype,
    device: torch.device | str,
    keep_fp32: Callable[[str], bool],
    where: str,
    keep_on_meta: Collection[str] = (),
) -> None:
    """Give a module built on the meta device its tensors: fp32 where `keep_fp32`, called with the module's
    own name, says so, else `dtype`.

    Tensors named in `keep_on_meta` must exist like all others, but stay on the meta device in the dtype that
    they would get. `rename` maps a name in the file to the module's own.

    Strict: raises CheckpointError with the list of missing, unexpected and mis-shaped tensors before any
    tensor is converted or assigned.
    """
    expected = module.state_dict()
    entries = {rename(name): tensor for name, tensor in tensors}
    if problems := find_mismatches(_shapes(expected), _shapes(entries)):
        raise mismatch_error(problems, where)
    loaded: dict[str, Tensor] = {}
    mappings = Mappings.read_current()
    for name, meta in expected.items():
        target = torch.float32 if keep_fp32(name) else dtype
        if name in keep_on_meta:
            loaded[name] = meta.to(target)
            continue
        tensor = entries.pop(name)
        unpacked = tensor.unpack(target) if isinstance(tensor, Packed) else tensor
        # A copy where weights stay away, so that no file stays mapped for the small ones.
        loaded[name] = unpacked.to(device=device, dtype=target, copy=bool(keep_on_meta))
        stored = tensor.data
        if loaded[name].data_ptr() != stored.data_ptr():
            mappings.release_pages(stored)
    module.load_state_dict(loaded, assign=True)


def _shapes(tensors: Mapping[str, Tensor | Packed]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_loadable(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for what would fail when the transformers and the VAE are loaded: scales that are
    missing or not positive, and tensors that do not fit the VAE. Reads headers and scales only.

    `identify` has already checked names and shapes of the transformers.
    """
    for part in checkpoint.experts:
        _read_weights(part)
    if problems := find_mismatches(
        _vae_shapes(vae_config(checkpoint)), _shapes(_read_weights(checkpoint.vae))
    ):
        raise mismatch_error(problems, str(checkpoint.vae_files[0]))


@dataclass(frozen=True)
class LoadOptions:
    """How a transformer is loaded and computes. In half precision, all but the block matrices stays fp32.

    `fp8` stores matrices that are offloaded as e4m3 with a scale per row, unless the file quantizes them.
    `lazy` converts the blocks of a resident transformer on a CPU when they first run; see LazyBlocks.
    """

    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    residency: Residency = "resident"
    fp8: bool = False
    kernels: ComputeOptions = ComputeOptions()
    lazy: bool = False

    def __post_init__(self) -> None:
        if self.kernels.fp8_matmul and self.residency != "resident":
            raise ValueError(f"{self.residency} weights do not multiply in fp8")


def load_transformer(
    checkpoint: Checkpoint,
    options: LoadOptions = LoadOptions(),
    expert: Expert = "only",
    after_unpack: AfterUnpack | None = None,
) -> WanModel:
    """Load the diffusion transformer of a checkpoint, or one of its two experts, ready to run.

    `after_unpack` may change the matrices of offloaded blocks; it is called each time one is fetched.
    """
    dtype, device, kernels = options.dtype, options.device, options.kernels
    with torch.device("meta"):
        model = WanModel(checkpoint.transformer_config, kernels)
    weights = read_transformer_weights(checkpoint, expert)
    in_memory = options.residency == "resident" and not kernels.fp8_matmul
    is_lazy = options.lazy and in_memory and torch.device(device).type == "cpu"
    not_loaded = [] if in_memory else matrix_names(model.blocks, "blocks")
    if is_lazy:
        not_loaded = [name for name in model.state_dict() if name.startswith("blocks.")]
    load_into(
        model,
        weights.items(),
        rename=str,
        dtype=dtype,
        device=device,
        keep_fp32=_stays_fp32,
        where=str(checkpoint.expert(expert).files[0].parent),
        keep_on_meta=frozenset(not_loaded),
    )
    rest = {name: weights[name] for name in not_loaded}
    if kernels.fp8_matmul:
        replace_with_fp8(model.blocks, "blocks", weights, device)
    elif is_lazy:
        model.blocks = LazyBlocks(
            model.blocks, partial(_load_block, rest, keep_on_disk(rest), model.blocks, dtype)
        )
    elif rest:
        source = _to_fp8(rest, device) if options.fp8 else place_weights(rest, options.residency, device)
        model.blocks = OffloadedBlocks(model.blocks, "blocks", source, device, after_unpack)
    return model.eval()


def _stays_fp32(name: str) -> bool:
    return any(part in name for part in FP32_PARAMETERS)


def _load_block(
    mapped: dict[str, Packed],
    read: Mapping[str, OnDisk],
    blocks: nn.ModuleList,
    dtype: torch.dtype,
    index: int,
) -> dict[str, Tensor]:
    """Return the tensors of one block: mapped if the dtype fits, else read and converted, so that the pages
    of a mapping do not take memory as well.
    """
    tensors = {}
    for part, meta in blocks[index].state_dict().items():
        name, target = f"blocks.{index}.{part}", torch.float32 if _stays_fp32(part) else dtype
        weight = mapped.pop(name)
        if weight.scheme == "plain" and weight.data.dtype == target:
            tensors[part] = weight.unpack(target)
        else:
            tensors[part] = read[name].unpack(target, out=torch.empty(meta.shape, dtype=target))
    return tensors


def _to_fp8(matrices: Mapping[str, Packed], device: torch.device | str) -> dict[str, Packed]:
    """Convert plain matrices to e4m3 on the device. Raises CheckpointError for NaN and Inf."""
    converted, mappings = {}, Mappings.read_current()
    for name, weight in matrices.items():
        quantized = pack_fp8(weight.unpack(torch.float32), name) if weight.scheme == "plain" else weight
        converted[name] = replace(quantized, data=quantized.data.to(device))
        if converted[name].data.data_ptr() != weight.data.data_ptr():
            mappings.release_pages(weight.data)
    return converted


def read_transformer_weights(checkpoint: Checkpoint, expert: Expert = "only") -> dict[str, Packed]:
    """Return the weights of a transformer as its files store them, by official name."""
    return _read_weights(checkpoint.expert(expert))


def _read_weights(part: Component) -> dict[str, Packed]:
    return read_packed(part.files, rename=part.rename_key, prefixes=(part.prefix,) if part.prefix else ())


def iterate_transformer_tensors(
    checkpoint: Checkpoint, wanted: Collection[str], expert: Expert = "only"
) -> Iterator[tuple[str, Tensor]]:
    """Yield some tensors of a transformer by official name. Quantized ones are unpacked."""
    for name, weight in read_transformer_weights(checkpoint, expert).items():
        if name in wanted:
            yield (
                name,
                weight.data.view(weight.shape) if weight.scheme == "plain" else weight.unpack(torch.float32),
            )


def load_umt5(
    files: Sequence[Path],
    rename: Callable[[str], str],
    dtype: torch.dtype,
    device: torch.device | str,
    residency: Residency = "resident",
    prefix: str = "",
) -> UMT5EncoderModel:
    """Load the text encoder, ready for `t5.encode`.

    `rename` maps the names in the files, without `prefix`, to those of transformers. With residency
    `streamed`, the rows of the embedding that a prompt needs are read from disk as well.
    """
    where = str(files[0])
    weights = read_packed(files, rename=rename, prefixes=(prefix,) if prefix else ())
    weights.pop(TIED_EMBEDDING, None)
    model = t5.build_encoder(infer_t5_config({name: weight.shape for name, weight in weights.items()}, where))
    layers = model.encoder.block
    offloaded = [] if residency == "resident" else matrix_names(layers, t5.BLOCKS)
    embedding = [t5.EMBEDDING] if residency == "streamed" else []
    load_into(
        model,
        weights.items(),
        rename=str,
        dtype=dtype,
        device=device,
        keep_fp32=lambda name: dtype is torch.float16 and t5.OVERFLOWS in name,
        where=where,
        keep_on_meta=frozenset(offloaded + embedding),
    )
    if offloaded:
        source = place_weights({name: weights[name] for name in offloaded}, residency, device)
        model.encoder.block = OffloadedBlocks(layers, t5.BLOCKS, source, device)
    if embedding:
        rows = keep_on_disk({t5.EMBEDDING: weights[t5.EMBEDDING]})[t5.EMBEDDING].read_rows
        model.add_module("shared", DiskEmbedding(rows, dtype, device))
    t5.tie_embedding(model, where)
    return model


def load_clip(
    checkpoint: Checkpoint, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> CLIPVision:
    """Load the image encoder of a checkpoint that has one. The official code runs it in fp16."""
    part = checkpoint.image_encoder
    assert part is not None
    with torch.device("meta"):
        clip = CLIPVision(clip_config(checkpoint))
    load_into(
        clip,
        _clip_weights(part, clip).items(),
        rename=str,
        dtype=dtype,
        device=device,
        keep_fp32=lambda _: False,
        where=str(part.files[0]),
    )
    return clip.eval().requires_grad_(False)


def _clip_weights(part: Component, clip: CLIPVision) -> dict[str, Tensor | Packed]:
    """Read the weights of CLIP in the shapes of the official layout, without those that Wan does not use."""
    stored: dict[str, Tensor | Packed] = dict(_read_weights(part))
    if part.naming == "transformers":
        for name in [name for name in stored if "to_q." in name]:
            parts = [stored.pop(name.replace("to_q.", f"to_{p}.")) for p in "qkv"]
            stored[name.replace("to_q.", "to_qkv.")] = torch.cat([_unpack(part) for part in parts])
        for name in ("cls_embedding", "pos_embedding"):
            shape = clip.get_parameter(name).shape
            stored[name] = _unpack(stored[name]).view(shape)
    unused = (f"transformer.{len(clip.transformer)}.", *CLIP_UNUSED)
    return {name: weight for name, weight in stored.items() if not name.startswith(unused)}


def _unpack(weight: Tensor | Packed) -> Tensor:
    return weight.unpack(torch.float32) if isinstance(weight, Packed) else weight


def load_vae(checkpoint: Checkpoint, device: torch.device | str) -> VAE:
    """Load the VAE of a checkpoint, in fp32 as the official code runs it."""
    where = str(checkpoint.vae_files[0])
    weights = _read_weights(checkpoint.vae)
    vae = _build_vae(vae_config(checkpoint))
    load_into(
        vae,
        weights.items(),
        rename=str,
        dtype=torch.float32,
        device=device,
        keep_fp32=lambda _: True,
        where=where,
    )
    return vae.eval()


def _build_vae(sizes: VAEConfig | VAE22Config) -> VAE:
    with torch.device("meta"):
        return WanVAE22(sizes) if isinstance(sizes, VAE22Config) else WanVAE(sizes)


@lru_cache(2)
def _vae_shapes(sizes: VAEConfig | VAE22Config) -> Mapping[str, tuple[int, ...]]:
    return _shapes(_build_vae(sizes).state_dict())
