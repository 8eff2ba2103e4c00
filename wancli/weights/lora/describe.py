"""Describes a LoRA file for `inspect`, from its header: style, targets, ranks and alphas. No torch.

Describes also a LoRA that wancli does not apply; then `refusal` says why. `lora.file` knows what it applies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from wancli.errors import CheckpointError
from wancli.weights.formats.numbers import decode_numbers
from wancli.weights.formats.safetensors_header import TensorInfo
from wancli.weights.formats.tensor_index import TensorIndex
from wancli.weights.lora.file import MAX_EXAMPLES, LoraFile, read_lora_file
from wancli.weights.lora.key_mapping import (
    REFUSED,
    LoraTarget,
    block_index,
    detect_style,
    is_change_key,
    is_image_only,
    parse_keys,
)

METHODS = {"down": "LoRA", "hada_w1_a": "LoHa", "lokr_w2": "LoKr", "lokr_w2_a": "LoKr"}
METHODS |= dict.fromkeys(("diff", "diff_b", "diff_m"), "full differences")
METHODS |= {what: what for what in REFUSED}
RANKED = {"down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"}  # parts of shape [rank, ...]


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
    notes: tuple[str, ...] = ()  # what a user should know about its scales


def is_lora(names: Iterable[str]) -> bool:
    """Return whether the tensors are changes of layers and not layers."""
    return any(map(is_change_key, names))


def describe_lora(contents: TensorIndex) -> LoraInfo:
    """Describe a LoRA file. If `targets` is 0, it belongs to another family of models."""
    tensors = contents.tensors
    targets = parse_keys(tensors)
    modules = {target.module for target in targets.values()}
    unknown = [name for name in tensors if name not in targets]
    methods = {METHODS[target.part]: None for target in targets.values() if target.part in METHODS}
    lora_file, refusal = _read_applicable(contents)
    declared = lora_file.alphas if lora_file and not lora_file.config else ()
    return LoraInfo(
        style=detect_style(targets),
        methods=tuple(methods),
        targets=len(modules),
        layers=tuple(sorted(Counter(map(_layer_kind, modules)).items())),
        blocks=len({block_index(module) for module in modules} - {None}),
        ranks=tuple(
            sorted({n for name, p in targets.items() if p.part in RANKED for n in tensors[name].shape[:1]})
        ),
        alphas=tuple(sorted({*_read_alphas(contents, targets), *declared})),
        config=lora_file.config.name if lora_file and lora_file.config else "",
        width=_infer_width(tensors, targets),
        image_layers=sum(map(is_image_only, modules)),
        unknown=len(unknown),
        examples=tuple(unknown[:MAX_EXAMPLES]),
        refusal=refusal,
        notes=lora_file.notes if lora_file else (),
    )


def _read_applicable(contents: TensorIndex) -> tuple[LoraFile | None, str]:
    """Return the changes of the file, or the reason why wancli cannot apply it."""
    if contents.container != "safetensors":
        return None, f"a LoRA in a .{contents.container} file; wancli reads .safetensors"
    try:
        return read_lora_file(contents.files[0]), ""
    except CheckpointError as error:
        return None, error.message


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
    """Yield the numbers that the alpha tensors of the file hold."""
    for name, target in targets.items():
        data = contents.read_bytes(name) if target.part == "alpha" else b""
        values = decode_numbers(contents.tensors[name].dtype, data)
        yield from [] if values is None else values[:1]
