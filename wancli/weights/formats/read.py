"""Reads files as named tensors, mapped from disk as stored. The only module that opens weight data."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from wancli.errors import CheckpointError, DoesNotFit
from wancli.weights.formats import gguf_header, safetensors_header, tensor_index
from wancli.weights.formats.attach_scales import USE_OTHER_PRECISION, RawEntry, attach_scales
from wancli.weights.formats.key_mapping import POSITION_IDS, plain_name
from wancli.weights.formats.mapped_file import map_file, view_tensor
from wancli.weights.formats.packed import Packed
from wancli.weights.formats.pickle_header import check_zip, unwrap_state_dict
from wancli.weights.formats.quant_schemes import MARKER
from wancli.weights.formats.safetensors_header import DOWNLOAD_AGAIN, open_weights

Entry = TypeVar("Entry")

PATCH_EMBEDDING = "patch_embedding"
# Whole-model files put a prefix before each network; the first that any name has is taken off.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
TEXT_ENCODER_PREFIXES = ("text_encoders.umt5xxl.transformer.",)
FOREIGN = (*tensor_index.OTHER_NETWORKS, *PREFIXES[:2])
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


def iterate_tensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the files with its name, mapped from disk: pages are read when touched.

    Raises CheckpointError for a damaged file and for a pickle that wants to run code.
    """
    for path in files:
        is_pickle = tensor_index.detect_container(path) == "pth"
        yield from _iterate_pickle(path) if is_pickle else _iterate_safetensors(path)


def read_packed(
    files: Sequence[Path],
    *,
    rename: Callable[[str], str] = str,
    prefixes: Sequence[str] = PREFIXES,
) -> dict[str, Packed]:
    """Return every parameter in .safetensors, .gguf and .pth files as it is stored, mapped from disk.

    Weights are read when touched; their scales, which are attached to them, at once. The first of `prefixes`
    that occurs is taken off; if there is only one, nothing else belongs to the network. The other networks of
    a whole checkpoint are left out. `rename` maps the rest of a name to the network's own.

    Raises CheckpointError, naming file and tensor, for damaged files, for quantization schemes that wancli
    does not read, for a tensor that occurs twice, also under two names, and like `attach_scales`; DoesNotFit
    for a .pth larger than memory and swap.
    """
    entries: dict[str, RawEntry] = {}
    formats: dict[str, str] = {}
    for path in files:
        container = tensor_index.detect_container(path)
        stored = _iterate_gguf(path) if container == "gguf" else iterate_tensors([path])
        for stored_name, value in stored:
            name = plain_name(stored_name)
            if name in entries:
                what = "is in another file too" if entries[name].file != path else "has two names"
                raise CheckpointError(f"{name} {what}", where=str(path), hint=DOWNLOAD_AGAIN)
            entries[name] = RawEntry(path, value)
        if container == "safetensors":
            formats |= _read_formats(path)
    where = str(files[0]) if files else ""
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in entries)), "")
    is_known = bool(prefix) and len(prefixes) == 1
    own = {
        name: entry
        for name, entry in entries.items()
        if not name.endswith(POSITION_IDS)
        and (
            (prefix and name.startswith(prefix))
            or (not is_known and not name.startswith(FOREIGN))
            or name == MARKER
        )
    }
    unprefixed = _rename_keys(own, lambda name: name.removeprefix(prefix), where)
    weights = attach_scales(
        unprefixed, {layer.removeprefix(prefix): format_name for layer, format_name in formats.items()}
    )
    return _rename_keys(_split_patches(weights), rename, where)


def _iterate_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    header, pages = safetensors_header.read_header(path), map_file(path)
    for name, info in header.tensors.items():
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"{name} is stored as {info.dtype}", where=str(path), hint=USE_OTHER_PRECISION
            )
        yield name, view_tensor(pages, header.ranges[name][0], DTYPES[info.dtype], info.shape)


def _read_formats(path: Path) -> dict[str, str]:
    """Read ComfyUI's _quantization_metadata: the format of each quantized layer."""
    text = safetensors_header.read_metadata(path).get("_quantization_metadata")
    if text is None:
        return {}
    try:
        layers = json.loads(text)["layers"]
        return {layer: str(x["format"] if isinstance(x, dict) else x) for layer, x in layers.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            "its _quantization_metadata cannot be read", where=str(path), hint=DOWNLOAD_AGAIN
        ) from error


def _iterate_gguf(path: Path) -> Iterator[tuple[str, Packed]]:
    pages = map_file(path)
    for name, info in gguf_header.read_header(path).tensors.items():
        plain = info.dtype in DTYPES
        dtype, shape = (DTYPES[info.dtype], info.shape) if plain else (torch.uint8, (info.nbytes,))
        data = view_tensor(pages, info.start, dtype, shape)
        yield name, Packed("plain" if plain else info.dtype, data, info.shape)


def _rename_keys(entries: Mapping[str, Entry], rename: Callable[[str], str], where: str) -> dict[str, Entry]:
    """Rename all entries. Raises CheckpointError if two names become one."""
    renamed: dict[str, Entry] = {}
    for name, entry in entries.items():
        if (new := rename(name)) in renamed:
            raise CheckpointError(f"{new} has two names, one of them {name}", where=where)
        renamed[new] = entry
    return renamed


def _split_patches(weights: dict[str, Packed]) -> dict[str, Packed]:
    """Split the patch embedding [d * in, 1, 2, 2] of stable-diffusion.cpp into [d, in, 1, 2, 2]."""
    weight, bias = weights.get(PATCH_EMBEDDING + ".weight"), weights.get(PATCH_EMBEDDING + ".bias")
    if weight is None or bias is None or len(weight.shape) != 4 or weight.shape[0] % bias.shape[0]:
        return weights
    shape = (bias.shape[0], weight.shape[0] // bias.shape[0], *weight.shape[1:])
    data = weight.data.view(shape) if weight.scheme == "plain" else weight.data
    return weights | {PATCH_EMBEDDING + ".weight": replace(weight, data=data, shape=shape)}


def _iterate_pickle(path: Path) -> Iterator[tuple[str, Tensor]]:
    _check_zip(path)
    try:
        with open_weights(path) as file:  # torch takes no name that is not UTF-8
            name = f"/proc/self/fd/{file.fileno()}"
            state = torch.load(name, map_location="cpu", mmap=True, weights_only=True)
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
    yield from unwrap_state_dict(state, Tensor, path).items()


def _check_zip(path: Path) -> None:
    try:
        with open_weights(path) as file, zipfile.ZipFile(file) as archive:
            check_zip(archive, path)
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            "truncated, or not a PyTorch file of this decade", where=str(path), hint=DOWNLOAD_AGAIN
        ) from error
