"""How the weights of a network are stored: precision per class of tensor, and the quantization scheme.

Detected tensor by tensor from dtypes and sibling keys, never from the name of the file. W is a matrix [out,
in] and `X` the name of its layer:

  plain         floats of 16 bits or more
  fp8           X.weight in fp8, no scale: W = fp8
  fp8_scaled    X.scale_weight and the marker `scaled_fp8` (ComfyUI, kijai): W = fp8 * scale
  kijai         the same scales, as X.weight_scale or without the marker
  comfy_quant   X.weight_scale, and a JSON text in X.comfy_quant or in the header's metadata
  lightx2v      X.weight_scale [out, 1] or [out]: one scale per row
  block         X.weight_scale [out, n, 1]: n blocks along `in`
  gguf          blocks of GGUF types
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from wancli.weights.formats.safetensors_header import BITS, TensorInfo
from wancli.weights.formats.tensor_index import TensorIndex

SchemeName: TypeAlias = Literal[
    "plain", "fp8", "fp8_scaled", "kijai", "comfy_quant", "lightx2v", "block", "gguf", "unsupported"
]
Tensors: TypeAlias = Mapping[str, TensorInfo]

FLOATS = {"F16", "BF16", "F32", "F64"}
FP8 = {"F8_E4M3", "F8_E5M2"}
GGUF_TYPES = {
    *("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"),
    *("Q5_0", "Q5_1", "Q4_0", "Q4_1", "IQ4_NL", "IQ4_XS"),
}
COMFY_FORMATS = {"float8_e4m3fn", "float8_e5m2"}
WEIGHT_SCALES = ("scale_weight", "weight_scale")
MARKER = "scaled_fp8"
SQUARE_BLOCKS = "fp8 in square blocks"
# Last component of a name -> it belongs to a quantized layer and is not a parameter of the network.
HELPERS = {
    *WEIGHT_SCALES,
    *("scale_input", "input_scale", "weight_scale_2", "weight_scale_inv", "comfy_quant", MARKER),
    "spiece_model",
    *("_scale", "qzeros", "scales", "absmax", "quant_map", "g_idx", "wscales", "smooth_factor"),
}
LARGEST_TEXT = 4096  # bytes of a comfy_quant tensor


@dataclass(frozen=True)
class Scheme:
    """How the matrices of a network are quantized. `refusal` names a scheme that wancli does not load."""

    name: SchemeName = "plain"
    dtypes: tuple[str, ...] = ()  # of the quantized matrices
    scales: Literal["", "tensor", "row", "block"] = ""
    layers: int = 0  # how many matrices are quantized
    full_precision: bool = False  # the file asks for matmuls in 16 bits or more
    refusal: str = ""


PLAIN = Scheme()


@dataclass(frozen=True)
class Precision:
    """The tensors of one class: how many of each dtype, their bytes in the file, the bytes of the largest."""

    group: str
    dtypes: tuple[tuple[str, int], ...]
    nbytes: int = 0
    largest: int = 0


def is_helper(name: str) -> bool:
    """Return whether a tensor is a scale, a marker or a text, not a parameter."""
    last = name.rpartition(".")[2]
    return last in HELPERS or "quant_state" in name


def detect_scheme(tensors: Tensors, contents: TensorIndex, prefix: str) -> Scheme:
    """Detect the scheme of one network. Names in `tensors` are without `prefix`, names in `contents` with
    it.
    """
    if unsupported := _find_unsupported(tensors):
        return Scheme("unsupported", refusal=unsupported)
    formats, full = _read_comfy_formats(tensors, contents, prefix)
    if unknown := sorted(formats - COMFY_FORMATS):
        return Scheme("unsupported", refusal=f"ComfyUI's {unknown[0]}")
    weights = {name: info for name, info in tensors.items() if not is_helper(name)}
    if contents.container == "gguf":
        quantized = [info.dtype for info in weights.values() if info.dtype not in FLOATS]
        if other := sorted(set(quantized) - GGUF_TYPES):
            return Scheme("unsupported", refusal=f"GGUF {other[0]}")
        return Scheme("gguf", _by_frequency(quantized), layers=len(quantized)) if quantized else PLAIN
    fp8 = {name: info for name, info in weights.items() if info.dtype in FP8}
    # A counter is no quantized weight: it shows as an unexpected tensor.
    matrices = (info.dtype for info in weights.values() if math.prod(info.shape) > 1)
    if other := sorted(set(matrices) - FLOATS - FP8):
        return Scheme("unsupported", refusal=f"{other[0]} weights")
    if not fp8:
        return PLAIN
    scales = {_scale_granularity(tensors, name, info.shape) for name, info in fp8.items()} - {""}
    marker = tensors.get(MARKER)
    asks_full = full or (marker is not None and math.prod(marker.shape) == 2)
    coarse: Literal["", "tensor", "row", "block"] = (
        "block" if "block" in scales else "row" if "row" in scales else "tensor" if scales else ""
    )
    name = _scheme_name(coarse, bool(formats), marker is not None and _is_legacy(tensors))
    dtypes = _by_frequency(info.dtype for info in fp8.values())
    return Scheme(name, dtypes, coarse, len(fp8), asks_full)


def scale_fits(scale: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Return whether a scale of one shape can belong to an fp8 weight of the other."""
    if math.prod(scale) == 1 or (len(shape) > 1 and scale in ((shape[0],), (shape[0], 1))):
        return True
    blocks = len(scale) == 3 and len(shape) == 2 and scale[1] and (scale[0], scale[2]) == (shape[0], 1)
    return bool(blocks) and shape[1] % scale[1] == 0


