"""Describes a file or folder of weights as plain data, from headers alone: `wancli inspect`.

Only `deep` hashes files and reads data; only then is torch loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wancli.errors import CheckpointError, JobError
from wancli.models import parameter_count
from wancli.models.config import T5Config, VAEConfig, WanConfig
from wancli.storage import disk, links
from wancli.storage.paths import expand_home
from wancli.weights.checkpoint import identify
from wancli.weights.component import Component
from wancli.weights.fingerprint import check_blob
from wancli.weights.folder_layouts import (
    EXPERT_ROLES,
    Layout,
    list_weight_files,
    load_json,
    network_files,
)
from wancli.weights.formats.tensor_index import detect_container, looks_like_weights
from wancli.weights.recognize import normalize_config
from wancli.weights.single_files import find_component, find_layout, recognize_file

SCHEMA = "wancli/inspect/1"
SUSPECTS_LISTED = 20
SLICE = 2**24  # values looked at in one go: 64 MiB of fp32


@disk.reading_weights()
def inspect(path: Path, *, deep: bool = False) -> dict[str, Any]:
    """Describe the weights at `path`. Raises JobError if there are none, CheckpointError if they are damaged.

    `problem` says why a render could not use them as they are, `missing` names the files that a folder lacks.
    With `deep`, each file gets its `sha256`, `not_finite`, `zero` and `damage`.
    """
    path = expand_home(path)
    if not disk.exists(path):
        raise JobError("no such file or folder", where=str(path))
    layout = find_layout(path) if disk.is_folder(path) else None
    known = layout is not None and layout.name != "single files"
    parts = tuple(_components_in_layout(layout)) if layout and known else _components_in_files(path)
    whole = known or any(part.kind == "transformer" for part in parts)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "path": str(path),
        "layout": layout.name if layout else "file",
        "missing": [
            name
            for role, name in (layout.missing.items() if layout else ())
            if role != "tokenizer" or not any(part.tokenizer for part in parts)
        ],
        "parts": [_describe_component(part) for part in parts],
        **(_describe_checkpoint(path) if whole else {"variant": None, "defaults": None, "problem": None}),
    }
    if deep:
        document["deep"] = [
            _scan_file(file) for file in dict.fromkeys(f for part in parts for f in part.files)
        ]
    return document


def is_damaged(document: dict[str, Any]) -> bool:
    """Return whether a deep inspection found values that no weight can have, or bytes of another digest."""
    return any(file["not_finite"] or file["damage"] for file in document.get("deep", ()))


def _components_in_layout(layout: Layout) -> Iterator[Component]:
    for role in EXPERT_ROLES:
        if role in layout.files:
            config = layout.configs.get(role)
            config_json = normalize_config(load_json(config)) if config else {}
            yield find_component(layout.files[role], "transformer", config_json)
    if "text_encoder" in layout.files:
        yield find_component(layout.files["text_encoder"], "text encoder")
    if "vae" in layout.files:
        yield find_component(layout.files["vae"], "vae")
    if "image_encoder" in layout.files:
        yield find_component(layout.files["image_encoder"], "image encoder")


def _components_in_files(path: Path) -> tuple[Component, ...]:
    files = list_weight_files(path) if disk.is_folder(path) else (path,)
    if not files or not (disk.is_folder(path) or looks_like_weights(path)):
        raise JobError(
            "holds no weights", where=str(path), hint="Give a .safetensors, .pth or .gguf file, or a folder."
        )
    parts = tuple(part for file in files for part in (recognize_file(file) or (_unknown_component(file),)))
    if not disk.is_folder(path) and parts[0].name == UNKNOWN:
        raise JobError("holds no network of Wan that wancli knows", where=str(path), hint=parts[0].hint)
    return parts


UNKNOWN = "unknown"


def _unknown_component(file: Path) -> Component:
    from wancli.weights.formats.tensor_index import read_index

    index = read_index(network_files(file))
    names = ", ".join(list(index.tensors)[:3]) or "nothing"
    return Component(
        "other",
        UNKNOWN,
        index.files,
        index.container,
        tensors=len(index.tensors),
        refusal="no network of Wan that wancli knows",
        hint=f"It begins with {names}.",
    )


def _describe_checkpoint(path: Path) -> dict[str, Any]:
    """Describe the variant and its defaults, or say why no checkpoint can be rendered with."""
    try:
        checkpoint = identify(links.resolve_path(path))
    except CheckpointError as error:
        return {"variant": None, "defaults": None, "problem": str(error), "hint": error.hint}
    row = asdict(checkpoint.variant)
    return {"variant": row.pop("name"), "defaults": row, "problem": None}


def _describe_component(part: Component) -> dict[str, Any]:
    """Describe a component, with its bytes on disk and the number of parameters of its network."""
    document = asdict(part)
    for key in ("variant", "config", "tokenizer_file"):
        del document[key]
    document["gaps"], document["misfits"] = document.pop("missing"), document.pop("mismatches")
    return document | {
        "files": [str(path) for path in part.files],
        "bytes": sum(disk.size(path) for path in part.files),
        "sizes": dict(part.sizes),
        "tokenizer": part.tokenizer,
        "precision": {entry.group: dict(entry.dtypes) for entry in part.precision},
        "variant": part.variant.name if part.variant else None,
        "parameters_of_network": _count_parameters(part),
        "lora": document["lora"] and document["lora"] | {"layers": dict(document["lora"]["layers"])},
    }


def _count_parameters(part: Component) -> int | None:
    """Count the parameters of a network of these sizes, if there is a formula."""
    if isinstance(part.config, WanConfig):
        return parameter_count.wan_parameters(part.config)
    if isinstance(part.config, T5Config):
        return parameter_count.t5_parameters(part.config)
    return parameter_count.vae_parameters(part.config) if isinstance(part.config, VAEConfig) else None


def _scan_file(path: Path) -> dict[str, Any]:
    """Hash a file and list the tensors in it that hold NaN or Inf, and the matrices that hold zeros only.

    GGUF blocks are only hashed: the lists are None. `damage` says if the file is a blob of the Hugging Face
    cache with another digest.
    """
    digest, damage = disk.sha256(path), ""
    try:
        check_blob(path, digest)
    except CheckpointError as error:
        damage = error.message
    bad: list[str] | None = None
    zero: list[str] | None = None
    if detect_container(path) != "gguf":
        bad, zero = _list_suspects(path)
    return {"file": str(path), "sha256": digest, "not_finite": bad, "zero": zero, "damage": damage}


def _list_suspects(path: Path) -> tuple[list[str], list[str]]:
    """Return the first tensors with NaN or Inf, and the first matrices of zeros only."""
    from wancli.weights.formats.read import iterate_tensors

    bad: list[str] = []
    zero: list[str] = []
    for name, tensor in iterate_tensors([path]):
        if not tensor.dtype.is_floating_point:
            continue
        flat = tensor.flatten()
        slices = [flat[start : start + SLICE] for start in range(0, flat.numel(), SLICE)]
        if not all(part.float().isfinite().all() for part in slices):
            bad.append(name)
        elif tensor.dim() > 1 and not any(part.float().any() for part in slices):
            zero.append(name)
    return bad[:SUSPECTS_LISTED], zero[:SUSPECTS_LISTED]
