"""Recognizes what a weight file holds: kind, family, variant, naming, prefix, precision, scheme.

Uses the tensors alone: a kind is identified by two names that only it has, after any prefix. Only the expert
of Wan 2.2 A14B is taken from the file name, because the shapes of both experts are the same. A network that
wancli knows and cannot render becomes a Component with a refusal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from wancli.errors import CheckpointError
from wancli.models.config import TIED_EMBEDDING, T5Config, VAE22Config
from wancli.models.variants import (
    NAMES_BY_WIDTH,
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
from wancli.weights.signatures import EVIDENCE, SIGNATURES, find_gap, find_prefixes, find_starts
from wancli.weights.variant_choice import choose_variant

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
        for prefix in find_prefixes(contents.tensors, first, second)
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
        starts = (find_starts(tensors, name) for name in EVIDENCE[kind, naming])
        prefix = min(set().union(*starts), default=None)
        if prefix is None:
            continue
        absent = next(s for s in signature if not any(name.startswith(prefix + s) for name in tensors))
        names = {"text encoder": "UMT5 encoder", "image encoder": "CLIP image encoder", "vae": "Wan VAE"}
        name = names.get(kind, "Wan transformer")
        refusal = f"a part of a {name}: {find_gap(tensors, prefix, absent)} is missing"
        part = _unsupported_component(contents, name)
        return (replace(part, kind=kind, naming=naming, refusal=refusal, hint=WHOLE_FILE_HINT),)
    return ()


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
