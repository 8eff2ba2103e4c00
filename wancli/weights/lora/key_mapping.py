"""Map the keys of a LoRA file: prefix + module + part. No torch.

Every tool names the same matrix its own way:

    diffusion_model.blocks.0.self_attn.q.lora_A.weight         ComfyUI, ai-toolkit, LightX2V
    transformer.blocks.0.attn1.to_q.lora_A.weight              diffusers
    base_model.model.blocks.0.self_attn.q.lora_A.weight        PEFT
    pipe.dit.blocks.0.self_attn.q.lora_A.default.weight        DiffSynth
    lora_unet_blocks_0_self_attn_q.lora_down.weight            kohya, musubi-tuner
    lora_unet__blocks_0_self_attn_q.lora_down.weight           Wan-Fun
    lycoris_blocks_0_attn1_to_q.hada_w1_a                      LyCORIS

The prefix may be any other, too, as in a checkpoint; those that kohya flattens are listed. The wrappers of
torch, as `_orig_mod`, are no part of a name.

An underscore separates words and is part of them (`cross_attn_k_img`), so no name is ever split at
one: a module is looked up, its dots turned into underscores, among all modules of the transformer
in official and in diffusers naming.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from wancli.weights.formats.key_mapping import (
    BLOCK_FROM_DIFFUSERS,
    IMAGE_BLOCK_FROM_DIFFUSERS,
    IMAGE_FROM_DIFFUSERS,
    TRANSFORMER_FROM_DIFFUSERS,
    WRAPPERS,
)
from wancli.weights.formats.quant_schemes import HELPERS
from wancli.weights.formats.tensor_index import OTHER_NETWORKS
from wancli.weights.lora.change import FUSED_FROM_DIFFUSERS

COMFY = "ComfyUI"
# Stripped one after another, the first that fits each time; the first one names the style.
PREFIXES = {
    "base_model.model.": "PEFT",
    "model.diffusion_model.": COMFY,
    "diffusion_model.": COMFY,
    "transformer.": "diffusers",
    "pipe.dit.": "DiffSynth",
    "lora_unet__": "Wan-Fun",
    "lora_unet_": "kohya / musubi",
    "lora_transformer_": "kohya / musubi",
    "lycoris_": "LyCORIS / ai-toolkit",
    # What kohya's and LyCORIS' names have of the prefix of a checkpoint.
    "model_diffusion_model_": COMFY,
    "diffusion_model_": COMFY,
    "pipe_dit_": "DiffSynth",
}
BARE = "bare"
_WRAPPER = re.compile(rf"(?:^|(?<=[._]))(?:{'|'.join(WRAPPERS)})[._]")
# Before the blocks of networks that are no transformer of Wan.
_FOREIGN = (*OTHER_NETWORKS, "text_encoder", "te_", "lora_te", "controlnet", "vace", "lora_vace")
_BEHIND_ANY_PREFIX = re.compile(r"(?P<prefix>(?:[\w-]+\.)*?|lora_[a-z0-9]+_)(?P<module>blocks[._]\d.*)")

# PEFT's name of an adapter, which no scale or marker of a quantized matrix is taken for.
_ADAPTER = rf"(?!(?:weight|bias|{'|'.join(sorted(HELPERS))})$)\w+"
# Part of a change -> how keys that hold it end.
PARTS = {
    "down": r"\.lora_down\.weight|[._]lora\.down\.weight|\.lora_linear_layer\.down\.weight"
    rf"|\.lora_A(?:\.{_ADAPTER})?(?:\.weight)?",
    "up": r"\.lora_up\.weight|[._]lora\.up\.weight|\.lora_linear_layer\.up\.weight"
    rf"|\.lora_B(?:\.{_ADAPTER})?(?:\.weight)?",
    "up_bias": r"\.lora_B(?:\.(?!bias$)\w+)?\.bias",
    "alpha": r"\.alpha",
    "diff": r"\.diff|\.w_norm",
    "diff_b": r"\.diff_b|\.b_norm",
    "diff_m": r"\.diff_m",
    **{f"hada_{part}": rf"\.hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b")},
    **{f"lokr_{part}": rf"\.lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
}
# What wancli does not apply -> how its keys end. Tools disagree on DoRA: ComfyUI takes the norms of
# the rows from W, its trainers from W + BA.
REFUSED = {
    "DoRA": r"\.dora_scale|\.(?:lora_|dora_)?magnitude(?:_vector)?(?:\.\w+)*",
    "a Tucker decomposition": r"\.lora_mid\.weight|\.hada_t[12]|\.lokr_t[12]",
    "OFT": r"\.oft_\w+(?:\.weight)?",
    "GLoRA": r"\.[ab][12]\.weight",
    "a LoRA that changes the model's shape": r"\.reshape_weight|\.set_weight",
}

# Every end begins so. Most keys of a checkpoint end otherwise, which one look at these places tells.
_MODULE = r"(?P<module>.+?)(?=[._])"
_KEY = re.compile(_MODULE + "(?:" + "|".join(f"(?P<{part}>{end})" for part, end in PARTS.items()) + ")")
_REFUSED = {what: re.compile(f"{_MODULE}(?:{end})") for what, end in REFUSED.items()}
_ANY = re.compile(_MODULE + "(?:" + "|".join([*PARTS.values(), *REFUSED.values()]) + ")")
# What PEFT has inside a module that it replaces, or that it changes.
_WHOLE = re.compile(r"\.(?:modules_to_save|original_module|base_layer)(?:\.\w+)??(?=\.(?:weight|bias)$)")
_BLOCK = re.compile(r"blocks_(\d{1,4})_(.+)")


@dataclass(frozen=True)
class LoraTarget:
    """The target of a key: its module under the official name, and the part of a change that the key
    holds.
    """

    style: str
    module: str
    part: str  # one of PARTS, or of REFUSED
    written: str  # the module as the file names it, without the prefix
    stem: str  # the module as the file names it, with the prefix; what keys beside it begin with

    @property
    def names(self) -> tuple[str, ...]:
        """All names by which PEFT's patterns may mean the module."""
        return self.written, self.stem.removeprefix("base_model.model."), self.module


