"""Which released variant a transformer is: by its sizes, and by names where the sizes are the same."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from wancli.models.config import Expert
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
from wancli.weights.formats.infer_config import IMAGE_CHANNELS

WIDTH_1_3B = 1536
_SNAPSHOT = re.compile("snapshots|[0-9a-f]{40}")


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

    In the Hugging Face cache the folder of the repository is above `snapshots/COMMIT`, which say nothing.
    """
    if len(candidates) == 1:
        return candidates[0], ""
    folders = [place for place in path.absolute().parents if not _SNAPSHOT.fullmatch(place.name)]
    for name in [place.name for place in (path, *folders[:3])]:
        for variant in sorted(candidates, key=lambda variant: -len(variant.named)):
            if variant.named and re.search(variant.named, name, re.IGNORECASE):
                return variant, f"the name {name!r} says so"
    others = " or ".join(variant.name for variant in candidates[1:])
    return candidates[0], f"by default: its tensors may be those of {others}, and no name says so"
