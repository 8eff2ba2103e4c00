"""What a LoRA file is, from its header: the style of its names, its targets, ranks and alphas.

Only recognised here, not parsed into weights. Styles are told by the prefix of the names; a name
flattened with underscores is looked up in a table of all layers, never split. Every style is
counted in official layer names, `blocks.7.self_attn.q`.
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from wancli.weights.contents import Contents
from wancli.weights.headers import TensorInfo
from wancli.weights.names import BLOCK_FROM_DIFFUSERS, transformer_from_diffusers

# The end of a name -> what the tensor is to its layer.
_ENDS = {
    "down": r"\.lora_A(?:\.default)?(?:\.weight)?|\.lora_down(?:\.weight)?|[._]lora\.down\.weight"
    r"|\.lora_linear_layer\.down\.weight",
    "up": r"\.lora_B(?:\.default)?(?:\.weight)?|\.lora_up(?:\.weight)?|[._]lora\.up\.weight"
    r"|\.lora_linear_layer\.up\.weight",
    "alpha": r"\.alpha",
    "loha": r"\.hada_w[12]_[ab]|\.hada_t[12]",
    "lokr": r"\.lokr_w[12](?:_[ab])?|\.lokr_t2",
    "dora": r"\.dora_scale|\.lora_magnitude_vector(?:\.default)?(?:\.weight)?",
    "diff": r"\.diff|\.diff_b|\.diff_m",
}
_END = re.compile("(?P<layer>.+?)(?:" + "|".join(f"(?P<{k}>{v})" for k, v in _ENDS.items()) + ")")
# Prefix -> style, the first that fits. Flattened styles write every dot as an underscore.
_STYLES = {
    "lora_unet__": "Wan-Fun",
    "lora_unet_": "kohya / musubi",
    "lora_transformer_": "kohya / musubi",
    "lycoris_": "LyCORIS / ai-toolkit",
    "base_model.model.": "PEFT",
    "pipe.dit.": "DiffSynth",
    "transformer.": "diffusers",
    "diffusion_model.": "ComfyUI",
    "model.diffusion_model.": "ComfyUI",
    "": "bare",
}
_FLATTENED = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_FLAT_BLOCK = re.compile(r"blocks_(\d+)_(.+)")
_LAYERS = (
    *(f"{attn}.{layer}" for attn in ("self_attn", "cross_attn") for layer in (*"qkvo", "norm_q", "norm_k")),
    *("cross_attn.k_img", "cross_attn.v_img", "cross_attn.norm_k_img", "ffn.0", "ffn.2", "norm3"),
)
_IMAGE = {"attn2.add_k_proj": "cross_attn.k_img", "attn2.add_v_proj": "cross_attn.v_img"}
_FLAT_LAYERS = {
    layer.replace(".", "_"): official
    for layer, official in {**{name: name for name in _LAYERS}, **BLOCK_FROM_DIFFUSERS, **_IMAGE}.items()
}
_SCALARS = {"F16": "<e", "F32": "<f", "F64": "<d"}


@dataclass(frozen=True)
class LoRA:
    """One LoRA file. `layers` counts the targets of each kind of layer; no `alphas` means scale 1."""

    style: str
    methods: tuple[str, ...]
    targets: int
    layers: tuple[tuple[str, int], ...]
    blocks: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    width: int | None  # of the transformer it was made for
    image_layers: int  # targets that only image-to-video models have


def is_lora(names: Iterable[str]) -> bool:
    """Whether the tensors are additions to layers rather than layers."""
    return any((match := _END.fullmatch(name)) and not match["alpha"] for name in names)


def lora_of(contents: Contents) -> LoRA:
    """What a LoRA file says of itself. One whose `targets` is 0 belongs to another family of models."""
    tensors = contents.tensors
    ends = {name: match for name in tensors if (match := _END.fullmatch(name))}
    layers = {_layer(match) for match in ends.values()}
    prefix = next(p for p in _STYLES if any(layer.startswith(p) for layer in layers))
    official = {layer: official_layer(layer.removeprefix(prefix), prefix in _FLATTENED) for layer in layers}
    known = {layer: name for layer, name in official.items() if name}
    kinds = [match[2] if (match := _BLOCK.fullmatch(name)) else name for name in known.values()]
    counts = Counter(sorted(kinds))
    roles = {next(role for role in _ENDS if match[role]) for match in ends.values()}
    return LoRA(
        style=_style(prefix, tensors, roles),
        methods=_methods(roles),
        targets=len(known),
        layers=tuple(counts.items()),
        blocks=len({match[1] for name in known.values() if (match := _BLOCK.fullmatch(name))}),
        ranks=tuple(sorted({rank for name, end in ends.items() if (rank := _rank(tensors[name], end))})),
        alphas=tuple(sorted(set(_alphas(contents, ends)))),
        width=_width(tensors, ends, known),
        image_layers=sum(
            count for kind, count in counts.items() if kind.endswith("_img") or "img_emb" in kind
        ),
    )


def official_layer(layer: str, flattened: bool) -> str:
    """The official name of a layer without its style's prefix; empty if Wan has no such layer."""
    if flattened:
        block = _FLAT_BLOCK.fullmatch(layer)
        if block:
            return f"blocks.{block[1]}.{_FLAT_LAYERS[block[2]]}" if block[2] in _FLAT_LAYERS else ""
        layer = (
            re.sub(r"_(\d)", r".\1", layer).replace("head_head", "head.head").replace("img_emb_", "img_emb.")
        )
    if block := _BLOCK.fullmatch(layer):
        inner = _IMAGE.get(block[2]) or transformer_from_diffusers(layer).split(".", 2)[2]
        return f"blocks.{block[1]}.{inner}" if inner in _LAYERS or inner == "modulation" else ""
    outer = transformer_from_diffusers(layer)
    heads = ("patch_embedding", "text_embedding.", "time_embedding.", "time_projection.", "head", "img_emb.")
    return outer if outer.startswith(heads) else ""


