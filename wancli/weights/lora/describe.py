"""What `inspect` tells of a LoRA file, from its header: style, targets, ranks and alphas. No torch.

Also of one that wancli does not apply; then `refusal` is why. What it applies, `lora_header` says.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from wancli.errors import CheckpointError
from wancli.weights.formats.safetensors_header import TensorInfo
from wancli.weights.formats.tensor_index import Contents
from wancli.weights.lora.file import METADATA, recognise
from wancli.weights.lora.key_mapping import REFUSED, Place, adds, block_of, of_images, place, style_of

METHODS = {"down": "LoRA", "hada_w1_a": "LoHa", "lokr_w2": "LoKr", "lokr_w2_a": "LoKr"}
METHODS |= dict.fromkeys(("diff", "diff_b", "diff_m"), "full differences")
METHODS |= {what: what for what in REFUSED}
RANKED = {"down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"}  # parts of shape [rank, ...]
LISTED = 3  # keys quoted
_SCALARS = {"F16": "<e", "F32": "<f", "F64": "<d"}


@dataclass(frozen=True)
class LoRA:
    """One LoRA file. `layers` counts the targets of each kind of layer; no `alphas` and no `config` means
    scale 1."""

    style: str
    methods: tuple[str, ...]
    targets: int
    layers: tuple[tuple[str, int], ...]
    blocks: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    config: str  # PEFT's, beside the file, where the scale comes from it
    width: int | None  # of the transformer it was made for
    image_layers: int  # targets that only image-to-video models have
    unknown: int  # keys that name nothing of a Wan transformer, as those of a text encoder
    examples: tuple[str, ...]  # some of them
    refusal: str


def is_lora(names: Iterable[str]) -> bool:
    """Whether the tensors are additions to layers rather than layers."""
    return any(map(adds, names))


def lora_of(contents: Contents) -> LoRA:
    """What a LoRA file says of itself. One whose `targets` is 0 belongs to another family of models."""
    tensors = contents.tensors
    places = {name: found for name in tensors if (found := place(name))}
    modules = {found.module for found in places.values()}
    unknown = [name for name in tensors if name not in places]
    methods = {METHODS[found.part]: None for found in places.values() if found.part in METHODS}
    config, refusal = _applied(contents)
    return LoRA(
        style=style_of(places),
        methods=tuple(methods),
        targets=len(modules),
        layers=tuple(sorted(Counter(map(_kind, modules)).items())),
        blocks=len({block_of(module) for module in modules} - {None}),
        ranks=tuple(sorted({tensors[n].shape[0] for n, p in places.items() if p.part in RANKED})),
        alphas=tuple(sorted(set(_alphas(contents, places)))),
        config=config,
        width=_width(tensors, places),
        image_layers=sum(map(of_images, modules)),
        unknown=len(unknown),
        examples=tuple(unknown[:LISTED]),
        refusal=refusal,
    )


def _applied(contents: Contents) -> tuple[str, str]:
    """The file that gives the scale, if one beside it does, and why wancli cannot apply the LoRA, if so."""
    if contents.container != "safetensors":
        return "", f"a LoRA in a .{contents.container} file; wancli reads .safetensors"
    try:
        found = recognise(contents.files[0])
    except CheckpointError as error:
        return "", error.message
    return found.config.name if found.config else "", ""


def _kind(module: str) -> str:
    return module.split(".", 2)[2] if module.startswith("blocks.") else module


def _width(tensors: Mapping[str, TensorInfo], places: Mapping[str, Place]) -> int | None:
    """The input width of a self-attention layer, which is the transformer's."""
    for name, found in places.items():
        shape = tensors[name].shape
        if found.part in ("down", "hada_w1_b") and ".self_attn." in found.module and len(shape) == 2:
            return shape[1]
    return None


def _alphas(contents: Contents, places: Mapping[str, Place]) -> Iterator[float]:
    """The alphas in the file: scalars, or what PEFT wrote into the metadata."""
    for name, found in places.items():
        if found.part == "alpha" and (data := contents.data(name)):
            yield _scalar(data, contents.tensors[name].dtype)
    try:
        said = json.loads(contents.metadata.get(METADATA, "{}"))
    except ValueError:
        return
    for key, value in said.items() if isinstance(said, dict) else ():
        if key.rpartition(".")[2] == "lora_alpha" and isinstance(value, int | float):
            yield float(value)


def _scalar(data: bytes, dtype: str) -> float:
    if dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + data[:2])[0])
    form = _SCALARS.get(dtype)
    return float(struct.unpack_from(form, data)[0]) if form and len(data) >= struct.calcsize(form) else 0.0
