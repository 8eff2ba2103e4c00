"""Single files that make up a checkpoint: named one by one, or found in the folders of ComfyUI.

    diffusion_models/  one transformer, or a high-noise and a low-noise one
    text_encoders/     UMT5
    clip_vision/       CLIP, which only models with an image branch read
    vae/               its VAE

or all of them in one folder. Nothing is guessed: if two files would do, the error names both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wancli.errors import CheckpointError, Unreadable
from wancli.storage import disk, links
from wancli.weights.compatibility import is_compatible
from wancli.weights.component import Component, Kind
from wancli.weights.folder_layouts import (
    Layout,
    detect_layout,
    find_remains,
    find_tokenizer,
    list_weight_files,
    load_json,
    models_root,
    network_files,
)
from wancli.weights.formats.tensor_index import read_index
from wancli.weights.recognize import normalize_config, recognize

NAME_FILES_HINT = "name the files in the job: model: {transformer: FILE, text_encoder: FILE, vae: FILE, ...}"
# What every kind of network has, for the message when a file has none.
_MARKER_TENSOR = {
    "transformer": "'patch_embedding.weight'",
    "text encoder": "'token_embedding.weight'",
    "image encoder": "'transformer.0.attn.to_qkv.weight'",
    "vae": "'decoder.middle.0.residual.0.gamma'",
}


@dataclass(frozen=True)
class SingleFiles:
    """A checkpoint named file by file: `transformer`, or `high_noise` and `low_noise`. All paths are
    absolute.

    A whole checkpoint in one file needs only `transformer`; a text encoder that holds its SentencePiece model
    needs no `tokenizer`. `heads` is needed if the width is not a multiple of 128. `variant` names one
    of several variants whose tensors are the same. A folder that is named alone, as `transformer`, is a whole
    checkpoint.
    """

    transformer: Path | None = None
    high_noise: Path | None = None
    low_noise: Path | None = None
    text_encoder: Path | None = None
    tokenizer: Path | None = None
    vae: Path | None = None
    image_encoder: Path | None = None
    heads: int | None = None
    variant: str | None = None

    @property
    def main(self) -> Path | None:
        """The file that gives the checkpoint its name."""
        return self.transformer or self.high_noise or self.low_noise

    @property
    def whole_folder(self) -> Path | None:
        """The folder that holds the whole checkpoint, if one is named alone. Raises Unreadable."""
        folder = self.transformer
        is_alone = self == SingleFiles(transformer=folder, variant=self.variant)
        return folder if folder and is_alone and disk.is_folder(folder) else None


def recognize_file(path: Path, config_json: Mapping[str, object] | None = None) -> tuple[Component, ...]:
    """Return all networks in a file, in its set of shards, or in a folder that holds one network.

    Values of `config_json` take precedence over those of the folder's config.json. Raises CheckpointError.
    """
    config = path / "config.json"
    in_folder = normalize_config(load_json(config)) if disk.is_file(config) else {}
    return recognize(read_index(network_files(path)), in_folder | dict(config_json or {}))


def find_layout(root: Path) -> Layout:
    """Return the layout of a folder. Single files may lie beside a config.json, a model_index.json or
    official files.

    Raises CheckpointError like `detect_layout`.
    """
    layout = detect_layout(root)
    is_bare = "transformer" in layout.missing or (
        layout.name == "diffusers" and {"high_noise", "low_noise"} <= layout.missing.keys()
    )
    if is_bare and any(part.kind == "transformer" for _, part in _recognize_folder(root)):
        return Layout("single files", root)
    return layout


def find_component(
    paths: Sequence[Path], kind: Kind, config_json: Mapping[str, object] | None = None
) -> Component:
    """Return the network of this kind in these files. Raises CheckpointError if there is none."""
    return select(recognize(read_index(paths), config_json), kind, paths[0])


def select(components: Sequence[Component], kind: Kind, path: Path) -> Component:
    """Return the one component of this kind. Raises CheckpointError, naming what was found instead."""
    matching = [part for part in components if part.kind == kind]
    if len(matching) == 1:
        return matching[0]
    name = "VAE" if kind == "vae" else kind
    if matching:
        raise CheckpointError(f"holds {len(matching)} of {name}", where=str(path), hint=NAME_FILES_HINT)
    if components:
        raise CheckpointError(
            f"no {name}: this is a {components[0].name}", where=str(path), hint=NAME_FILES_HINT
        )
    raise CheckpointError(
        f"no Wan {name}: {_MARKER_TENSOR.get(kind, 'its network')} is missing", where=str(path)
    )


def find_siblings(path: Path) -> SingleFiles:
    """Return a single file and the files around it: the other expert, text encoder, tokenizer, VAE.

    Raises CheckpointError if the file holds no transformer.
    """
    parts = recognize_file(path)
    places = links.list_names(path)  # what is beside a link comes before what is beside its target
    found = [_complete(path, parts, _recognize_folder(models_root(place), path), place) for place in places]
    named: dict[str, Any] = {}
    for files in reversed(found):
        named |= {role: file for role, file in vars(files).items() if file is not None}
    return SingleFiles(**named)


def _complete(
    path: Path, parts: Sequence[Component], others: Sequence[tuple[Path, Component]], place: Path
) -> SingleFiles:
    """Return a file and the others that go with it, found around a place."""
    transformer = select(parts, "transformer", path)
    root = models_root(place)
    high, low = (path, None) if transformer.expert == "high" else (None, path)
    if transformer.expert is not None:
        partner = next((p for p, part in others if _are_expert_pair(transformer, part)), None)
        high, low = high or partner, low or partner
    kinds = {part.kind for part in parts}
    return SingleFiles(
        transformer=path if transformer.expert is None else None,
        high_noise=high if transformer.expert else None,
        low_noise=low if transformer.expert else None,
        text_encoder=path if "text encoder" in kinds else _find_matching(others, "text encoder", transformer),
        tokenizer=find_tokenizer(root) or find_tokenizer(place.parent),
        vae=path if "vae" in kinds else _find_matching(others, "vae", transformer),
        image_encoder=path
        if "image encoder" in kinds
        else _find_matching(others, "image encoder", transformer),
    )


def find_in_folder(root: Path) -> SingleFiles:
    """Return the one checkpoint in a folder of single files. Raises CheckpointError for none and for
    several.
    """
    known = _recognize_folder(root)
    transformers = [(path, part) for path, part in known if part.kind == "transformer"]
    usable = [(path, part) for path, part in transformers if not part.refusal]
    if not usable:
        if transformers:
            raise CheckpointError(
                transformers[0][1].refusal, where=str(transformers[0][0]), hint=transformers[0][1].hint
            )
        raise CheckpointError(
            f"no Wan transformer in this folder{find_damage(root)}",
            where=str(root),
            hint="give an official or a diffusers folder, or the transformer's file",
        )
    first, part = usable[0]
    if len(usable) > 1 and not (len(usable) == 2 and _are_expert_pair(part, usable[1][1])):
        raise CheckpointError(
            f"several transformers: {_format_names([path for path, _ in usable])}",
            where=str(root),
            hint="give the file instead of the folder, or " + NAME_FILES_HINT,
        )
    own = [part for path, part in known if path == first]
    return _complete(first, own, [(path, part) for path, part in known if path != first], first)


def _recognize_folder(root: Path, exclude: Path | None = None) -> list[tuple[Path, Component]]:
    """Return every network in a folder of single files, each once, however many links lead to it.

    Files that cannot be read are skipped.
    """
    networks = []
    seen = {disk.resolve(exclude)} if exclude else set()
    for path in list_weight_files(root):
        if disk.resolve(path) in seen:
            continue
        seen.add(disk.resolve(path))
        try:
            networks += [(path, part) for part in recognize_file(path)]
        except (CheckpointError, Unreadable):
            continue
    return networks


def find_damage(root: Path) -> str:
    """Say which files of a folder of single files cannot be read, and why; empty if there is none."""
    damage = ""
    for path in list_weight_files(root):
        try:
            recognize_file(path)
        except (CheckpointError, Unreadable) as error:
            damage += f"; {path.name} is there, and cannot be read: {error.message}"
    return damage + find_remains(root)


def _find_matching(
    others: Sequence[tuple[Path, Component]], kind: Kind, transformer: Component
) -> Path | None:
    """Return the file of this kind that fits the transformer, if there is one. Raises CheckpointError for
    several.
    """
    matching = [
        path
        for path, part in others
        if part.kind == kind and not part.refusal and is_compatible(part, transformer)
    ]
    if len(matching) > 1:
        name = "VAEs" if kind == "vae" else f"{kind}s"
        raise CheckpointError(
            f"several {name} beside it: {_format_names(matching)}",
            where=str(transformer.files[0]),
            hint=NAME_FILES_HINT,
        )
    return matching[0] if matching else None


def _are_expert_pair(a: Component, b: Component) -> bool:
    """Return whether two transformers are the two experts of one model: their names differ in that word
    only.
    """
    names = [re.sub(r"(?i)high|low", "?", part.files[0].name) for part in (a, b)]
    return {a.expert, b.expert} == {"high", "low"} and names[0] == names[1]


def _format_names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths)
