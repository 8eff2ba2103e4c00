"""Maps tensor names of diffusers to the official ones, and those of UMT5 to transformers.

wancli keeps the official names. Each function renames one tensor. It returns an unknown name unchanged, so
that loading reports it as unexpected. Checked against diffusers and transformers in the tests.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping

# Prefix or component -> its official counterpart. diffusers' norm2 is the official norm3, the
# affine norm before cross-attention; the other two norms hold no tensors.
TRANSFORMER_FROM_DIFFUSERS = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
# Layers that only models with an image branch have.
IMAGE_FROM_DIFFUSERS = {
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
}
IMAGE_BLOCK_FROM_DIFFUSERS = {
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "attn2.norm_added_k": "cross_attn.norm_k_img",
}
BLOCK_FROM_DIFFUSERS = {
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_out.0": "cross_attn.o",
    **{
        f"{theirs}.{a}": f"{ours}.{b}"
        for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for a, b in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("norm_q", "norm_q"), ("norm_k", "norm_k"))
    },
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "norm2": "norm3",
    "scale_shift_table": "modulation",
}
VAE_FROM_DIFFUSERS = {
    "quant_conv": "conv1",
    "post_quant_conv": "conv2",
    **{
        f"{half}.{a}": f"{half}.{b}"
        for half in ("encoder", "decoder")
        for a, b in (
            ("conv_in", "conv1"),
            ("norm_out", "head.0"),
            ("conv_out", "head.2"),
            ("mid_block.attentions.0", "middle.1"),
        )
    },
}
VAE_RESNET_FROM_DIFFUSERS = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
UMT5_TO_TRANSFORMERS = {
    "token_embedding": "shared",
    "norm": "encoder.final_layer_norm",
}
UMT5_BLOCK_TO_TRANSFORMERS = {
    "norm1": "layer.0.layer_norm",
    **{f"attn.{p}": f"layer.0.SelfAttention.{p}" for p in "qkvo"},
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}

COMPILED = "_orig_mod"
# Modules that torch wraps around others: torch.compile, FSDP, activation checkpointing.
WRAPPERS = (COMPILED, "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

POSITION_IDS = "embeddings.position_ids"  # 0, 1, 2, .. in int64, of older files of transformers
# CLIP's vision tower. The three matrices of an attention layer are one in the official layout.
CLIP_FROM_TRANSFORMERS = {
    "embeddings.class_embedding": "cls_embedding",
    "embeddings.patch_embedding": "patch_embedding",
    "embeddings.position_embedding.weight": "pos_embedding",
    "pre_layrnorm": "pre_norm",
    "post_layernorm": "post_norm",
}
CLIP_LAYER_FROM_TRANSFORMERS = {
    "layer_norm1": "norm1",
    "self_attn.q_proj": "attn.to_q",
    "self_attn.k_proj": "attn.to_k",
    "self_attn.v_proj": "attn.to_v",
    "self_attn.out_proj": "attn.proj",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}

_CLIP_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")
_BLOCK = re.compile(r"(blocks\.\d+)\.(.+)")
_VAE_STAGE = re.compile(
    r"(?P<half>encoder|decoder)\."
    r"(?:mid_block\.resnets\.(?P<mid>\d+)|down_blocks\.(?P<down>\d+)"
    r"|up_blocks\.(?P<up>\d+)\.(?:resnets\.(?P<resnet>\d+)|upsamplers\.0))\.(?P<rest>.+)"
)
_VAE22_STAGE = re.compile(
    r"(?P<half>encoder|decoder)\."
    r"(?:mid_block\.resnets\.(?P<mid>\d+)|(?P<way>down|up)_blocks\.(?P<stage>\d+)"
    r"\.(?:resnets\.(?P<resnet>\d+)|(?:down|up)sampler))\.(?P<rest>.+)"
)
_LAYERS_PER_STAGE = {"down": 3, "up": 4}  # two or three residual blocks and what changes the size


def plain_name(name: str) -> str:
    """Return the name that a tensor had before torch wrapped its network, or blocks of it."""
    for wrapper in WRAPPERS:
        name = name.replace(f"{wrapper}.", "")
    return name


def is_tokenizer(name: str) -> bool:
    """Return whether a tensor holds a SentencePiece model, whatever network it lies in."""
    return name.rpartition(".")[2] == "spiece_model"


def transformer_from_diffusers(name: str) -> str:
    """WanTransformer3DModel -> official, e.g. `blocks.3.attn2.to_q.bias` -> `blocks.3.cross_attn.q.bias`."""
    if block := _BLOCK.fullmatch(name):
        return f"{block[1]}.{_replace_prefix(block[2], BLOCK_FROM_DIFFUSERS | IMAGE_BLOCK_FROM_DIFFUSERS)}"
    return _replace_prefix(name, TRANSFORMER_FROM_DIFFUSERS | IMAGE_FROM_DIFFUSERS)


def vae_from_diffusers(name: str) -> str:
    """AutoencoderKLWan (2.1) -> official. Its encoder is flat already, its decoder nests stages."""
    stage = _VAE_STAGE.fullmatch(name)
    if stage is None:
        return _replace_prefix(name, VAE_FROM_DIFFUSERS)
    if stage["mid"] is not None:
        layer = f"middle.{2 * int(stage['mid'])}"
    elif stage["down"] is not None:
        layer = f"downsamples.{stage['down']}"
    else:
        within = int(stage["resnet"] or _LAYERS_PER_STAGE["up"] - 1)
        layer = f"upsamples.{_LAYERS_PER_STAGE['up'] * int(stage['up']) + within}"
    return f"{stage['half']}.{layer}.{_replace_prefix(stage['rest'], VAE_RESNET_FROM_DIFFUSERS)}"


def vae22_from_diffusers(name: str) -> str:
    """AutoencoderKLWan (2.2) -> official. Both halves nest stages."""
    stage = _VAE22_STAGE.fullmatch(name)
    if stage is None:
        return _replace_prefix(name, VAE_FROM_DIFFUSERS)
    if stage["mid"] is not None:
        layer = f"middle.{2 * int(stage['mid'])}"
    else:
        layers = f"{stage['way']}samples"
        within = stage["resnet"] or _LAYERS_PER_STAGE[stage["way"]] - 1
        layer = f"{layers}.{stage['stage']}.{layers}.{within}"
    return f"{stage['half']}.{layer}.{_replace_prefix(stage['rest'], VAE_RESNET_FROM_DIFFUSERS)}"


def choose_vae_renaming(names: Collection[str]) -> Callable[[str], str]:
    """Return the function that gives the tensors of a VAE, of either version, their official names."""
    if "decoder.conv_in.weight" not in names:
        return str
    in_stages = "encoder.down_blocks.0.resnets.0.conv1.weight" in names
    return vae22_from_diffusers if in_stages else vae_from_diffusers


def umt5_to_transformers(name: str) -> str:
    """Official UMT5 encoder -> transformers' UMT5EncoderModel (whose embed_tokens is tied to `shared`)."""
    if block := _BLOCK.fullmatch(name):
        number = block[1].removeprefix("blocks.")
        return f"encoder.block.{number}.{_replace_prefix(block[2], UMT5_BLOCK_TO_TRANSFORMERS)}"
    return _replace_prefix(name, UMT5_TO_TRANSFORMERS)


def clip_from_transformers(name: str) -> str:
    """CLIPVisionModel -> official, except that `attn.to_qkv` is in three parts, `attn.to_q` and so on."""
    if layer := _CLIP_LAYER.fullmatch(name):
        return f"transformer.{layer[1]}.{_replace_prefix(layer[2], CLIP_LAYER_FROM_TRANSFORMERS)}"
    return _replace_prefix(name, CLIP_FROM_TRANSFORMERS)


def _replace_prefix(name: str, table: Mapping[str, str]) -> str:
    """Replace the leading dotted components that the table names, whole ones only."""
    for old, new in table.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return name
