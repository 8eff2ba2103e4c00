"""The page of models without renders: the models that Wan released, or one on this disk."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from wancli import wan_mini
from wancli.errors import JobError
from wancli.models import variants
from wancli.plan import model_registry
from wancli.report.html import model_facts, page_data
from wancli.resources import machine
from wancli.weights.checkpoint import Checkpoint, identify, text_encoder_config, vae_config

LOCATION = "MODEL"


def explore_document(requested: str | None) -> dict[str, Any]:
    """Build the document of all released models and wan-mini, with the requested one chosen.

    If the request is the name or path of a checkpoint, the document has that one alone. Raises JobError if
    it is neither, and CheckpointError."""
    names = {name.lower(): name for name in (*model_facts.RELEASED, wan_mini.NAME)}
    if requested is not None and requested.lower() not in names:
        return _checkpoint_document(requested, names)
    device, dtype = _device_and_dtype()
    models = [
        model_facts.describe_model(*model_facts.released_checkpoint(name), device, dtype)
        for name in model_facts.RELEASED
    ]
    models.append(_describe_checkpoint(identify(wan_mini.FOLDER)) | {"root": wan_mini.NAME})
    known = {name: variant for name, (variant, _) in model_facts.RELEASED.items()} | {
        wan_mini.NAME: variants.MINI
    }
    shown = [model["variant"] for model in models]
    return page_data.models_document(models, known, shown.index(names[requested.lower()]) if requested else 0)


def _checkpoint_document(requested: str, names: dict[str, str]) -> dict[str, Any]:
    def where(*_: object) -> str:
        return LOCATION

    try:
        location = model_registry.resolve_model(requested, lambda *_: Path.cwd(), where)
    except JobError as error:
        near = next(iter(difflib.get_close_matches(requested.lower(), names, 1, 0.5)), None)
        meant = f"did you mean {names[near]}? " if near else ""
        hint = f"{meant}Released models are {', '.join(names.values())}. {error.hint}"
        raise JobError(error.message, where=error.where, hint=hint) from None
    checkpoint = identify(location)
    return page_data.models_document(
        [_describe_checkpoint(checkpoint)], {checkpoint.variant.name: checkpoint.variant}, 0
    )


def _describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    return model_facts.describe_model(
        checkpoint, text_encoder_config(checkpoint), vae_config(checkpoint), *_device_and_dtype()
    )


def _device_and_dtype() -> tuple[str, str]:
    """Return the device and the dtype that this machine computes with."""
    return ("cuda", "bf16") if machine.has_cuda() else ("cpu", "fp32")
