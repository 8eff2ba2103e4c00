"""Named tensors -> networks, ready to run.

A network is built on the meta device, where tensors have a shape and no storage, and then takes
over the tensors read: mapped from the file where the dtype fits, converted one at a time where not,
and then the pages of the file are given back. So weights are never in memory twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wancli.models import t5
from wancli.models.config import Expert, Kernels, VAE22Config
from wancli.models.dit import WanModel
from wancli.models.vae import VAE, WanVAE
from wancli.models.vae22 import WanVAE22
from wancli.resources.memory_model import Residency
from wancli.weights.checkpoint import Checkpoint, vae_sizes
from wancli.weights.component import Part
from wancli.weights.disk_reader import Mappings, OnDisk, on_disk
from wancli.weights.formats.infer_config import misfits, t5_config, unfit
from wancli.weights.formats.packed import Packed, pack_fp8
from wancli.weights.formats.read import packed
from wancli.weights.fp8_linear import multiply_in_fp8
from wancli.weights.offload import AfterUnpack, Arriving, Lookup, Streamed, matrix_names, placed

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

KEPT_FP32 = ("norm", "modulation", "time_", "text_embedding", "patch_embedding", "head.")


def load_into(
    module: nn.Module,
    tensors: Iterable[tuple[str, Tensor | Packed]],
    *,
    rename: Callable[[str], str],
    dtype: torch.dtype,
    device: torch.device | str,
    keep_fp32: Callable[[str], bool],
    where: str,
    leave: Collection[str] = (),
) -> None:
    """Gives a module built on the meta device its tensors, in `dtype` but for those kept in fp32.

    Those to `leave` are asked for like all others, and stay on the meta device in the dtype they would get.

    Strict: a missing, unexpected or mis-shaped tensor raises CheckpointError, with the list, before
    any tensor is converted or assigned. `rename` maps a name in the file to the module's own,
    `keep_fp32` is asked with the latter.
    """
    wanted = module.state_dict()
    found = {rename(name): tensor for name, tensor in tensors}
    if problems := misfits(_shapes(wanted), _shapes(found)):
        raise unfit(problems, where)
    made: dict[str, Tensor] = {}
    mappings = Mappings.now()
    for name, meta in wanted.items():
        kept = torch.float32 if keep_fp32(name) else dtype
        if name in leave:
            made[name] = meta.to(kept)
            continue
        tensor = found.pop(name)
        unpacked = tensor.unpack(kept) if isinstance(tensor, Packed) else tensor
        # A copy where weights stay away, so that no file stays mapped for the small ones.
        made[name] = unpacked.to(device=device, dtype=kept, copy=bool(leave))
        stored = tensor.data
        if made[name].data_ptr() != stored.data_ptr():
            mappings.forget(stored)
    module.load_state_dict(made, assign=True)


def _shapes(tensors: Mapping[str, Tensor | Packed]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for what loading the transformers and the VAE would: scales that are missing
    or no positive numbers, and tensors of the VAE that are not its own. Reads headers and scales only.

    Names and shapes of the transformers are those that `identify` has checked.
    """
    for part in checkpoint.experts:
        _weights(part)
    if problems := misfits(_shapes(_bare_vae(checkpoint).state_dict()), _shapes(_weights(checkpoint.vae))):
        raise unfit(problems, str(checkpoint.vae_files[0]))


def load_transformer(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device | str,
    expert: Expert = "only",
    residency: Residency = "resident",
    after_unpack: AfterUnpack | None = None,
    fp8: bool = False,
    kernels: Kernels = Kernels(),
    lazily: bool = False,
) -> WanModel:
    """The diffusion transformer of a checkpoint, or one of its two experts, ready to run. In half
    precision everything outside the large matrices of the blocks stays fp32.

    `after_unpack` changes the matrices of blocks that are fetched, each time that they are. `fp8` makes
    packed ones smaller: on the device they are e4m3 with a scale per row, but those stored quantized.
    `kernels` are what it computes with. Raises ValueError for `fp8_matmul` of weights that are not resident.
    `lazily` leaves blocks that are resident on a CPU to be converted when they first run, see Arriving.
    """
    if kernels.fp8_matmul and residency != "resident":
        raise ValueError(f"{residency} weights do not multiply in fp8")
    with torch.device("meta"):
        model = WanModel(checkpoint.transformer, kernels)
    found = transformer_weights(checkpoint, expert)
    whole = residency == "resident" and not kernels.fp8_matmul
    arriving = lazily and whole and torch.device(device).type == "cpu"
    away = [] if whole else matrix_names(model.blocks, "blocks")
    if arriving:
        away = [name for name in model.state_dict() if name.startswith("blocks.")]
    load_into(
        model,
        found.items(),
        rename=str,
        dtype=dtype,
        device=device,
        keep_fp32=_kept_fp32,
        where=str(checkpoint.expert(expert).files[0].parent),
        leave=frozenset(away),
    )
    if kernels.fp8_matmul:
        multiply_in_fp8(model.blocks, "blocks", found, device)
    elif arriving:
        mapped = {name: found[name] for name in away}
        model.blocks = Arriving(model.blocks, partial(_take, mapped, on_disk(mapped), model.blocks, dtype))
    elif away:
        matrices = {name: found[name] for name in away}
        source = _in_fp8(matrices, device) if fp8 else placed(matrices, residency, device)
        model.blocks = Streamed(model.blocks, "blocks", source, device, after_unpack)
    return model.eval()


