"""Describes a LoRA file for `inspect`, from its header: style, targets, ranks and alphas. No torch.

Describes also a LoRA that wancli does not apply; then `refusal` says why. `lora.file` knows what it applies.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from wancli.errors import CheckpointError
from wancli.weights.formats.safetensors_header import TensorInfo
from wancli.weights.formats.tensor_index import TensorIndex
from wancli.weights.lora.file import MAX_EXAMPLES, METADATA_KEY, read_lora_file
from wancli.weights.lora.key_mapping import (
    REFUSED,
    LoraTarget,
    block_index,
    detect_style,
    is_change_key,
    is_image_only,
    parse_key,
)

METHODS = {"down": "LoRA", "hada_w1_a": "LoHa", "lokr_w2": "LoKr", "lokr_w2_a": "LoKr"}
METHODS |= dict.fromkeys(("diff", "diff_b", "diff_m"), "full differences")
METHODS |= {what: what for what in REFUSED}
RANKED = {"down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"}  # parts of shape [rank, ...]
_SCALARS = {"F16": "<e", "F32": "<f", "F64": "<d"}


@dataclass(frozen=True)
class LoraInfo:
    """One LoRA file. `layers` counts the targets of each kind of layer. Without `alphas` and `config` the
    scale is 1.
    """

    style: str
    methods: tuple[str, ...]
    targets: int
    layers: tuple[tuple[str, int], ...]
    blocks: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    config: str  # PEFT's, beside the file, if it gives the scale
    width: int | None  # of the transformer it was made for
    image_layers: int  # targets that only image-to-video models have
    unknown: int  # keys that name nothing of a Wan transformer, as those of a text encoder
    examples: tuple[str, ...]  # some of them
    refusal: str


def is_lora(names: Iterable[str]) -> bool:
    """Return whether the tensors are changes of layers and not layers."""
    return any(map(is_change_key, names))


def describe_lora(contents: TensorIndex) -> LoraInfo:
    """Describe a LoRA file. If `targets` is 0, it belongs to another family of models."""
    tensors = contents.tensors
    targets = {name: target for name in tensors if (target := parse_key(name))}
    modules = {target.module for target in targets.values()}
    unknown = [name for name in tensors if name not in targets]
    methods = {METHODS[target.part]: None for target in targets.values() if target.part in METHODS}
    config, refusal = _check_applicable(contents)
    return LoraInfo(
        style=detect_style(targets),
        methods=tuple(methods),
        targets=len(modules),
        layers=tuple(sorted(Counter(map(_layer_kind, modules)).items())),
        blocks=len({block_index(module) for module in modules} - {None}),
        ranks=tuple(sorted({tensors[n].shape[0] for n, p in targets.items() if p.part in RANKED})),
        alphas=tuple(sorted(set(_read_alphas(contents, targets)))),
        config=config,
        width=_infer_width(tensors, targets),
        image_layers=sum(map(is_image_only, modules)),
        unknown=len(unknown),
        examples=tuple(unknown[:MAX_EXAMPLES]),
        refusal=refusal,
    )


def _check_applicable(contents: TensorIndex) -> tuple[str, str]:
    """Return the name of the file that sets the scale, if there is one, and the reason why wancli cannot
    apply the LoRA, if so.
    """
    if contents.container != "safetensors":
        return "", f"a LoRA in a .{contents.container} file; wancli reads .safetensors"
    try:
        lora_file = read_lora_file(contents.files[0])
    except CheckpointError as error:
        return "", error.message
    return lora_file.config.name if lora_file.config else "", ""


def _layer_kind(module: str) -> str:
    return module.split(".", 2)[2] if module.startswith("blocks.") else module


def _infer_width(tensors: Mapping[str, TensorInfo], targets: Mapping[str, LoraTarget]) -> int | None:
    """Return the input width of a self-attention layer, which is the width of the transformer."""
    for name, target in targets.items():
        shape = tensors[name].shape
        if target.part in ("down", "hada_w1_b") and ".self_attn." in target.module and len(shape) == 2:
            return shape[1]
    return None


def _read_alphas(contents: TensorIndex, targets: Mapping[str, LoraTarget]) -> Iterator[float]:
    """Yield the alphas in the file: scalars, or those in the metadata that PEFT wrote."""
    for name, target in targets.items():
        if target.part == "alpha" and (data := contents.read_bytes(name)):
            yield _decode_scalar(data, contents.tensors[name].dtype)
    try:
        settings = json.loads(contents.metadata.get(METADATA_KEY, "{}"))
    except ValueError:
        return
    for key, value in settings.items() if isinstance(settings, dict) else ():
        if key.rpartition(".")[2] == "lora_alpha" and isinstance(value, int | float):
            yield float(value)


def _decode_scalar(data: bytes, dtype: str) -> float:
    if dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + data[:2])[0])
    form = _SCALARS.get(dtype)
    return float(struct.unpack_from(form, data)[0]) if form and len(data) >= struct.calcsize(form) else 0.0
