"""Reads which changes a LoRA file makes, from its header alone: no torch, no data.

low-rank   W += scale * up @ down                       LoRA (arXiv 2106.09685); scale = alpha / rank,
                                                        alpha / sqrt(rank) if rank-stabilised (2312.03732)
full       W += diff                                    weights, biases, norms, modulations
loha       W += scale * (w1_a @ w1_b) * (w2_a @ w2_b)   FedPara (2108.06098), element by element
lokr       W += scale * kron(w1, w2)                    LyCORIS (2309.14859); w1, w2 whole or products
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from wancli.errors import CheckpointError
from wancli.weights.formats.numbers import decode_numbers
from wancli.weights.formats.quant_schemes import MARKER
from wancli.weights.formats.safetensors_header import Header, TensorInfo, read_header
from wancli.weights.formats.tensor_index import check_complete
from wancli.weights.lora.change import Change, Kind, Shape, split_fused
from wancli.weights.lora.key_mapping import (
    REFUSED,
    detect_style,
    is_whole_weight,
    parameter_name,
    parse_keys,
)
from wancli.weights.lora.scaling import Scaling, read_scaling

KINDS: dict[Kind, tuple[str, ...]] = {
    "full": ("diff",),
    "low-rank": ("up", "down"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
}
FLOATS = {"F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2"}
APPLIED_HINT = "wancli applies LoRA, LoHa, LoKr and plain differences; convert this file to one of them."
QUANTIZED_HINT = "The matrices are quantized, with scales; save this LoRA in bf16 or fp16."
QUANTIZATION_KEY = "_quantization_metadata"  # ComfyUI's, in the header
MAX_EXAMPLES = 3  # unknown keys named as examples
# Last components of keys that say how matrices are quantized.
QUANTIZERS = {MARKER, "comfy_quant", "absmax", "quant_map"}


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file as its header describes it."""

    path: Path
    style: str  # whose naming it is
    changes: tuple[Change, ...]
    unknown: tuple[str, ...]  # keys that name nothing of a Wan transformer
    config: Path | None  # the file beside it that its scales come from
    scaled: bool  # whether the file or its config says how strong it is
    alphas: tuple[float, ...] = ()  # those that its metadata or config says
    notes: tuple[str, ...] = ()  # what a user should know about its scales
    rescaled: bool = False  # its scales are others than those of the first versions of wancli


def read_lora_file(path: Path) -> LoraFile:
    """Read every change of a file, in any style of `key_mapping`.

    Raises CheckpointError for a damaged file, an incomplete change, one made twice, and for changes that
    wancli does not apply: DoRA, Tucker decompositions, OFT, GLoRA.
    """
    check_complete(path)
    header = read_header(path)
    if QUANTIZATION_KEY in header.metadata:
        raise CheckpointError(
            f"its {QUANTIZATION_KEY} says that its matrices are quantized",
            where=str(path),
            hint=QUANTIZED_HINT,
        )
    targets = parse_keys(header.tensors)
    modules: dict[str, dict[str, str]] = {}
    for key, target in targets.items():
        _check(path, key, header.tensors[key], target.part)
        parts = modules.setdefault(target.module, {})
        if target.part in parts:
            raise _invalid_error(path, f"{parts[target.part]} and {key} are the same under two names")
        parts[target.part] = key
    names = {target.module: target.names for target in targets.values()}
    unknown = [key for key in header.tensors if key not in targets]
    scaling = read_scaling(
        path, header.metadata, peft=any(target.style == "PEFT" for target in targets.values())
    )
    changes: dict[str, Change] = {}
    applied: set[str] = set()
    for module, parts in modules.items():
        if "alpha" in parts:
            scale = partial(_divide, _read_alpha(header, parts["alpha"]))
        else:
            scale = partial(scaling.scale_of, names[module])
        module_changes = [
            *_weight_changes(path, module, parts, header.tensors, scale),
            *_bias_changes(module, parts, header.tensors, scale),
        ]
        used = {key for change in module_changes for key in change.keys.values()}
        unknown += [
            key for part, key in parts.items() if key not in used and not (module_changes and part == "alpha")
        ]
        applied |= {module} if module_changes else set()
        for change in (part for whole in module_changes for part in split_fused(path, module, whole)):
            if other := changes.get(change.name):
                raise _invalid_error(path, f"{other.key} and {change.key} both change {change.name}")
            changes[change.name] = change
    if whole := next(filter(is_whole_weight, unknown), None):
        raise _whole_weight_error(path, whole, alone=not changes)
    _refuse_leftover(path, unknown, {t.stem for t in targets.values() if t.module in applied})
    ranked = [change for change in changes.values() if change.rank]
    by_scaling = [change for change in ranked if "alpha" not in change.keys]
    return LoraFile(
        path,
        style=detect_style(targets),
        changes=tuple(changes.values()),
        unknown=tuple(unknown),
        config=scaling.config,
        scaled=scaling.alpha is not None or not by_scaling,
        alphas=() if scaling.alpha is None else (scaling.alpha, *scaling.alphas.values()),
        notes=(*scaling.notes, *_pattern_notes(scaling, names)) if by_scaling else (),
        rescaled=bool(by_scaling) and (scaling.in_metadata or scaling.has_expressions),
    )


