"""Recognizes what a weight file holds: kind, family, variant, naming, prefix, precision, scheme.

Uses the tensors alone: a kind is identified by two names that only it has, after any prefix. Only the expert
of Wan 2.2 A14B is taken from the file name, because the shapes of both experts are the same. A network that
wancli knows and cannot render becomes a Component with a refusal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from wancli.errors import CheckpointError
from wancli.models.config import TIED_EMBEDDING, Expert, T5Config, VAE22Config
from wancli.models.variants import (
    BY_CHANNELS,
    FLF2V,
    FUN_INP_1_3B,
    I2V_21,
    I2V_22,
    MINI,
    MINI_DIM,
    NAMES_BY_WIDTH,
    RELEASED,
    T2V,
    T2V_14B,
    T2V_A14B,
    TWO_EXPERTS,
    Variant,
)
from wancli.weights.component import (
    Component,
    Kind,
    Naming,
    classify_tensor,
    expert_from_name,
    find_missing,
    get_renaming,
    tensor_groups,
)
from wancli.weights.formats.infer_config import (
    IMAGE_CHANNELS,
    RENDERS,
    SUPPORTED_HINT,
    USUAL_HEAD_DIM,
    find_mismatches,
    infer_clip_config,
    infer_t5_config,
    infer_transformer_config,
    infer_transformer_sizes,
    infer_vae_config,
    name_unsupported_transformer,
    t5_shapes,
    transformer_shapes,
)
from wancli.weights.formats.key_mapping import POSITION_IDS, choose_vae_renaming
from wancli.weights.formats.quant_schemes import count_precision, detect_scheme, is_helper
from wancli.weights.formats.safetensors_header import TensorInfo
from wancli.weights.formats.tensor_index import OTHER_NETWORKS, TensorIndex
from wancli.weights.lora.describe import describe_lora, is_lora

# Beginnings of two names that one network has, after the same prefix.
SIGNATURES: tuple[tuple[Kind, Naming, str, str], ...] = (
    ("transformer", "official", "blocks.0.self_attn.q.", "patch_embedding."),
    ("transformer", "diffusers", "blocks.0.attn1.to_q.", "patch_embedding."),
    ("text encoder", "official", "blocks.0.attn.q.", "token_embedding."),
    ("text encoder", "transformers", "encoder.block.0.layer.0.SelfAttention.q.", "shared."),
    ("text encoder", "gguf", "enc.blk.0.attn_q.", "token_embd."),
    ("image encoder", "official", "transformer.0.attn.to_qkv.", "patch_embedding."),
    ("image encoder", "transformers", "encoder.layers.0.self_attn.q_proj.", "embeddings.patch_embedding."),
    ("vae", "official", "decoder.middle.0.residual.0.gamma", "encoder.conv1."),
    ("vae", "diffusers", "decoder.mid_block.resnets.0.norm1.gamma", "encoder.conv_in."),
)
# Beginnings of names that only this network has, by which a part of it is known.
EVIDENCE: dict[tuple[Kind, Naming], tuple[str, ...]] = {
    ("transformer", "official"): ("time_projection.1.", "blocks.0.cross_attn.norm_k."),
    ("transformer", "diffusers"): ("condition_embedder.time_proj.", "blocks.0.attn2.norm_k."),
    ("text encoder", "official"): ("blocks.0.attn.q.",),
    ("text encoder", "transformers"): ("encoder.block.0.layer.0.SelfAttention.q.",),
    ("text encoder", "gguf"): ("enc.blk.0.attn_q.",),
    ("image encoder", "official"): ("transformer.0.attn.to_qkv.",),
    ("image encoder", "transformers"): ("vision_model.embeddings.patch_embedding.",),
    ("vae", "official"): ("decoder.middle.0.residual.0.gamma", "encoder.middle.0.residual.0.gamma"),
    ("vae", "diffusers"): (
        "decoder.mid_block.resnets.0.norm1.gamma",
        "encoder.mid_block.resnets.0.norm1.gamma",
    ),
}
WHOLE_FILE_HINT = "use the file that holds the whole network, or download it again"
# Files that are often beside Wan checkpoints: a tensor name in them, and what they are.
OTHER_FILES = {
    r"vace_patch_embedding\.weight": "VACE module, an addition to a T2V transformer",
    r"audio_proj\.proj1\.weight": "audio module (MultiTalk, InfiniteTalk)",
    r"(visual|vision_model|clip\.visual)\..*": "CLIP image encoder, a part of one or of another kind",
    r"decoder\.1\.weight": "TAE, a tiny autoencoder for previews",
}
LIGHT_VAE = (96, 16)  # decoder.conv1: 96 wide; the Wan 2.1 VAE has 384
XXL = T5Config(256384, 4096, 64, 10240, 24, 64)
PLAIN_T5_VOCAB = 32128
WIDTH_1_3B = 1536
LORA_HINT = "convert it to a LoRA, LoHa, LoKr or plain differences in .safetensors"
Tensors = dict[str, TensorInfo]


def recognize(
    contents: TensorIndex, config_json: Mapping[str, object] | None = None
) -> tuple[Component, ...]:
    """Return the networks in a file or in its shards: several in a whole checkpoint, none in an unknown file.

    `config_json` is that of the transformer, in official names. Raises CheckpointError if the tensors do not
    tell the sizes or config.json disagrees with them.
    """
    if is_lora(contents.tensors):
        return (_recognize_lora(contents),)
    networks = tuple(
        _recognize_network(contents, kind, naming, prefix, config_json or {})
        for kind, naming, first, second in SIGNATURES
        for prefix in _prefixes(contents.tensors, first, second)
    )
    if networks:
        return networks
    for pattern, what in OTHER_FILES.items():
        if any(re.fullmatch(pattern, name) for name in contents.tensors):
            return (_unsupported_component(contents, what),)
    if architecture := contents.metadata.get("general.architecture"):
        return (_unsupported_component(contents, f"GGUF file of the architecture {architecture!r}, not wan"),)
    return _recognize_parts(contents)


def _recognize_parts(contents: TensorIndex) -> tuple[Component, ...]:
    """Return the networks of which a file holds a part only, each with what it lacks as its refusal."""
    tensors = contents.tensors
    for kind, naming, *signature in SIGNATURES:
        starts = (_starts(tensors, name) for name in EVIDENCE[kind, naming])
        prefix = min(set().union(*starts), default=None)
        if prefix is None:
            continue
        absent = next(s for s in signature if not any(name.startswith(prefix + s) for name in tensors))
        names = {"text encoder": "UMT5 encoder", "image encoder": "CLIP image encoder", "vae": "Wan VAE"}
        name = names.get(kind, "Wan transformer")
        refusal = f"a part of a {name}: {_find_gap(tensors, prefix, absent)} is missing"
        part = _unsupported_component(contents, name)
        return (replace(part, kind=kind, naming=naming, refusal=refusal, hint=WHOLE_FILE_HINT),)
    return ()


def _find_gap(tensors: Mapping[str, object], prefix: str, absent: str) -> str:
    """Return the shortest beginning of a name that no tensor has, as a pattern: `blocks.0.*`."""
    words = absent.rstrip(".").split(".")
    for end in range(1, len(words) + 1):
        if end < len(words) and words[end].isdecimal():
            continue
        head = ".".join(words[:end]) + "."
        if not any(name.startswith(prefix + head) for name in tensors):
            return f"{head}*" if not absent.endswith(head.rstrip(".")) else absent
    return absent


def _prefixes(tensors: Mapping[str, object], first: str, second: str) -> list[str]:
    """Return the prefixes before both names: nothing, or whole components."""
    starts = _starts(tensors, first)
    return sorted(p for p in starts if any(name.startswith(p + second) for name in tensors))


def _starts(tensors: Mapping[str, object], part: str) -> set[str]:
    """Return what stands before a part of a name: nothing, or whole components."""
    return {
        name[: name.index(part)]
        for name in tensors
        if part in name and (name.startswith(part) or name[name.index(part) - 1] == ".")
    }


def _recognize_network(
    contents: TensorIndex, kind: Kind, naming: Naming, prefix: str, config_json: Mapping[str, object]
) -> Component:
    tensors = {
        name.removeprefix(prefix): info
        for name, info in contents.tensors.items()
        if name.startswith(prefix) and (prefix or not name.startswith(OTHER_NETWORKS))
    }
    tensors.pop(POSITION_IDS, None)
    own_name = choose_vae_renaming(tensors) if kind == "vae" else get_renaming(kind, naming)
    own = {name: own_name(name) for name in tensors}
    weights = {own[name]: info for name, info in tensors.items() if not is_helper(name)}
    classes = {name: classify_tensor(kind, own[name]) for name in tensors}
    part = Component(
        kind,
        name=kind,
        files=contents.files,
        container=contents.container,
        naming=naming,
        prefix=prefix,
        scheme=detect_scheme(tensors, contents, prefix),
        precision=count_precision(tensors, classes, tensor_groups(kind)),
        parameters=sum(math.prod(info.shape) for name, info in weights.items() if name != TIED_EMBEDDING),
        tensors=len(tensors),
        missing=find_missing(weights),
        compiled=contents.compiled,
        tokenizer_file=contents.find_tokenizer() if kind == "text encoder" else None,
    )
    if part.scheme.refusal:
        part = replace(
            part,
            refusal=f"its weights are quantized as {part.scheme.refusal}, which wancli does not load",
            hint="use the fp16, bf16, fp8 or GGUF version of this file",
        )
    if kind == "transformer":
        return _recognize_transformer(part, weights, config_json)
    shapes = {name: info.shape for name, info in weights.items()}
    if kind == "image encoder":
        return _recognize_image_encoder(part, shapes)
    return _recognize_text_encoder(part, shapes) if kind == "text encoder" else _recognize_vae(part, shapes)


def _recognize_transformer(part: Component, weights: Tensors, config_json: Mapping[str, object]) -> Component:
    where = str(part.files[0])
    shapes = _split_patch_axes({name: info.shape for name, info in weights.items()})
    try:
        read = infer_transformer_sizes(shapes, where)
    except CheckpointError:
        if part.refusal:  # the shapes of packed weights are not those of the network
            return replace(part, name="Wan transformer")
        raise
    if what := name_unsupported_transformer(weights, read["in_dim"], read["out_dim"]):
        part = replace(part, refusal=f"this is a {what} checkpoint; {RENDERS}", hint=SUPPORTED_HINT)
    expert = expert_from_name(part.files[0])
    variant, reason = (None, "") if what else choose_variant(read, expert, part.files[0])
    name = variant.name if variant else what.rstrip(",")
    sizes = tuple(read.items())
    part = replace(part, name=name, variant=variant, variant_reason=reason, expert=expert, sizes=sizes)
    if part.refusal:
        return part
    if not {"num_heads", "attention_head_dim"} & config_json.keys() and read["dim"] % USUAL_HEAD_DIM:
        message = (
            f"the number of heads is unknown: the width {read['dim']} is not a multiple of {USUAL_HEAD_DIM}"
        )
        hint = "name the folder if its config.json says num_heads, or say `heads` in the job's `model`"
        return replace(part, refusal=message, hint=hint)
    config = infer_transformer_config(read, config_json, where)
    sizes = (*read.items(), ("num_heads", config.num_heads))
    return replace(
        part, config=config, sizes=sizes, mismatches=find_mismatches(transformer_shapes(config), shapes)
    )


def choose_variant(sizes: Mapping[str, int], expert: Expert | None, path: Path) -> tuple[Variant, str]:
    """Return the variant of a transformer, and what told it from others whose tensors have the same shapes.

    If its name says which expert it is, it is one of two.
    """
    if sizes["in_dim"] == IMAGE_CHANNELS:
        return choose_by_name(variants_with_pictures(sizes), path)
    if sizes["dim"] == MINI_DIM:
        return MINI, ""
    key = (sizes["dim"], sizes["ffn_dim"], sizes["num_layers"], sizes["in_dim"])
    variant = RELEASED.get(key, BY_CHANNELS[sizes["in_dim"]])
    if expert is None:
        return variant, ""
    if variant is T2V_14B:
        return T2V_A14B, ""
    return (TWO_EXPERTS if variant is T2V else variant), ""


def variants_with_pictures(sizes: Mapping[str, int]) -> tuple[Variant, ...]:
    """Return the variants that a transformer of 36 channels may be, the default one first."""
    found: tuple[Variant, ...]
    if "image_dim" not in sizes:
        found = I2V_22
    elif "image_rows" in sizes:
        found = (FLF2V,)
    else:
        found = (FUN_INP_1_3B,) if sizes["dim"] == WIDTH_1_3B else I2V_21
    if sizes["dim"] in NAMES_BY_WIDTH:
        return found
    return tuple(replace(variant, name=re.sub("-A?14B", "", variant.name)) for variant in found)


def choose_by_name(candidates: Sequence[Variant], path: Path) -> tuple[Variant, str]:
    """Return the variant that the name of a file, or of one of the three folders around it, says; else the
    first one. Also returns the reason; it is empty if there is one candidate.
    """
    if len(candidates) == 1:
        return candidates[0], ""
    for name in [place.name for place in (path, *list(path.absolute().parents)[:3])]:
        for variant in sorted(candidates, key=lambda variant: -len(variant.named)):
            if variant.named and re.search(variant.named, name, re.IGNORECASE):
                return variant, f"the name {name!r} says so"
    others = " or ".join(variant.name for variant in candidates[1:])
    return candidates[0], f"by default: its tensors may be those of {others}, and no name says so"


def _split_patch_axes(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Split the first of four axes of stable-diffusion.cpp's patch embedding into the two that it merged."""
    patch, bias = shapes.get("patch_embedding.weight", ()), shapes.get("patch_embedding.bias", ())
    if len(patch) == 4 and len(bias) == 1 and bias[0] and patch[0] % bias[0] == 0:
        shapes["patch_embedding.weight"] = (bias[0], patch[0] // bias[0], *patch[1:])
    return shapes


def _recognize_text_encoder(part: Component, shapes: dict[str, tuple[int, ...]]) -> Component:
    bias = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    if shapes.get("shared.weight", ())[:1] == (PLAIN_T5_VOCAB,) or (
        bias not in shapes and any(name.startswith("encoder.block.1.") for name in shapes)
    ):
        return replace(
            part,
            name="T5 v1.1",
            refusal="this is a plain T5 encoder, as Flux and SD3 read; Wan reads UMT5",
            hint="use models_t5_umt5-xxl-enc-bf16.pth or a umt5_xxl file",
        )
    if part.refusal:
        return replace(part, name="UMT5")
    config = infer_t5_config(shapes, str(part.files[0]))
    name = "UMT5-XXL" if config == XXL else "UMT5"
    sizes = ("num_layers", config.num_layers), ("d_model", config.d_model), ("vocab_size", config.vocab_size)
    own = {name: shape for name, shape in shapes.items() if name != TIED_EMBEDDING}
    return replace(
        part, name=name, config=config, sizes=sizes, mismatches=find_mismatches(t5_shapes(config), own)
    )


def _recognize_image_encoder(part: Component, shapes: dict[str, tuple[int, ...]]) -> Component:
    if part.refusal:
        return replace(part, name="CLIP ViT-H")
    shapes |= {
        f"{layer}to_qkv{kind}": (3 * shapes[name][0], *shapes[name][1:])
        for name in list(shapes)
        for layer, found, kind in (name.partition("to_q"),)
        if found and kind in (".weight", ".bias")
    }
    try:
        config = infer_clip_config(shapes, str(part.files[0]))
    except CheckpointError:
        return replace(
            part,
            name="CLIP image encoder",
            refusal="this is a CLIP image encoder of another kind than ViT-H/14, which Wan 2.1 reads",
            hint="use models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth or clip_vision_h.safetensors",
        )
    sizes = ("dim", config.dim), ("num_layers", config.num_layers), ("image", config.image)
    return replace(part, name="CLIP ViT-H", config=config, sizes=sizes)


def _recognize_vae(part: Component, shapes: dict[str, tuple[int, ...]]) -> Component:
    if part.refusal:
        return replace(part, name="Wan VAE")
    config = infer_vae_config(shapes, str(part.files[0]))
    if isinstance(config, VAE22Config):
        sizes = ("dim", config.dim), ("dec_dim", config.dec_dim), ("z_dim", config.z_dim)
        return replace(part, name="Wan 2.2 VAE", config=config, sizes=sizes)
    part = replace(part, sizes=(("dim", config.dim), ("z_dim", config.z_dim)))
    if shapes.get("decoder.conv1.weight", ())[:2] == LIGHT_VAE:
        return replace(
            part,
            name="LightVAE",
            refusal="this is a LightVAE, the Wan 2.1 VAE pruned to a quarter of its width",
            hint="use Wan2.1_VAE.pth or wan_2.1_vae.safetensors",
        )
    return replace(part, name="Wan 2.1 VAE", config=config)


def _recognize_lora(contents: TensorIndex) -> Component:
    lora = describe_lora(contents)
    path = contents.files[0]
    made_for = NAMES_BY_WIDTH.get(lora.width or 0, "")
    part = Component(
        "lora",
        name=f"LoRA for {made_for}" if made_for else "LoRA",
        files=contents.files,
        container=contents.container,
        expert=expert_from_name(path),
        precision=count_precision(contents.tensors, dict.fromkeys(contents.tensors, "tensors")),
        parameters=sum(math.prod(info.shape) for info in contents.tensors.values()),
        tensors=len(contents.tensors),
        lora=lora,
    )
    if lora.targets:
        return replace(part, refusal=lora.refusal, hint=LORA_HINT if lora.refusal else "")
    return replace(
        part,
        name="LoRA for another model",
        refusal="none of its targets is a layer of Wan",
        hint="its first tensor is " + next(iter(contents.tensors)),
    )


def _unsupported_component(contents: TensorIndex, what: str) -> Component:
    return Component(
        "other",
        name=what.partition(",")[0],
        files=contents.files,
        container=contents.container,
        precision=count_precision(contents.tensors, dict.fromkeys(contents.tensors, "tensors")),
        parameters=sum(math.prod(info.shape) for info in contents.tensors.values()),
        tensors=len(contents.tensors),
        refusal=f"this is a {what}",
        hint=SUPPORTED_HINT,
    )


def normalize_config(document: Mapping[str, object]) -> dict[str, object]:
    """Return a transformer's config.json with the official names of its keys."""
    keys = {"num_attention_heads": "num_heads", "in_channels": "in_dim", "out_channels": "out_dim"}
    return {keys.get(key, key): value for key, value in document.items()}