def parse_keys(keys: Iterable[str]) -> dict[str, LoraTarget]:
    """Return the target of each key that names a part of a Wan transformer.

    Layers outside the blocks may have the prefixes that the blocks of the same file have.
    """
    keys = tuple(keys)
    targets = {key: target for key in keys if (target := parse_key(key))}
    prefixes = {
        target.stem.removesuffix(target.written)
        for target in targets.values()
        if target.module.startswith("blocks.")
    }
    for key in keys:
        prefix = next((p for p in prefixes if p and key.startswith(p)), None)
        if key not in targets and prefix and (target := parse_key(key.removeprefix(prefix))):
            targets[key] = replace(target, stem=prefix + target.stem)
    return {key: targets[key] for key in keys if key in targets}


def parse_key(key: str) -> LoraTarget | None:
    """Return the target of a key; None if it names nothing of a Wan transformer."""
    module, part = _split_key(key)
    return _resolve_target(module, part) if part else None


def is_whole_weight(key: str) -> bool:
    """Return whether a tensor of this name replaces a parameter of a Wan transformer, as PEFT saves
    `modules_to_save`.
    """
    if _split_key(key)[1]:
        return False
    stem, _, last = _WHOLE.sub("", key).rpartition(".")
    if last not in ("weight", "bias"):
        stem = key
    target = _resolve_target(stem, "")
    return target is not None and (stem != key or parameter_name(target.module, bias=False) == target.module)


def is_change_key(key: str) -> bool:
    """Return whether a tensor of this name is added to a layer of some model and is not a layer itself."""
    return _split_key(key)[1] not in ("", "alpha")