def _check(path: Path, key: str, info: TensorInfo, part: str) -> None:
    if part in REFUSED:
        raise CheckpointError(
            f"{key} belongs to {part}, which wancli does not apply",
            where=str(path),
            hint=APPLIED_HINT,
        )
    if part == "alpha" and math.prod(info.shape) != 1:
        raise _invalid_error(path, f"{key} is not one number but {list(info.shape)}")
    if part != "alpha" and info.dtype not in FLOATS:
        raise _invalid_error(path, f"{key} is stored as {info.dtype}, which no weight is")


def _weight_changes(
    path: Path,
    module: str,
    parts: Mapping[str, str],
    tensors: Mapping[str, TensorInfo],
    scale: Callable[[int], float],
) -> list[Change]:
    kinds = [kind for kind, names in KINDS.items() if set(names) & parts.keys()]
    if not kinds:
        return []
    keys = {part: parts[part] for part in KINDS[kinds[0]] if part in parts}
    if len(kinds) > 1:
        raise _invalid_error(path, f"{module} is changed in two ways, by {' and '.join(kinds)}")
    try:
        shape, rank = _infer_size(kinds[0], {part: tensors[key].shape for part, key in keys.items()})
    except KeyError as error:
        raise _invalid_error(
            path, f"{next(iter(keys.values()))} has no {error.args[0]} to go with it"
        ) from None
    except ValueError as error:
        raise _invalid_error(path, f"{' and '.join(keys.values())} do not multiply: {error}") from None
    if rank and "alpha" in parts:
        keys["alpha"] = parts["alpha"]
    factor = 1.0 if kinds[0] == "full" else scale(rank)
    return [Change(parameter_name(module, bias=False), kinds[0], keys, shape, rank, factor)]


def _bias_changes(
    module: str, parts: Mapping[str, str], tensors: Mapping[str, TensorInfo], scale: Callable[[int], float]
) -> list[Change]:
    """Return a plain difference, or the bias of `up` in PEFT, which is scaled like `up @ down`."""
    changes = []
    name = parameter_name(module, bias=True)
    if key := parts.get("diff_b"):
        changes.append(Change(name, "full", {"diff_b": key}, tensors[key].shape))
    if (key := parts.get("up_bias")) and "down" in parts:
        rank = tensors[parts["down"]].shape[0]
        alpha = {"alpha": parts["alpha"]} if "alpha" in parts else {}
        changes.append(Change(name, "full", {"up_bias": key, **alpha}, tensors[key].shape, rank, scale(rank)))
    return changes