def _kept_fp32(name: str) -> bool:
    return any(part in name for part in KEPT_FP32)


def _take(
    mapped: dict[str, Packed],
    read: Mapping[str, OnDisk],
    blocks: nn.ModuleList,
    dtype: torch.dtype,
    index: int,
) -> dict[str, Tensor]:
    """The tensors of one block: as they are mapped where the dtype fits, else read and converted, so that
    the pages of a mapping do not count beside them."""
    taken = {}
    for part, meta in blocks[index].state_dict().items():
        name, kept = f"blocks.{index}.{part}", torch.float32 if _kept_fp32(part) else dtype
        weight = mapped.pop(name)
        if weight.scheme == "plain" and weight.data.dtype == kept:
            taken[part] = weight.unpack(kept)
        else:
            taken[part] = read[name].unpack(kept, out=torch.empty(meta.shape, dtype=kept))
    return taken


def _in_fp8(matrices: Mapping[str, Packed], device: torch.device | str) -> dict[str, Packed]:
    """Raises CheckpointError for NaN and Inf."""
    made, mappings = {}, Mappings.now()
    for name, weight in matrices.items():
        small = pack_fp8(weight.unpack(torch.float32), name) if weight.scheme == "plain" else weight
        made[name] = replace(small, data=small.data.to(device))
        if made[name].data.data_ptr() != weight.data.data_ptr():
            mappings.forget(weight.data)
    return made


def transformer_weights(checkpoint: Checkpoint, expert: Expert = "only") -> dict[str, Packed]:
    """A checkpoint's transformer as its files hold it, by official name."""
    return _weights(checkpoint.expert(expert))


def _weights(part: Part) -> dict[str, Packed]:
    return packed(part.files, rename=part.rename, prefixes=(part.prefix,) if part.prefix else ())


def transformer_tensors(
    checkpoint: Checkpoint, wanted: Collection[str], expert: Expert = "only"
) -> Iterator[tuple[str, Tensor]]:
    """Some tensors of a checkpoint's transformer by official name, unpacked where they are not plain."""
    for name, weight in transformer_weights(checkpoint, expert).items():
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
    """The text encoder, ready for `t5.rows`; `rename` maps the files' names, `prefix` taken off, to those
    of transformers.

    Streamed, the rows of its embedding are read from disk too, those of a prompt's tokens.
    """
    where = str(files[0])
    found = packed(files, rename=rename, prefixes=(prefix,) if prefix else ())
    found.pop(t5.TIED, None)
    model = t5.build(t5_config({name: weight.shape for name, weight in found.items()}, where))
    layers = model.encoder.block
    away = [] if residency == "resident" else matrix_names(layers, t5.LAYERS)
    table = [t5.TABLE] if residency == "streamed" else []
    load_into(
        model,
        found.items(),
        rename=str,
        dtype=dtype,
        device=device,
        keep_fp32=lambda name: dtype is torch.float16 and t5.OVERFLOWS in name,
        where=where,
        leave=frozenset(away + table),
    )
    if away:
        source = placed({name: found[name] for name in away}, residency, device)
        model.encoder.block = Streamed(layers, t5.LAYERS, source, device)
    if table:
        rows = on_disk({t5.TABLE: found[t5.TABLE]})[t5.TABLE].rows
        model.add_module("shared", Lookup(rows, dtype, device))
    t5.tie(model, where)
    return model


def load_vae(checkpoint: Checkpoint, device: torch.device | str) -> VAE:
    """The VAE of a checkpoint, in fp32 as the official code runs it."""
    where = str(checkpoint.vae_files[0])
    found = _weights(checkpoint.vae)
    vae = _bare_vae(checkpoint)
    load_into(
        vae,
        found.items(),
        rename=str,
        dtype=torch.float32,
        device=device,
        keep_fp32=lambda _: True,
        where=where,
    )
    return vae.eval()


def _bare_vae(checkpoint: Checkpoint) -> VAE:
    sizes = vae_sizes(checkpoint)
    with torch.device("meta"):
        return WanVAE22(sizes) if isinstance(sizes, VAE22Config) else WanVAE(sizes)
