"""A checkpoint as one frozen value: a folder, a single file, or files named one by one.

Found from names, config.json and headers alone: no torch, no data. `folder_layouts` finds the files,
`recognize` says what each holds; this module checks that they fit together.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from wancli.errors import CheckpointError
from wancli.models.config import CLIPConfig, Expert, T5Config, VAE22Config, VAEConfig, WanConfig
from wancli.models.variants import T2V_14B, T2V_A14B, TWO_EXPERTS, Variant
from wancli.storage import disk, links
from wancli.storage.file_memo import file_identity, read_memo, write_memo
from wancli.weights.component import Component, Kind
from wancli.weights.folder_layouts import (
    CLIP_NAMES,
    EXPERT_ROLES,
    Layout,
    Role,
    find_remains,
    find_tokenizer_json,
    load_json,
    models_root,
)
from wancli.weights.formats.infer_config import mismatch_error, wrong_model_error
from wancli.weights.formats.safetensors_header import DOWNLOAD_AGAIN
from wancli.weights.recognize import normalize_config, variants_with_pictures
from wancli.weights.single_files import (
    NAME_FILES_HINT,
    SingleFiles,
    find_component,
    find_damage,
    find_in_folder,
    find_layout,
    find_siblings,
    is_compatible,
    recognize_file,
    select,
)

Location: TypeAlias = Path | SingleFiles

SPIECE_HINT = "download google/umt5-xxl/spiece.model, which every repository of Wan-AI has"
LOGGED_SIZE = 2**30  # bytes; hashing more takes long enough to say so
_DIGEST = re.compile("[0-9a-f]{64}")
LOG = logging.getLogger("wancli")  # to stderr, unless the command line turns it off


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
    another kind of model, or if the disk does not give a file.
    """
    if isinstance(source, SingleFiles):
        found = _from_files(source, source)
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

    Raises CheckpointError for another name; the hint lists those that may be given.
    """
    sizes = dict(checkpoint.experts[0].sizes)
    with_pictures = sizes["in_dim"] != sizes["out_dim"]
    candidates = variants_with_pictures(sizes) if with_pictures else (checkpoint.variant,)
    chosen = next((variant for variant in candidates if variant.name.lower() == name.lower()), None)
    if chosen is None:
        names = " or ".join(variant.name for variant in candidates)
        raise CheckpointError(
            f"its tensors are not those of {name!r}", where=str(checkpoint.root), hint=f"say {names}"
        )
    if checkpoint.variant.boundary is not None:
        chosen = replace(chosen, boundary=checkpoint.variant.boundary)
    reason = "the job says so"
    experts = tuple(
        replace(part, name=chosen.name, variant=chosen, variant_reason=reason) for part in checkpoint.experts
    )
    return replace(checkpoint, variant=chosen, experts=experts)


@disk.reading_weights()
def fingerprint(paths: Sequence[Path], memo: Path) -> str:
    """Return the SHA-256, as hex, of the whole content of the files: of one file its plain digest, of several
    the digest of their digests in this order.

    The JSON file `memo` remembers digests for as long as a file keeps its path, size, inode and times. A
    damaged or missing memo is written again. A warning is logged before a file above 1 GiB is read.

    Raises CheckpointError for a blob of the Hugging Face cache whose digest is not its name, or if the disk
    does not give a file.
    """
    remembered = {key: digest for key, digest in read_memo(memo).items() if _DIGEST.fullmatch(str(digest))}
    identities = {_file_identity(path): path for path in paths}
    digests = {key: remembered.get(key) or _sha256(path) for key, path in identities.items()}
    for key, path in identities.items():
        check_blob(path, digests[key])
    # A file that changed while it was read gets a new identity, and its digest no entry.
    fresh = {key: digest for key, digest in digests.items() if key == _file_identity(identities[key])}
    if not fresh.items() <= remembered.items():
        write_memo(memo, remembered | fresh)
    if len(paths) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256("".join(digests.values()).encode()).hexdigest()


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
        _require_usable(part)
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
        _require_usable(part)
    experts, variant = _resolve_experts(roles)
    if boundary is not None and boundary != variant.boundary:
        variant = replace(variant, boundary=boundary)
        experts = tuple(replace(part, variant=variant) for part in experts)
    transformer = dict(experts[0].sizes)
    if not is_compatible(vae, experts[0]):
        has, makes = dict(vae.sizes)["z_dim"], transformer["out_dim"]
        raise CheckpointError(
            f"a VAE of {has} latent channels; the transformer makes {makes}",
            where=str(vae.files[0]),
            hint="TI2V-5B goes with Wan2.2_VAE, all other models with Wan2.1_VAE",
        )
    if not is_compatible(text_encoder, experts[0]):
        has, reads = dict(text_encoder.sizes)["d_model"], transformer["text_dim"]
        raise CheckpointError(
            f"a text encoder of width {has}; the transformer reads {reads}",
            where=str(text_encoder.files[0]),
            hint="the parts are from different models",
        )
    clip = _fit_image_encoder(image_encoder, experts[0])
    source = source or root
    return Checkpoint(root, variant, experts, text_encoder, tokenizer, vae, source, image_encoder=clip)


def _fit_image_encoder(part: Component | None, transformer: Component) -> Component | None:
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
    _require_usable(part)
    if not is_compatible(part, transformer):
        raise CheckpointError(
            f"an image encoder of width {dict(part.sizes)['dim']}; the transformer reads {reads}",
            where=str(part.files[0]),
            hint="the parts are from different models",
        )
    return part


def _require_usable(part: Component) -> None:
    if part.refusal:
        raise CheckpointError(part.refusal, where=str(part.files[0]), hint=part.hint)
    if part.mismatches:
        raise mismatch_error(part.mismatches, str(part.files[0]))


def _resolve_experts(roles: Sequence[tuple[Role, Component]]) -> tuple[tuple[Component, ...], Variant]:
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


def check_blob(path: Path, digest: str) -> None:
    """Raise CheckpointError for a blob of the Hugging Face cache, named by a digest that is not its own."""
    for name in links.list_names(path):
        if name.parent.name == "blobs" and _DIGEST.fullmatch(name.name) and name.name != digest:
            raise CheckpointError(
                f"damaged: the SHA-256 of its content is {digest[:12]}..., and its blob is named "
                f"{name.name[:12]}...",
                where=str(path),
                hint=f"delete {name}, and download the file again",
            )


def _file_identity(path: Path) -> str:
    """Return a text that changes whenever the file behind the path may have changed."""
    if identity := file_identity(path):
        return identity
    raise CheckpointError("no such file", where=str(path), hint=DOWNLOAD_AGAIN)


def _sha256(path: Path) -> str:
    if (size := disk.size(path)) >= LOGGED_SIZE:
        LOG.warning("wancli: hashing %s, %.1f GB; this is done once", path.name, size / 1e9)
    return disk.sha256(path)