def _infer_size(kind: Kind, shapes: Mapping[str, Shape]) -> tuple[Shape, int]:
    """Return shape and rank of the product. Raises KeyError for a missing factor, ValueError for factors that
    do not fit.
    """
    match kind:
        case "full":
            return shapes["diff"], 0
        case "low-rank":
            return _infer_product(shapes["up"], shapes["down"])
        case "loha":
            one, rank = _infer_product(shapes["hada_w1_a"], shapes["hada_w1_b"])
            two, _ = _infer_product(shapes["hada_w2_a"], shapes["hada_w2_b"])
            if one != two:
                raise ValueError(f"{list(one)} element by element {list(two)}")
            return one, rank
        case "lokr":
            (rows1, columns1), rank1 = _infer_factor(shapes, "lokr_w1")
            (rows2, columns2), rank2 = _infer_factor(shapes, "lokr_w2")
            return (rows1 * rows2, columns1 * columns2), rank2 or rank1


def _infer_factor(shapes: Mapping[str, Shape], name: str) -> tuple[Shape, int]:
    """Return shape and rank of one of LoKr's factors, which is whole (rank 0) or a product."""
    if name in shapes:
        if shapes.keys() & {f"{name}_a", f"{name}_b"}:
            raise ValueError(f"{name} appears both whole and as a product")
        return _matrix_shape(shapes[name]), 0
    return _infer_product(shapes[f"{name}_a"], shapes[f"{name}_b"])


def _infer_product(a: Shape, b: Shape) -> tuple[Shape, int]:
    (rows, inner), (rank, columns) = _matrix_shape(a), _matrix_shape(b)
    if inner != rank or rank == 0:
        raise ValueError(f"{list(a)} @ {list(b)}")
    return (rows, columns), rank


def _matrix_shape(shape: Shape) -> Shape:
    if len(shape) < 2:
        raise ValueError(f"{list(shape)} is not a matrix")
    return shape[0], math.prod(shape[1:])


def _refuse_leftover(path: Path, unknown: Sequence[str], stems: AbstractSet[str]) -> None:
    """Raise CheckpointError for a key beside a layer that the file changes: it says what the change means."""
    for key in unknown:
        parts = key.split(".")
        if parts[-1] == MARKER or any(".".join(parts[:end]) in stems for end in range(1, len(parts))):
            last = key.removesuffix(".weight").rpartition(".")[2]
            scaled = last in QUANTIZERS or "scale" in last
            raise CheckpointError(
                f"{key} says what the matrices beside it mean, and wancli does not know how",
                where=str(path),
                hint=QUANTIZED_HINT if scaled else APPLIED_HINT,
            )


def _whole_weight_error(path: Path, key: str, *, alone: bool) -> CheckpointError:
    """Return the error for a weight that is no change of one; `alone` in a file without any change."""
    if alone:
        return CheckpointError(
            f"holds whole weights, as {key}, and no change of one: this is a model and no LoRA",
            where=str(path),
            hint="Name it in the job's `model`.",
        )
    return CheckpointError(
        f"{key} replaces a weight of the model, and wancli only adds changes to weights",
        where=str(path),
        hint="Save it as its difference from the model's weight, with .diff in place of .weight.",
    )


def _pattern_notes(scaling: Scaling, names: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Say which patterns of a configuration match no module of the file."""
    unmatched = scaling.find_unmatched(names.values())
    quoted = ", ".join(map(repr, unmatched[:MAX_EXAMPLES]))
    what = "its pattern" if len(unmatched) == 1 else f"{len(unmatched)} of its patterns,"
    verb = "matches" if len(unmatched) == 1 else "match"
    return [f"{what} {quoted} {verb} no module, so the scale is that of the others"] if unmatched else []


def _divide(alpha: float, rank: int) -> float:
    """Return alpha / rank; 1 for a LoKr of two whole matrices, where LyCORIS sets alpha to the rank."""
    return alpha / rank if rank else 1.0


def _read_alpha(header: Header, key: str) -> float:
    """Return the number that an alpha tensor holds. Raises CheckpointError if it is none."""
    values = decode_numbers(header.tensors[key].dtype, header.read_bytes(key))
    if values is None:
        raise _invalid_error(
            header.path, f"{key} is stored as {header.tensors[key].dtype}, which no alpha is"
        )
    if not math.isfinite(alpha := float(values[0])):
        raise CheckpointError(
            f"{key} holds NaN or Inf", where=str(header.path), hint="The training of this LoRA went wrong."
        )
    return alpha


def _invalid_error(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        what, where=str(path), hint="Download the file again, or save it with another tool."
    )
