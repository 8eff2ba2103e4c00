"""Files -> named tensors -> networks. The only place that opens weights.

A network is built on the meta device, where tensors have a shape and no storage, and then takes
over the tensors read: mapped from the file where the dtype fits, converted one at a time where not.
So weights are never in memory twice.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from wancli.errors import CheckpointError, DoesNotFit
from wancli.experts import Expert
from wancli.memory import Residency
from wancli.models import t5
from wancli.models.config import VAE22Config
from wancli.models.dit import WanModel
from wancli.models.vae import VAE, WanVAE
from wancli.models.vae22 import WanVAE22
from wancli.weights import gguf
from wancli.weights.fold import Stored, fold
from wancli.weights.headers import DOWNLOAD_AGAIN, header
from wancli.weights.identify import Checkpoint, vae_sizes
from wancli.weights.mapping import mapped, safetensors_metadata, safetensors_starts, tensor_at
from wancli.weights.ondisk import on_disk
from wancli.weights.packed import Packed, pack_fp8
from wancli.weights.parts import Part
from wancli.weights.residency import AfterUnpack, Lookup, Streamed, matrix_names, placed
from wancli.weights.sizes import t5_config

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

Entry = TypeVar("Entry")

PATCHES = "patch_embedding"
LISTED = 10  # tensors named in one message; the rest are counted
# Whole-model files put each network behind a prefix; the first that any name has is taken off.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
TEXT_ENCODER_PREFIXES = ("text_encoders.umt5xxl.transformer.",)
FOREIGN = ("vae.", "first_stage_model.", "text_encoders.", "cond_stage_model.", *PREFIXES[:2])
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
KEPT_FP32 = ("norm", "modulation", "time_", "text_embedding", "patch_embedding", "head.")


def tensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the files, by name, mapped from disk: pages are read when touched.

    Raises CheckpointError for a damaged file and for a pickle that wants to run code.
    """
    for path in files:
        yield from _from_safetensors(path) if path.suffix == ".safetensors" else _from_pickle(path)


