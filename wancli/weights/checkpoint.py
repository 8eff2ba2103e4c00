"""A checkpoint as one frozen value: a folder, a single file, or files named one by one.

Found from names, config.json and headers alone: no torch, no data. `folder_layouts` finds the files,
`recognize` says what each holds; this module checks that they fit together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from wancli.errors import CheckpointError, JobError
from wancli.models.config import CLIPConfig, Expert, T5Config, VAE22Config, VAEConfig, WanConfig
from wancli.models.variants import Variant
from wancli.storage import disk
from wancli.weights.compatibility import (
    fit_image_encoder,
    is_compatible,
    require_compatible,
    require_usable,
    resolve_experts,
)
from wancli.weights.component import Component, Kind
from wancli.weights.folder_layouts import (
    EXPERT_ROLES,
    Layout,
    Role,
    find_remains,
    find_tokenizer_json,
    load_json,
    models_root,
)
from wancli.weights.formats.infer_config import wrong_model_error
from wancli.weights.formats.safetensors_header import DOWNLOAD_AGAIN
from wancli.weights.recognize import normalize_config
from wancli.weights.single_files import (
    NAME_FILES_HINT,
    SingleFiles,
    find_component,
    find_damage,
    find_in_folder,
    find_layout,
    find_siblings,
    recognize_file,
    select,
)
from wancli.weights.variant_choice import variants_with_pictures

Location: TypeAlias = Path | SingleFiles

SPIECE_HINT = "download google/umt5-xxl/spiece.model, which every repository of Wan-AI has"


@dataclass(frozen=True)
class Checkpoint:
    """A Wan model on disk. All its components exist, their headers are sound, and they fit together.

    `experts` is the one transformer, or the high-noise and the low-noise transformer, of the same sizes.
    """

    root: Path
    variant: Variant
    experts: tuple[Component, ...]
    text_encoder: Component
    tokenizer: Path  # the SentencePiece model, or the safetensors file that holds it
    vae: Component
    source: Location
    notes: tuple[str, ...] = ()  # what the user should know about the choice of files
    image_encoder: Component | None = None  # of models whose blocks attend to pictures

    def __hash__(self) -> int:
        """Hash the root only: the headers would be slow to hash for each shot of a sweep."""
        return hash(self.root)

    @property
    def name(self) -> str:
        """The name of its folder or file; in the Hugging Face cache that of its repository, `ORG/NAME`."""
        if self.root.parent.name != "snapshots":
            return self.root.name
        return self.root.parents[1].name.removeprefix("models--").replace("--", "/", 1)

    @property
    def transformer_config(self) -> WanConfig:
        config = self.experts[0].config
        assert isinstance(config, WanConfig)
        return config

    @property
    def transformer_files(self) -> tuple[Path, ...]:
        """The files of the transformer; of two experts those of the low-noise one."""
        return self.experts[-1].files

    @property
    def high_noise_files(self) -> tuple[Path, ...]:
        """The files of the high-noise expert, if there are two."""
        return self.experts[0].files if len(self.experts) > 1 else ()

    def expert(self, expert: Expert) -> Component:
        """Return the only transformer, or the `high`-noise or `low`-noise one of two."""
        return self.experts[0 if expert == "high" else -1]

    @property
    def text_encoder_files(self) -> tuple[Path, ...]:
        return self.text_encoder.files

    @property
    def variant_reason(self) -> str:
        """What told the variant from others with the same tensors; empty if there are none."""
        return self.experts[0].variant_reason

    @property
    def image_encoder_files(self) -> tuple[Path, ...]:
        """The files of CLIP; none if the model reads no pictures through it."""
        return self.image_encoder.files if self.image_encoder else ()

    @property
    def vae_files(self) -> tuple[Path, ...]:
        return self.vae.files


@disk.reading_weights()
def identify(source: Location) -> Checkpoint:
    """Identify the checkpoint in a folder, around a single file, or of named files.

    Reads names and headers only. Raises CheckpointError, naming the file, if a component or a shard is
    missing or damaged, if config.json and tensors disagree, if components do not fit together, if it is
    another kind of model, or if the disk does not give a file; JobError if it is not of the named variant.
    """
    if isinstance(source, SingleFiles):
        folder = source.whole_folder
        found = replace(identify(folder), source=source) if folder else _from_files(source, source)
        return with_variant(found, source.variant) if source.variant else found
    if disk.is_file(source):
        return _from_files(find_siblings(source), source)
    layout = find_layout(source)
    return (
        _from_files(find_in_folder(source), source) if layout.name == "single files" else _from_layout(layout)
    )


def text_encoder_config(checkpoint: Checkpoint) -> T5Config:
    """Return the sizes of UMT5, read from its headers."""
    assert isinstance(checkpoint.text_encoder.config, T5Config)
    return checkpoint.text_encoder.config


def vae_config(checkpoint: Checkpoint) -> VAEConfig | VAE22Config:
    """Return the sizes of the VAE, read from its headers."""
    assert isinstance(checkpoint.vae.config, VAEConfig | VAE22Config)
    return checkpoint.vae.config


def clip_config(checkpoint: Checkpoint) -> CLIPConfig:
    """Return the sizes of CLIP, read from its headers, of a model that has it."""
    assert checkpoint.image_encoder
    assert isinstance(checkpoint.image_encoder.config, CLIPConfig)
    return checkpoint.image_encoder.config


def with_variant(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """Return the checkpoint as the variant of this name, among those whose tensors have the same shapes.

    Raises JobError for another name; the hint lists those that may be given.
    """
    sizes = dict(checkpoint.experts[0].sizes)
    with_pictures = sizes["in_dim"] != sizes["out_dim"]
    candidates = variants_with_pictures(sizes) if with_pictures else (checkpoint.variant,)
    chosen = next((variant for variant in candidates if variant.name.lower() == name.lower()), None)
    if chosen is None:
        names = " or ".join(variant.name for variant in candidates)
        raise JobError(f"the tensors of {checkpoint.name} are not those of {name!r}", hint=f"Write {names}.")
    if checkpoint.variant.boundary is not None:
        chosen = replace(chosen, boundary=checkpoint.variant.boundary)
    reason = "the job says so"
    experts = tuple(
        replace(part, name=chosen.name, variant=chosen, variant_reason=reason) for part in checkpoint.experts
    )
    return replace(checkpoint, variant=chosen, experts=experts)


def _from_layout(layout: Layout) -> Checkpoint:
    where = str(layout.root)
    if layout.pipeline:
        raise wrong_model_error(layout.pipeline, str(layout.root / "model_index.json"))
    text_encoder = None
    if "text_encoder" in layout.files:
        text_encoder = find_component(layout.files["text_encoder"], "text encoder")
    tokenizer = text_encoder.tokenizer_file if text_encoder else None
    tokenizer = next(iter(layout.files.get("tokenizer", ())), tokenizer)
    missing = {role: name for role, name in layout.missing.items() if role != "tokenizer" or not tokenizer}
    if missing or not text_encoder or not tokenizer:
        names = " and ".join(missing.values())
        hint = SPIECE_HINT if missing.keys() == {"tokenizer"} else DOWNLOAD_AGAIN
        raise CheckpointError(f"{names} is missing{find_remains(layout.root)}", where=where, hint=hint)
    experts = []
    for role in EXPERT_ROLES:
        if role in layout.files:
            config = layout.configs.get(role)
            config_json = normalize_config(load_json(config)) if config else {}
            experts.append((role, find_component(layout.files[role], "transformer", config_json)))
    vae = _choose_vae(layout, experts[0][1])
    clip = layout.files.get("image_encoder")
    image_encoder = find_component(clip, "image encoder") if clip else None
    checkpoint = _assemble(
        layout.root, experts, text_encoder, tokenizer, vae, image_encoder, boundary=layout.boundary
    )
    choices = (file for files in layout.choices.values() for file in files)
    spare = (file for file in choices if file not in (*vae.files, *text_encoder.files))
    notes = (f"{file.name} in {where} is not used, because another file has its role" for file in spare)
    return replace(checkpoint, notes=tuple(notes))


def _choose_vae(layout: Layout, transformer: Component) -> Component:
    """Return the VAE of a folder; of several the first that fits the transformer."""
    first = find_component(layout.files["vae"], "vae")
    if is_compatible(first, transformer):
        return first
    others = (find_component([file], "vae") for file in layout.choices.get("vae", ())[1:])
    return next((part for part in others if is_compatible(part, transformer)), first)


def _from_files(files: SingleFiles, source: Location) -> Checkpoint:
    main = files.main
    if main is None:
        raise CheckpointError("no transformer is named", hint=NAME_FILES_HINT)
    config_json = {"num_heads": files.heads} if files.heads else {}
    named: tuple[tuple[Role, Path | None], ...] = (
        ("transformer", files.transformer),
        ("high_noise", files.high_noise),
        ("low_noise", files.low_noise),
    )
    recognized = [(role, path, recognize_file(path, config_json)) for role, path in named if path]
    experts = [(role, select(parts, "transformer", path)) for role, path, parts in recognized]
    for _, part in experts:
        require_usable(part)
    first_file = recognized[0][2]  # one file may hold all three networks
    text_encoder = _component_for(files.text_encoder, "text encoder", first_file)
    vae = _component_for(files.vae, "vae", first_file)
    image_encoder = _component_for(files.image_encoder, "image encoder", first_file)
    tokenizer = files.tokenizer
    if tokenizer is None and text_encoder:
        tokenizer = text_encoder.tokenizer_file
    missing = [
        *(["the low-noise expert (low_noise)"] if files.high_noise and not files.low_noise else []),
        *(["the high-noise expert (high_noise)"] if files.low_noise and not files.high_noise else []),
        *(["the text encoder (text_encoder)"] if text_encoder is None else []),
        *(["UMT5's SentencePiece model (tokenizer)"] if tokenizer is None else []),
        *(["the VAE (vae)"] if vae is None else []),
    ]
    if text_encoder is None or tokenizer is None or vae is None or missing:
        other = None if tokenizer else find_tokenizer_json(models_root(main))
        only = f"; {other.name} is there, which wancli does not read" if other else ""
        damage = find_damage(models_root(main))
        raise CheckpointError(
            f"missing beside it: {', '.join(missing)}{only}{damage}", where=str(main), hint=NAME_FILES_HINT
        )
    return _assemble(
        source if isinstance(source, Path) else main,
        experts,
        text_encoder,
        tokenizer,
        vae,
        image_encoder,
        source,
    )


def _component_for(path: Path | None, kind: Kind, first_file: Sequence[Component]) -> Component | None:
    """Return the component in the file named for it, else the one in a file that holds the whole
    checkpoint.
    """
    if path:
        return select(recognize_file(path), kind, path)
    return next((part for part in first_file if part.kind == kind), None)


def _assemble(
    root: Path,
    roles: Sequence[tuple[Role, Component]],
    text_encoder: Component,
    tokenizer: Path,
    vae: Component,
    image_encoder: Component | None,
    source: Location | None = None,
    boundary: float | None = None,
) -> Checkpoint:
    """Return the checkpoint. Raises CheckpointError if a component cannot be used or does not fit the
    others.
    """
    for part in (*(part for _, part in roles), text_encoder, vae):
        require_usable(part)
    experts, variant = resolve_experts(roles)
    if boundary is not None and boundary != variant.boundary:
        variant = replace(variant, boundary=boundary)
        experts = tuple(replace(part, variant=variant) for part in experts)
    require_compatible(vae, text_encoder, experts[0])
    clip = fit_image_encoder(image_encoder, experts[0])
    source = source or root
    return Checkpoint(root, variant, experts, text_encoder, tokenizer, vae, source, image_encoder=clip)
