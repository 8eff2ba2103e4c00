"""The names of tensors by which a network is known, whatever is before them."""

from __future__ import annotations

from collections.abc import Mapping

from wancli.weights.component import Kind, Naming

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


def find_prefixes(tensors: Mapping[str, object], first: str, second: str) -> list[str]:
    """Return the prefixes before both names: nothing, or whole components."""
    starts = find_starts(tensors, first)
    return sorted(p for p in starts if any(name.startswith(p + second) for name in tensors))


def find_starts(tensors: Mapping[str, object], part: str) -> set[str]:
    """Return what stands before a part of a name: nothing, or whole components."""
    return {
        name[: name.index(part)]
        for name in tensors
        if part in name and (name.startswith(part) or name[name.index(part) - 1] == ".")
    }


def find_gap(tensors: Mapping[str, object], prefix: str, absent: str) -> str:
    """Return the shortest beginning of a name that no tensor has, as a pattern: `blocks.0.*`."""
    words = absent.rstrip(".").split(".")
    for end in range(1, len(words) + 1):
        if end < len(words) and words[end].isdecimal():
            continue
        head = ".".join(words[:end]) + "."
        if not any(name.startswith(prefix + head) for name in tensors):
            return f"{head}*" if not absent.endswith(head.rstrip(".")) else absent
    return absent