def packed(
    files: Sequence[Path],
    *,
    rename: Callable[[str], str] = str,
    prefixes: Sequence[str] = PREFIXES,
) -> dict[str, Packed]:
    """Every parameter in .safetensors, .gguf and .pth files as it is stored, mapped from disk.

    Weights are read when touched; their scales, which are folded into them, at once. `prefixes` are
    tried in turn and the first that occurs is taken off; the other networks of a whole-model file
    are left out. `rename` maps what remains of a name to wancli's own.

    Raises CheckpointError, naming file and tensor, for damaged files, for ways of quantizing that
    wancli does not read, for a tensor that is there twice, also under two names, and as `fold` does
    for scales; DoesNotFit for a .pth larger than memory and swap.
    """
    stored: dict[str, Stored] = {}
    formats: dict[str, str] = {}
    for path in files:
        for name, value in _entries(path):
            if name in stored:
                raise CheckpointError(f"{name} is in another file too", where=str(path), hint=DOWNLOAD_AGAIN)
            stored[name] = Stored(path, value)
        if path.suffix == ".safetensors":
            formats |= _formats(path)
    where = str(files[0]) if files else ""
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in stored)), "")
    own = {
        name: entry
        for name, entry in stored.items()
        if (prefix and name.startswith(prefix)) or not name.startswith(FOREIGN)
    }
    bare = _renamed(own, lambda name: name.removeprefix(prefix), where)
    folded = fold(bare, {layer.removeprefix(prefix): said for layer, said in formats.items()})
    return _renamed(_split_patches(folded), rename, where)


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
    problems = [f"missing {name}" for name in wanted.keys() - found.keys()]
    problems += [f"unexpected {name}" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} is {list(found[name].shape)}, expected {list(wanted[name].shape)}"
        for name in found.keys() & wanted.keys()
        if tuple(found[name].shape) != tuple(wanted[name].shape)
    ]
    if problems:
        more = [f"and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
        raise CheckpointError(
            "the tensors do not fit the model: " + "; ".join(sorted(problems)[:LISTED] + more),
            where=where,
            hint="the file belongs to another model or is damaged; compare it with config.json",
        )
    made: dict[str, Tensor] = {}
    for name, meta in wanted.items():
        kept = torch.float32 if keep_fp32(name) else dtype
        if name in leave:
            made[name] = meta.to(kept)
            continue
        tensor = found.pop(name)
        unpacked = tensor.unpack(kept) if isinstance(tensor, Packed) else tensor
        # A copy where weights stay away, so that no file stays mapped for the small ones.
        made[name] = unpacked.to(device=device, dtype=kept, copy=bool(leave))
    module.load_state_dict(made, assign=True)


def load_transformer(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device | str,
    expert: Expert = "only",
    residency: Residency = "resident",
    after_unpack: AfterUnpack | None = None,
    fp8: bool = False,
) -> WanModel:
    """The diffusion transformer of a checkpoint, or one of its two experts, ready to run. In half
    precision everything outside the large matrices of the blocks stays fp32.

    `after_unpack` changes the matrices of blocks that are fetched, each time that they are. `fp8` makes
    packed ones smaller: on the device they are e4m3 with a scale per row, but those stored quantized.
    """
    with torch.device("meta"):
        model = WanModel(checkpoint.transformer)
    found = transformer_weights(checkpoint, expert)
    away = [] if residency == "resident" else matrix_names(model.blocks, "blocks")
    load_into(
        model,
        found.items(),
        rename=str,
        dtype=dtype,
        device=device,
        keep_fp32=lambda name: any(part in name for part in KEPT_FP32),
        where=str(checkpoint.expert(expert).files[0].parent),
        leave=frozenset(away),
    )
    if away:
        matrices = {name: found[name] for name in away}
        source = _in_fp8(matrices, device) if fp8 else placed(matrices, residency, device)
        model.blocks = Streamed(model.blocks, "blocks", source, device, after_unpack)
    return model.eval()


def _in_fp8(matrices: Mapping[str, Packed], device: torch.device | str) -> dict[str, Packed]:
    """Raises CheckpointError for NaN and Inf."""
    made = {}
    for name, weight in matrices.items():
        small = pack_fp8(weight.unpack(torch.float32), name) if weight.scheme == "plain" else weight
        made[name] = replace(small, data=small.data.to(device))
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
    sizes = vae_sizes(checkpoint)
    with torch.device("meta"):
        vae = WanVAE22(sizes) if isinstance(sizes, VAE22Config) else WanVAE(sizes)
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


def _entries(path: Path) -> Iterator[tuple[str, Tensor | Packed]]:
    return _from_gguf(path) if path.suffix == ".gguf" else tensors([path])


def _from_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    infos = header(path)
    pages = mapped(path)
    starts = safetensors_starts(pages)
    for name, info in infos.items():
        yield name, tensor_at(pages, starts[name], DTYPES[info.dtype], info.shape)


def _formats(path: Path) -> dict[str, str]:
    """ComfyUI's _quantization_metadata: the format of each quantized layer."""
    said = safetensors_metadata(mapped(path)).get("_quantization_metadata")
    if said is None:
        return {}
    try:
        layers = json.loads(said)["layers"]
        return {layer: str(x["format"] if isinstance(x, dict) else x) for layer, x in layers.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            "its _quantization_metadata cannot be read", where=str(path), hint=DOWNLOAD_AGAIN
        ) from error


def _from_gguf(path: Path) -> Iterator[tuple[str, Packed]]:
    pages = mapped(path)
    for name, info in gguf.header(path).tensors.items():
        plain = info.dtype in DTYPES
        dtype, shape = (DTYPES[info.dtype], info.shape) if plain else (torch.uint8, (info.nbytes,))
        data = tensor_at(pages, info.start, dtype, shape)
        yield name, Packed("plain" if plain else info.dtype, data, info.shape)


def _renamed(entries: Mapping[str, Entry], rename: Callable[[str], str], where: str) -> dict[str, Entry]:
    """Raises CheckpointError if two names become one."""
    found: dict[str, Entry] = {}
    for name, entry in entries.items():
        if (new := rename(name)) in found:
            raise CheckpointError(f"{new} is there under two names, one of them {name}", where=where)
        found[new] = entry
    return found


def _split_patches(weights: dict[str, Packed]) -> dict[str, Packed]:
    """stable-diffusion.cpp stores the patch embedding [d, in, 1, 2, 2] as [d * in, 1, 2, 2]."""
    weight, bias = weights.get(PATCHES + ".weight"), weights.get(PATCHES + ".bias")
    if weight is None or bias is None or len(weight.shape) != 4 or weight.shape[0] % bias.shape[0]:
        return weights
    shape = (bias.shape[0], weight.shape[0] // bias.shape[0], *weight.shape[1:])
    data = weight.data.view(shape) if weight.scheme == "plain" else weight.data
    return weights | {PATCHES + ".weight": replace(weight, data=data, shape=shape)}


def _from_pickle(path: Path) -> Iterator[tuple[str, Tensor]]:
    _check_zip(path)
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "its pickle asks to run code, which wancli refuses",
            where=str(path),
            hint="download the official file, or save the weights as .safetensors where you trust them",
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        if "unable to mmap" in str(error):
            raise DoesNotFit(
                "a .pth is mapped whole, and it is larger than memory and swap together",
                where=str(path),
                hint="use the .safetensors or .gguf version of this file, or add swap",
            ) from error
        raise CheckpointError(f"damaged: {error}", where=str(path), hint=DOWNLOAD_AGAIN) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError("not a plain table of named tensors", where=str(path), hint=DOWNLOAD_AGAIN)
    yield from state.items()


def _check_zip(path: Path) -> None:
    """A .pth is an uncompressed zip: what unpacks to more than the file holds is an attack."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except FileNotFoundError:
        raise CheckpointError("no such file", where=str(path), hint=DOWNLOAD_AGAIN) from None
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            "truncated, or not a PyTorch file of this decade", where=str(path), hint=DOWNLOAD_AGAIN
        ) from error
    compressed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if compressed or sum(member.file_size for member in members) > path.stat().st_size:
        raise CheckpointError(
            "its members unpack to more than the file holds; PyTorch does not write such files",
            where=str(path),
            hint=DOWNLOAD_AGAIN,
        )