def detect_style(targets: Mapping[str, LoraTarget]) -> str:
    """Return the naming that most keys of a file have."""
    styles = [target.style for target in targets.values()]
    style = max(dict.fromkeys(styles), key=styles.count, default="unknown")
    parts = {target.part for target in targets.values()}
    if style == COMFY and parts & {"diff", "diff_b"} and "down" in parts:
        return "LightX2V, extracted"
    return "LightX2V" if style == COMFY and any(".lora_down." in key for key in targets) else style


def official_module(module: str) -> str | None:
    """Return the official name of a module in either naming, with dots or underscores; None if there is none.

    `blocks.3` and `head` alone, which hold a modulation, are not modules here.
    """
    flat = _flatten(module)
    if block := _BLOCK.fullmatch(flat):
        name = _BLOCK_MODULES.get(block[2])
        return name and f"blocks.{int(block[1])}.{name}"
    return _MODULES.get(flat)


def parameter_name(module: str, *, bias: bool) -> str:
    """Return the parameter that a change of a module's weight, or of its bias, applies to."""
    if module.endswith(("modulation", "emb_pos")):
        return module
    return f"{module}.bias" if bias else f"{module}.weight"


def module_name(parameter: str) -> str:
    """Return the module of an official parameter; a modulation is its own."""
    return parameter.removesuffix(".weight").removesuffix(".bias")


def block_index(parameter: str) -> int | None:
    """Return the block of an official parameter; None outside the blocks."""
    return int(parameter.split(".")[1]) if parameter.startswith("blocks.") else None


def is_image_only(parameter: str) -> bool:
    """Return whether only image-to-video models have this parameter."""
    modules = (*IMAGE_BLOCK_FROM_DIFFUSERS.values(), *IMAGE_FROM_DIFFUSERS.values())
    return any(f".{module}." in f".{parameter}." for module in modules)


def _split_key(key: str) -> tuple[str, str]:
    """Split a key into the module as it is written, and the part; both are empty if it is not part of a
    change.
    """
    if not _ANY.fullmatch(key):
        return "", ""
    for what, pattern in _REFUSED.items():
        if match := pattern.fullmatch(key):
            return match["module"], what
    match = _KEY.fullmatch(key)
    return (match["module"], next(part for part in PARTS if match[part])) if match else ("", "")


def _resolve_target(stem: str, part: str) -> LoraTarget | None:
    style = None
    written = _WRAPPER.sub("", stem)
    while prefix := next((prefix for prefix in PREFIXES if written.startswith(prefix)), None):
        style = style or PREFIXES[prefix]
        written = written.removeprefix(prefix)
    # Nothing lies beside a modulation but the whole block.
    part, suffix = ("diff", ".modulation") if part == "diff_m" else (part, "")
    module = official_module(written + suffix)
    behind = _BEHIND_ANY_PREFIX.fullmatch(written)
    if module is None and behind and not behind["prefix"].startswith(_FOREIGN):
        written = behind["module"]
        module = official_module(written + suffix)
    if module is None:
        return None
    return LoraTarget(style or BARE, module, part, written + suffix, stem + suffix)


def _flatten(name: str) -> str:
    return name.replace(".", "_")


def _both_namings(*tables: dict[str, str]) -> dict[str, str]:
    """Map the flattened names of both namings to the official name."""
    pairs = [pair for table in tables for pair in table.items()]
    return {_flatten(name): ours for theirs, ours in pairs for name in (theirs, ours)}


_BLOCK_MODULES = _both_namings(BLOCK_FROM_DIFFUSERS, IMAGE_BLOCK_FROM_DIFFUSERS, FUSED_FROM_DIFFUSERS)
_MODULES = _both_namings(
    TRANSFORMER_FROM_DIFFUSERS, IMAGE_FROM_DIFFUSERS, {"patch_embedding": "patch_embedding"}
)
