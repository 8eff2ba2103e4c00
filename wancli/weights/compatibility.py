"""Whether the components of a checkpoint fit together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from wancli.errors import CheckpointError
from wancli.models.config import Expert, WanConfig
from wancli.models.variants import T2V_14B, T2V_A14B, TWO_EXPERTS, Variant
from wancli.weights.component import Component
from wancli.weights.folder_layouts import CLIP_NAMES, Role
from wancli.weights.formats.infer_config import mismatch_error


def require_usable(part: Component) -> None:
    if part.refusal:
        raise CheckpointError(part.refusal, where=str(part.files[0]), hint=part.hint)
    if part.mismatches:
        raise mismatch_error(part.mismatches, str(part.files[0]))


def is_compatible(part: Component, transformer: Component) -> bool:
    """Return whether the width of an encoder, or the channels of a VAE, are those of the transformer."""
    transformer_sizes, sizes = dict(transformer.sizes), dict(part.sizes)
    if part.kind == "image encoder":
        return sizes.get("dim") == transformer_sizes.get("image_dim")
    if part.kind == "vae":
        return sizes.get("z_dim") == transformer_sizes.get("out_dim")
    return sizes.get("d_model") == transformer_sizes.get("text_dim")


def resolve_experts(roles: Sequence[tuple[Role, Component]]) -> tuple[tuple[Component, ...], Variant]:
    """Return the transformers with their final variant and expert. Two must have the same sizes and be in the
    right roles.
    """
    first = roles[0][1]
    if len(roles) == 1:
        assert first.variant is not None
        if first.variant.boundary is not None:
            which = f"the {first.expert}-noise expert of Wan 2.2 A14B by its name"
            raise CheckpointError(
                f"{which if first.expert else f'an expert of {first.name}'}, which needs the other one",
                where=str(first.files[0]),
                hint="say model: {high_noise: FILE, low_noise: FILE, ...}, or rename a file that is neither",
            )
        return (first,), first.variant
    experts = []
    of_14b = first.variant is T2V_A14B or first.variant is T2V_14B
    variant = T2V_A14B if of_14b else TWO_EXPERTS
    if first.variant and first.variant.boundary and first.variant.first_picture != "none":
        variant = first.variant
    for role, part in roles:
        expert: Expert = "high" if role == "high_noise" else "low"
        if part.expert not in (None, expert):
            raise CheckpointError(
                f"{role}: this is the {part.expert}-noise expert by its name",
                where=str(part.files[0]),
                hint="exchange high_noise and low_noise, or rename the file",
            )
        if part.config != first.config or part.variant is None or not _may_be_expert(part.variant, variant):
            raise CheckpointError(
                f"{role}: a {part.name}, which is not an expert beside {first.files[0].name}",
                where=str(part.files[0]),
                hint="the two experts of Wan 2.2 A14B have the same sizes",
            )
        experts.append(replace(part, name=variant.name, variant=variant, expert=expert))
    return tuple(experts), variant


def _may_be_expert(part: Variant, of: Variant) -> bool:
    """Return whether a transformer recognized as `part` may be an expert, whose shapes Wan 2.1 has, too."""
    of_text = part.first_picture == of.first_picture == "none"
    return part.latent_channels == 16 and (part.boundary is not None or of_text)


def require_compatible(vae: Component, text_encoder: Component, transformer: Component) -> None:
    """Raise CheckpointError if the VAE or the text encoder does not fit the transformer."""
    sizes = dict(transformer.sizes)
    if not is_compatible(vae, transformer):
        has, makes = dict(vae.sizes)["z_dim"], sizes["out_dim"]
        raise CheckpointError(
            f"a VAE of {has} latent channels; the transformer makes {makes}",
            where=str(vae.files[0]),
            hint="TI2V-5B goes with Wan2.2_VAE, all other models with Wan2.1_VAE",
        )
    if not is_compatible(text_encoder, transformer):
        has, reads = dict(text_encoder.sizes)["d_model"], sizes["text_dim"]
        raise CheckpointError(
            f"a text encoder of width {has}; the transformer reads {reads}",
            where=str(text_encoder.files[0]),
            hint="the parts are from different models",
        )


def fit_image_encoder(part: Component | None, transformer: Component) -> Component | None:
    """Return the image encoder if the transformer reads one. Raises CheckpointError if none fits."""
    assert isinstance(transformer.config, WanConfig)
    if (reads := transformer.config.image_dim) is None:
        return None
    if part is None:
        raise CheckpointError(
            f"the image encoder is missing: CLIP ViT-H, which {transformer.name} reads",
            where=str(transformer.files[0]),
            hint=f"add {CLIP_NAMES[-1]}, or clip_vision_h.safetensors, or name it as image_encoder",
        )
    require_usable(part)
    if not is_compatible(part, transformer):
        raise CheckpointError(
            f"an image encoder of width {dict(part.sizes)['dim']}; the transformer reads {reads}",
            where=str(part.files[0]),
            hint="the parts are from different models",
        )
    return part