def count_precision(
    tensors: Tensors, group: Mapping[str, str], order: Sequence[str] = ()
) -> tuple[Precision, ...]:
    """Count tensors per class and dtype. `group` maps a tensor to its class, `order` sorts the classes."""
    classes: dict[str, list[TensorInfo]] = {}
    for name, where in group.items():
        classes.setdefault(where, []).append(tensors[name])
    ordered = sorted(classes, key=lambda where: order.index(where) if where in order else len(order))
    counts = []
    for where in ordered:
        dtypes = Counter(info.dtype for info in classes[where])
        sizes = [_stored_bytes(info) for info in classes[where]]
        counts.append(Precision(where, tuple(sorted(dtypes.items())), sum(sizes), max(sizes)))
    return tuple(counts)


def _stored_bytes(info: TensorInfo) -> int:
    """Return the bytes of a tensor in its file. GGUF headers record them; the module gguf would load
    torch.
    """
    recorded: int | None = getattr(info, "nbytes", None)
    return math.prod(info.shape) * BITS.get(info.dtype, 8) // 8 if recorded is None else recorded


def _find_unsupported(tensors: Tensors) -> str:
    """Name the scheme if it stores its matrices under names of its own."""
    tails = {name.rpartition(".")[2] for name in tensors}
    if "_data" in tails and "_scale" in tails:
        return "quanto"
    if tails & {"wscales", "smooth_factor", "proj_down"}:
        return "SVDQuant (Nunchaku)"
    if "qweight" in tails:
        return "AWQ or GPTQ"
    if "absmax" in tails or any("quant_state" in name for name in tensors):
        return "bitsandbytes"
    if "weight_scale_2" in tails:
        return "NVFP4"
    if "weight_scale_inv" in tails:
        return SQUARE_BLOCKS
    scales = {info.dtype for name, info in tensors.items() if name.endswith(WEIGHT_SCALES)}
    if scales & {"U8", "F8_E8M0"}:
        return "MXFP8"
    if any(info.dtype == "I8" and not is_helper(name) for name, info in tensors.items()):
        return "int8"
    return SQUARE_BLOCKS if any(_has_square_blocks(tensors, name) for name in tensors) else ""


def _has_square_blocks(tensors: Tensors, name: str) -> bool:
    """Return whether the scales of an fp8 weight are a grid over rows and columns."""
    shape, scale = tensors[name].shape, _find_scale(tensors, name)
    if tensors[name].dtype not in FP8 or scale is None:
        return False
    is_grid = len(scale.shape) == len(shape) == 2 and scale.shape[0] < shape[0]
    return is_grid and not scale_fits(scale.shape, shape)


def _find_scale(tensors: Tensors, name: str) -> TensorInfo | None:
    layer = name.removesuffix("weight")
    return next((tensors[layer + key] for key in WEIGHT_SCALES if layer + key in tensors), None)


def _read_comfy_formats(tensors: Tensors, contents: TensorIndex, prefix: str) -> tuple[set[str], bool]:
    """Return the formats that ComfyUI's new layout names, and whether it requests full precision anywhere."""
    declared: list[object] = []
    layers = _parse_object(contents.metadata.get("_quantization_metadata", "")).get("layers")
    if isinstance(layers, dict):
        declared += [
            layer for name, layer in layers.items() if f"{name.removeprefix(prefix)}.weight" in tensors
        ]
    for name, info in tensors.items():
        if name.endswith(".comfy_quant") and math.prod(info.shape) <= LARGEST_TEXT:
            declared.append(_parse_object(contents.read_bytes(prefix + name)))
    entries = [entry for entry in declared if isinstance(entry, dict)]
    formats = {str(entry.get("format", "an unnamed format")) for entry in entries}
    return formats, any(entry.get("full_precision_matrix_mult") is True for entry in entries)


def _parse_object(text: str | bytes) -> dict[str, object]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _scale_granularity(
    tensors: Tensors, name: str, shape: tuple[int, ...]
) -> Literal["", "tensor", "row", "block"]:
    scale = _find_scale(tensors, name)
    if scale is None:
        return ""
    if math.prod(scale.shape) == 1:
        return "tensor"
    per_row = scale.shape[:1] == shape[:1] and math.prod(scale.shape) == shape[0]
    return "row" if per_row else "block"


def _scheme_name(scales: str, comfy: bool, legacy: bool) -> SchemeName:
    if comfy:
        return "comfy_quant"
    if not scales:
        return "fp8"
    if scales == "tensor":
        return "fp8_scaled" if legacy else "kijai"
    return "lightx2v" if scales == "row" else "block"


def _is_legacy(tensors: Tensors) -> bool:
    return any(name.endswith(".scale_weight") for name in tensors)


def _by_frequency(dtypes: Iterable[str]) -> tuple[str, ...]:
    """Return every dtype once, the most frequent first."""
    return tuple(dtype for dtype, _ in Counter(dtypes).most_common())
