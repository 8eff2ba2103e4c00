"""Quantized checkpoints store a weight as several tensors: here they become one Packed each.

    X.weight        fp8, or a plain float
    X.scale_weight  its scale: ComfyUI's first layout, kijai
    X.weight_scale  its scale: ComfyUI's second layout, kijai, LightX2V (per row)
    X.scale_input, X.input_scale   for fp8 matrix products, where wancli makes its own: dropped
    X.comfy_quant   JSON in bytes; its "format" promises a scale (ComfyUI's second layout)
    scaled_fp8      promises a scale for every fp8 matrix (ComfyUI's first layout, kijai)
    spiece_model    ComfyUI's UMT5 files carry their tokenizer: not a weight
and `_quantization_metadata` in a safetensors header, which says the same as X.comfy_quant.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wancli.errors import CheckpointError
from wancli.weights.formats.key_mapping import is_tokenizer
from wancli.weights.formats.packed import FP8, Packed
from wancli.weights.formats.quant_schemes import MARKER, WEIGHT_SCALES, scale_fits
from wancli.weights.formats.safetensors_header import DOWNLOAD_AGAIN

SCALES = tuple(f".{key}" for key in WEIGHT_SCALES)
IGNORED_ENDINGS = (".scale_input", ".input_scale")
CONFIG = ".comfy_quant"
FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Endings that only one way of quantizing has.
REFUSED_NAMES = {
    "._data": "quanto int8",
    "._scale": "quanto int8",
    ".weight_scale_2": "nvfp4",
    ".weight_scale_inv": "fp8 in square blocks",
    ".qweight": "AWQ or GPTQ 4-bit",
    ".qzeros": "AWQ or GPTQ 4-bit",
    ".pre_quant_scale": "AWQ 4-bit",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
}
REFUSED_DTYPES = {
    torch.int8: "int8",
    torch.uint8: "4-bit integers or nvfp4",
    torch.float8_e8m0fnu: "mxfp8",
}
_NUMBER = re.compile(r"\.\d+\.")  # of a block
MAX_CONFIG = 4096  # bytes of a .comfy_quant
USE_OTHER_PRECISION = "use the bf16, fp16, fp8 or GGUF version of this checkpoint"


@dataclass(frozen=True, eq=False)
class RawEntry:
    """One entry of a file: a tensor, or a weight that the file (GGUF) already stores packed."""

    file: Path
    value: Tensor | Packed

    def tensor(self, name: str) -> Tensor:
        if isinstance(self.value, Packed):
            raise CheckpointError(
                f"{name} has no place in a GGUF file", where=str(self.file), hint=DOWNLOAD_AGAIN
            )
        return self.value


def attach_scales(entries: Mapping[str, RawEntry], formats: Mapping[str, str]) -> dict[str, Packed]:
    """Return one Packed for each weight, under the name of the weight. Reads scales, no weights.

    `formats` are those in the metadata of the files, by layer (the name without `.weight`); layers of other
    networks are ignored. Raises CheckpointError, with file and tensor, for a format that wancli does not
    read, and for a scale that is promised and missing, has a wrong size, or is not a positive number.
    """
    for name, entry in entries.items():
        _refuse_by_name(name, entry)
        _refuse_stray(name, entry, entries)
    formats = {layer: format_name for layer, format_name in formats.items() if f"{layer}.weight" in entries}
    formats |= _read_formats(entries)
    for layer, format_name in formats.items():
        _refuse_format(layer, format_name, entries[f"{layer}.weight"])
    scaled = {
        _any_block(name.removesuffix(ending))
        for name in entries
        for ending in SCALES
        if name.endswith(ending)
    }
    return {
        name: entry.value
        if isinstance(entry.value, Packed)
        else _pack_entry(name, entry, entries, formats, scaled)
        for name, entry in entries.items()
        if name != MARKER
        and not is_tokenizer(name)
        and not name.endswith((*SCALES, *IGNORED_ENDINGS, CONFIG))
    }


def _any_block(layer: str) -> str:
    """Return the name that a layer shares with its counterparts in other blocks."""
    return _NUMBER.sub(".#.", layer)


def _pack_entry(
    name: str,
    entry: RawEntry,
    entries: Mapping[str, RawEntry],
    formats: Mapping[str, str],
    scaled: AbstractSet[str],
) -> Packed:
    data, layer = entry.tensor(name), name.removesuffix(".weight")
    scale = _read_scale(layer, entries, tuple(data.shape)) if layer != name else None
    shape = tuple(data.shape)
    if data.dtype in FP8:
        promised = layer in formats or (MARKER in entries and data.dim() == 2) or _any_block(layer) in scaled
        if promised and scale is None:
            raise CheckpointError(
                f"{name} is scaled fp8, but its scale is missing", where=str(entry.file), hint=DOWNLOAD_AGAIN
            )
        return Packed("fp8", data, shape, scale)
    if data.dtype not in FLOATS:
        raise _unsupported_error(
            name, REFUSED_DTYPES.get(data.dtype, f"{data.dtype}".removeprefix("torch.")), entry
        )
    if scale is not None and not (scale == 1).all():
        raise CheckpointError(
            f"{name} has a scale, but is stored as {data.dtype}, not fp8".replace("torch.", ""),
            where=str(entry.file),
            hint=DOWNLOAD_AGAIN,
        )
    return Packed("plain", data, shape)


def _read_scale(layer: str, entries: Mapping[str, RawEntry], shape: tuple[int, ...]) -> Tensor | None:
    """Return the scale of a layer in fp32, or None if it has none."""
    name = next((layer + ending for ending in SCALES if layer + ending in entries), None)
    if name is None:
        return None
    entry = entries[name]
    scale = entry.tensor(name)
    if scale.dtype not in FLOATS:
        known = "mxfp8" if scale.dtype in (torch.uint8, torch.float8_e8m0fnu) else "nvfp4"
        raise _unsupported_error(f"{layer}.weight", known, entry)
    if not scale_fits(tuple(scale.shape), shape):
        raise CheckpointError(
            f"{name} is {list(scale.shape)}, which fits no weight of {list(shape)}",
            where=str(entry.file),
            hint=DOWNLOAD_AGAIN,
        )
    scale = scale.float()
    bad = scale[~(scale.isfinite() & (scale > 0))]
    if bad.numel():
        raise CheckpointError(
            f"{name} holds {bad.flatten()[0].item():g}, and scales are positive numbers",
            where=str(entry.file),
            hint=DOWNLOAD_AGAIN,
        )
    return scale


def _refuse_by_name(name: str, entry: RawEntry) -> None:
    known = next((what for ending, what in REFUSED_NAMES.items() if name.endswith(ending)), None)
    if known is not None:
        raise _unsupported_error(name, known, entry)


def _refuse_stray(name: str, entry: RawEntry, entries: Mapping[str, RawEntry]) -> None:
    """Raise CheckpointError for a scale or a format without its weight, and for two scales of one weight."""
    ending = next((ending for ending in (*SCALES, CONFIG) if name.endswith(ending)), None)
    if ending is None:
        return
    layer = name.removesuffix(ending)
    both = all(layer + ending in entries for ending in SCALES)
    if both or f"{layer}.weight" not in entries:
        what = "appears twice" if both else f"belongs to {layer}.weight, which is missing"
        raise CheckpointError(f"{name} {what}", where=str(entry.file), hint=DOWNLOAD_AGAIN)


def _read_formats(entries: Mapping[str, RawEntry]) -> dict[str, str]:
    """Return the format of every layer that has a .comfy_quant."""
    formats = {}
    for name, entry in entries.items():
        if name.endswith(CONFIG):
            letters = entry.tensor(name).flatten()[:MAX_CONFIG]
            try:
                formats[name.removesuffix(CONFIG)] = str(json.loads(bytes(letters.tolist()))["format"])
            except (ValueError, TypeError, KeyError, RecursionError):
                raise CheckpointError(
                    f"{name} is not JSON with a format", where=str(entry.file), hint=DOWNLOAD_AGAIN
                ) from None
    return formats


def _refuse_format(layer: str, format_name: str, entry: RawEntry) -> None:
    """Raise CheckpointError for a format that wancli does not read, or that the weight does not have."""
    if format_name not in FORMATS:
        raise _unsupported_error(f"{layer}.weight", format_name, entry)
    dtype = entry.tensor(layer).dtype
    if dtype != FORMATS[format_name]:
        raise CheckpointError(
            f"{layer}.weight is marked as {format_name}, but stored as {dtype}".replace("torch.", ""),
            where=str(entry.file),
            hint=DOWNLOAD_AGAIN,
        )


def _unsupported_error(name: str, what: str, entry: RawEntry) -> CheckpointError:
    return CheckpointError(
        f"{name} is stored as {what}; wancli reads floats, fp8 and GGUF",
        where=str(entry.file),
        hint=USE_OTHER_PRECISION,
    )
