"""Reads which changes a LoRA file makes, from its header alone: no torch, no data.

low-rank   W += scale * up @ down                       LoRA (arXiv 2106.09685); scale = alpha / rank,
                                                        alpha / sqrt(rank) if rank-stabilised (2312.03732)
full       W += diff                                    weights, biases, norms, modulations
loha       W += scale * (w1_a @ w1_b) * (w2_a @ w2_b)   FedPara (2108.06098), element by element
lokr       W += scale * kron(w1, w2)                    LyCORIS (2309.14859); w1, w2 whole or products
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from wancli.errors import CheckpointError
from wancli.weights.formats.safetensors_header import TensorInfo, read_metadata, read_tensors
from wancli.weights.lora.key_mapping import REFUSED, LoraTarget, detect_style, parameter_name, parse_key

Kind: TypeAlias = Literal["full", "low-rank", "loha", "lokr"]
Shape: TypeAlias = tuple[int, ...]
Scale: TypeAlias = Callable[[str, int], float]  # of a module, as the file names it, and a rank

KINDS: dict[Kind, tuple[str, ...]] = {
    "full": ("diff",),
    "low-rank": ("up", "down"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
}
FLOATS = {"F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2"}
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's, beside the file
MAX_EXAMPLES = 3  # unknown keys named as examples
METADATA_KEY = "lora_adapter_metadata"  # diffusers', in the file


@dataclass(frozen=True)
class Change:
    """The change of one parameter. The matrix of a convolution is [out, everything else].

    `scale` applies unless `keys` names an alpha: then the scale is that number / rank.
    """

    name: str  # official
    kind: Kind
    keys: Mapping[str, str]  # part -> key in the file
    shape: Shape  # of the parameter if full, of its matrix if not
    rank: int = 0
    scale: float = 1.0

    @property
    def key(self) -> str:
        """One key of the file, to name the change by."""
        return next(iter(self.keys.values()))


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file as its header describes it."""

    path: Path
    style: str  # whose naming it is
    changes: tuple[Change, ...]
    unknown: tuple[str, ...]  # keys that name nothing of a Wan transformer
    config: Path | None  # the file beside it that its scales come from
    scaled: bool  # whether the file or its config says how strong it is


def read_lora_file(path: Path) -> LoraFile:
    """Read every change of a file, in any style of `key_mapping`.

    Raises CheckpointError for a damaged file, an incomplete change, one made twice, and for changes that
    wancli does not apply: DoRA, Tucker decompositions, OFT, GLoRA.
    """
    tensors = read_tensors(path)
    modules: dict[str, dict[str, str]] = {}
    written: dict[str, str] = {}
    targets: dict[str, LoraTarget] = {}
    unknown = []
    for key, info in tensors.items():
        target = parse_key(key)
        if target is None:
            unknown.append(key)
            continue
        _check(path, key, info, target.part)
        parts = modules.setdefault(target.module, {})
        if target.part in parts:
            raise _invalid_error(path, f"{parts[target.part]} and {key} are the same under two names")
        parts[target.part] = key
        targets[key] = target
        written[target.module] = target.written
    declared, config = _read_scaling(path, peft=any(target.style == "PEFT" for target in targets.values()))
    changes = []
    for module, parts in modules.items():
        scale = partial(declared, written[module]) if declared else _unit_scale
        module_changes = [
            *_weight_changes(path, module, parts, tensors, scale),
            *_bias_changes(module, parts, tensors, scale),
        ]
        used = {key for change in module_changes for key in change.keys.values()}
        unknown += [
            key for part, key in parts.items() if key not in used and not (module_changes and part == "alpha")
        ]
        changes += module_changes
    return LoraFile(
        path,
        style=detect_style(targets),
        changes=tuple(changes),
        unknown=tuple(unknown),
        config=config,
        scaled=declared is not None or all("alpha" in change.keys for change in changes if change.rank),
    )


def _check(path: Path, key: str, info: TensorInfo, part: str) -> None:
    if part in REFUSED:
        raise CheckpointError(
            f"{key} belongs to {part}, which wancli does not apply",
            where=str(path),
            hint="It applies LoRA, LoHa, LoKr and plain differences; convert this file to one of them.",
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


def _unit_scale(_: int) -> float:
    return 1.0


def _read_scaling(path: Path, *, peft: bool) -> tuple[Scale | None, Path | None]:
    """Return how PEFT was configured to scale, and the file that says so if it is not this one.

    diffusers writes the configuration into the file, with keys that begin with `transformer.`. PEFT writes it
    into a file beside it, which is read only if the keys are named as PEFT names them.
    """
    config = path.with_name(ADAPTER_CONFIG)
    try:
        if text := read_metadata(path).get(METADATA_KEY):
            return _parse_scaling(json.loads(text)), None
        if peft and config.is_file():
            return _parse_scaling(json.loads(config.read_bytes())), config
    except (ValueError, TypeError, AttributeError, KeyError, OSError, RecursionError) as error:
        where = str(config) if peft and config.is_file() else f"{path}: {METADATA_KEY}"
        raise CheckpointError(f"says no usable lora_alpha and r: {error!r}", where=where) from None
    return None, None


def _parse_scaling(document: Mapping[str, object]) -> Scale:
    settings = {key.removeprefix("transformer."): value for key, value in document.items()}
    default_alpha = _require_positive(
        settings["lora_alpha"] if "lora_alpha" in settings else settings["alpha"]
    )  # LoHa and LoKr say alpha
    r = _require_positive(settings["r"])
    pattern = settings.get("alpha_pattern") or {}
    if not isinstance(pattern, dict):
        raise TypeError("alpha_pattern")
    alphas = {name: _require_positive(alpha) for name, alpha in pattern.items()}
    stabilised = settings.get("use_rslora") is True

    def scale(module: str, rank: int) -> float:
        own = (alpha for name, alpha in alphas.items() if f".{module}".endswith(f".{name}"))
        return next(own, default_alpha) / (math.sqrt(rank or r) if stabilised else rank or r)

    return scale


def _require_positive(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{value!r} is not a positive number")
    return float(value)


def _invalid_error(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        what, where=str(path), hint="Download the file again, or save it with another tool."
    )