def _layer(end: re.Match[str]) -> str:
    """What a tensor is added to; LightX2V writes the difference of a modulation as BLOCK.diff_m."""
    return end["layer"] + (".modulation" if end["diff"] == ".diff_m" else "")


def _style(prefix: str, tensors: Iterable[str], roles: set[str]) -> str:
    style = _STYLES[prefix]
    if style == "ComfyUI" and "diff" in roles and "down" in roles:
        return "LightX2V, extracted"
    if style == "ComfyUI" and any(".lora_down." in name for name in tensors):
        return "LightX2V"
    return style


def _methods(roles: set[str]) -> tuple[str, ...]:
    names = {"down": "LoRA", "loha": "LoHa", "lokr": "LoKr", "dora": "DoRA", "diff": "full differences"}
    return tuple(name for role, name in names.items() if role in roles)


def _rank(info: TensorInfo, end: re.Match[str]) -> int:
    if end["down"] and info.shape:
        return info.shape[0]
    if end["loha"] and end["loha"].endswith("w1_b") and info.shape:
        return info.shape[0]
    if end["lokr"] and end["lokr"].endswith("_b") and info.shape:
        return info.shape[0]
    return 0


def _width(
    tensors: Mapping[str, TensorInfo], ends: Mapping[str, re.Match[str]], known: Mapping[str, str]
) -> int | None:
    """The input width of a self-attention layer, which is the transformer's."""
    for name, end in ends.items():
        inner = known.get(_layer(end), "")
        is_down = end["down"] or (end["loha"] or "").endswith("w1_b")
        if is_down and ".self_attn." in inner and len(tensors[name].shape) == 2:
            return tensors[name].shape[1]
    return None


def _alphas(contents: Contents, ends: Mapping[str, re.Match[str]]) -> Iterable[float]:
    """The alphas in the file: scalars, or what PEFT wrote into the metadata."""
    for name, end in ends.items():
        if end["alpha"] and (data := contents.data(name)):
            yield _scalar(data, contents.tensors[name].dtype)
    try:
        said = json.loads(contents.metadata.get("lora_adapter_metadata", "{}"))
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
