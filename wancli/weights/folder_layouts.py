"""Finds which file of a folder is which component of a checkpoint, from names and small JSON files only.

Official                                        diffusers
  diffusion_pytorch_model*.safetensors            model_index.json
  config.json                                     transformer/   config.json, *.safetensors
  models_t5_umt5-xxl-enc-bf16.pth                 transformer_2/ the low-noise expert of A14B
  google/umt5-xxl/spiece.model                    text_encoder/  model*.safetensors
  Wan2.1_VAE.pth or Wan2.2_VAE.pth                tokenizer/     spiece.model
A14B has high_noise_model/ and low_noise_model/   vae/           diffusion_pytorch_model.safetensors
in place of the first two. Wan 2.1 I2V and FLF2V also have
models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth and image_encoder/model.safetensors.

Single files, as ComfyUI keeps them: diffusion_models/, text_encoders/, clip_vision/, vae/, or all in one
folder.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from wancli.errors import CheckpointError
from wancli.storage import disk
from wancli.weights.formats import safetensors_header
from wancli.weights.formats.safetensors_header import DOWNLOAD_AGAIN
from wancli.weights.formats.tensor_index import SHARD, SUFFIXES, expand_shards

Role: TypeAlias = Literal[
    "transformer", "high_noise", "low_noise", "text_encoder", "tokenizer", "vae", "image_encoder"
]

EXPERT_ROLES: tuple[Role, ...] = ("transformer", "high_noise", "low_noise")
DIT = "diffusion_pytorch_model"
PIPELINES = {"WanPipeline", "WanImageToVideoPipeline"}
T5_NAMES = tuple(
    f"models_t5_umt5-xxl-enc-{precision}{suffix}"
    for precision in ("bf16", "fp8")
    for suffix in (".safetensors", ".pth")
)
VAE_NAMES = tuple(
    f"Wan{version}_VAE{suffix}" for version in ("2.1", "2.2") for suffix in (".safetensors", ".pth")
)
CLIP_NAME = "models_clip_open-clip-xlm-roberta-large-vit-huge-14"
CLIP_NAMES = tuple(f"{CLIP_NAME}{ending}" for ending in (".safetensors", ".pth"))
TOKENIZER_PATH = "google/umt5-xxl/spiece.model"
# Where UMT5's SentencePiece model lies beside single files.
SPIECE_PLACES = ("spiece.model", TOKENIZER_PATH, "tokenizer/spiece.model", "text_encoders/spiece.model")
OFFICIAL_MARKERS = ("high_noise_model", "low_noise_model", "config.json", "google", *T5_NAMES, *VAE_NAMES)
PART_SUFFIXES = (*SUFFIXES, ".model")  # of the parts of a checkpoint
# What browsers and other programs put behind the name of a file while they download it.
UNFINISHED = (".part", ".incomplete", ".crdownload", ".download", ".partial", ".!qB", ".tmp")
# ComfyUI's folders of single files.
TRANSFORMERS, ENCODERS, VAES, IMAGE_ENCODERS = (
    ("diffusion_models", "unet", "checkpoints"),
    ("text_encoders", "clip"),
    ("vae",),
    ("clip_vision",),
)


@dataclass
class Layout:
    """The files found in a folder, by role. `missing` names the files that were not found, relative to
    `root`.
    """

    name: Literal["official", "diffusers", "single files"]
    root: Path
    files: dict[Role, tuple[Path, ...]] = field(default_factory=dict)
    configs: dict[Role, Path] = field(default_factory=dict)
    missing: dict[Role, str] = field(default_factory=dict)
    choices: dict[Role, tuple[Path, ...]] = field(default_factory=dict)  # all files that could have a role
    pipeline: str = ""  # the class that a diffusers folder asks for, if wancli does not render it
    boundary: float | None = None  # the pipeline's own border between the two experts

    def add(self, role: Role, files: tuple[Path, ...] | None, name: str) -> None:
        """Add the files of a component, or the name of the missing file."""
        if files is None:
            self.missing[role] = name
        else:
            self.files[role] = files


def detect_layout(root: Path) -> Layout:
    """Return the layout of a folder. Raises CheckpointError if it is not a folder, or an index in it is
    damaged.
    """
    if not disk.is_folder(root):
        raise CheckpointError(
            "no such folder", where=str(root), hint="give the folder that holds the weights"
        )
    if disk.is_file(root / "model_index.json"):
        return _find_diffusers(root)
    names = [path.name for path in disk.list_folder(root)]
    if any(disk.exists(root / sign) for sign in OFFICIAL_MARKERS) or fnmatch.filter(
        names, f"{DIT}*.safetensors*"
    ):
        return _find_official(root)
    return Layout("single files", root)


def list_weight_files(root: Path) -> tuple[Path, ...]:
    """List the weight files in a folder and in the folders that ComfyUI keeps below it or below its `models`;
    one file of each set of shards. Hidden files, as `._NAME` of macOS, are none.
    """
    below = (*TRANSFORMERS, *ENCODERS, *VAES, *IMAGE_ENCODERS, "loras")
    folders = [
        root,
        *(base / name for base in (root, root / "split_files", root / "models") for name in below),
    ]
    paths = [
        path
        for folder in folders
        for path in disk.list_folder(folder)
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and disk.is_file(path)
    ]
    return tuple(path for path in paths if not (m := SHARD.fullmatch(path.name)) or int(m["number"]) == 1)


def models_root(path: Path) -> Path:
    """Return the folder that holds the other components of a single file: above diffusion_models/, else its
    own.
    """
    for folder in list(path.parents)[:3]:
        if folder.name in TRANSFORMERS:
            return folder.parent
    return path.parent


def find_remains(root: Path) -> str:
    """Say which weights of a folder, and of the folders in it, are downloads that have not ended or links to
    nothing; empty if there is none. For messages about a missing file.
    """
    remains = ""
    for folder in (root, *(path for path in disk.list_folder(root) if disk.is_folder(path))):
        for path in disk.list_folder(folder):
            if path.suffix in UNFINISHED and path.stem.endswith(PART_SUFFIXES):
                remains += f"; {path.name} is there, a download that has not ended"
            elif path.name.endswith(PART_SUFFIXES) and not disk.exists(path):
                remains += f"; {path.name} is there, a link to nothing"
    return remains


def find_tokenizer_json(root: Path) -> Path | None:
    """Return the file of the library tokenizers in the place of the SentencePiece model, if there is one."""
    places = ((root / name).with_name("tokenizer.json") for name in SPIECE_PLACES)
    return next((path for path in places if disk.is_file(path)), None)


def find_tokenizer(root: Path) -> Path | None:
    """Return UMT5's SentencePiece model beside single files, if there is one."""
    return next((root / name for name in SPIECE_PLACES if disk.is_file(root / name)), None)


def network_files(path: Path) -> tuple[Path, ...]:
    """Return the files of one network: the file or shards of a folder that holds one network; for a file,
    itself or its set of shards.
    """
    if not disk.is_folder(path):
        return expand_shards(path)
    for stem in (DIT, "model"):
        if files := find_safetensors(path, stem):
            return files
    raise CheckpointError(f"{DIT}.safetensors is missing", where=str(path), hint=DOWNLOAD_AGAIN)


def find_safetensors(folder: Path, stem: str) -> tuple[Path, ...] | None:
    """Return one file, or the shards that its index lists or that its name counts; None if there is neither.

    Raises CheckpointError for a file beside shards, for several sets of shards, for a damaged index or shard,
    and for a shard that lacks a tensor of the index.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    pattern = f"{stem}-?????-of-?????.safetensors"
    shards = [path for path in disk.list_folder(folder) if fnmatch.fnmatchcase(path.name, pattern)]
    if disk.is_file(single):
        if shards:
            raise CheckpointError(
                f"holds {single.name} and also {shards[0].name}; which one is meant?",
                where=str(folder),
                hint="move one of the two elsewhere, with the index of the shards",
            )
        return (single,)
    if not disk.is_file(index):
        if not shards and (variant := _find_variant(folder, stem)):
            return find_safetensors(folder, variant)
        sets = {expand_shards(shard) for shard in shards}
        if len(sets) > 1:
            names = " and ".join(sorted(files[0].name for files in sets))
            raise CheckpointError(
                f"holds several sets of shards: {names}", where=str(folder), hint="move one of them elsewhere"
            )
        return next(iter(sets), None)
    weight_map = load_json(index).get("weight_map")
    plain = re.compile(r"[\w.-]+\.safetensors")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(plain.fullmatch(str(s)) for s in weight_map.values())
    ):
        raise CheckpointError("no index of shards in this folder", where=str(index), hint=DOWNLOAD_AGAIN)
    headers = {
        name: safetensors_header.read_tensors(folder / name) for name in sorted(set(weight_map.values()))
    }
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise CheckpointError(f"{name} is not in {shard}", where=str(index), hint=DOWNLOAD_AGAIN)
    return tuple(folder / name for name in headers)


def _find_variant(folder: Path, stem: str) -> str | None:
    """Return the stem of the files in the one precision that diffusers saved, as `STEM.fp16`. Raises
    CheckpointError for several.
    """
    name = re.compile(rf"({re.escape(stem)}\.\w+)(-\d{{5}}-of-\d{{5}})?\.safetensors")
    matches = [name.fullmatch(path.name) for path in disk.list_folder(folder)]
    stems = sorted({match[1] for match in matches if match})
    if len(stems) > 1:
        raise CheckpointError(
            f"holds several variants: {' and '.join(stems)}",
            where=str(folder),
            hint="move all but one elsewhere",
        )
    return stems[0] if stems else None


def load_json(path: Path) -> dict[str, object]:
    """Load a JSON object. Raises CheckpointError."""
    try:
        with disk.reading_weights():
            document = json.loads(disk.read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError("not valid JSON", where=str(path), hint=DOWNLOAD_AGAIN) from error
    if not isinstance(document, dict):
        raise CheckpointError("not a JSON object", where=str(path), hint=DOWNLOAD_AGAIN)
    return document


def _find_official(root: Path) -> Layout:
    layout = Layout("official", root)
    experts: Mapping[Role, Path] = {"transformer": root}
    if disk.is_folder(root / "high_noise_model") or disk.is_folder(root / "low_noise_model"):
        experts = {"high_noise": root / "high_noise_model", "low_noise": root / "low_noise_model"}
    _add_experts(layout, experts)
    encoders, vaes = (
        tuple(root / name for name in names if disk.is_file(root / name)) for names in (T5_NAMES, VAE_NAMES)
    )
    layout.choices = {"text_encoder": encoders, "vae": vaes}
    layout.add("text_encoder", encoders[:1] or None, "models_t5_umt5-xxl-enc-bf16.pth")
    _add_tokenizer(layout, TOKENIZER_PATH, "spiece.model")
    layout.add("vae", vaes[:1] or None, "Wan2.1_VAE.pth or Wan2.2_VAE.pth")
    _add_image_encoder(layout, _find_first(root, *CLIP_NAMES))
    return layout


def _find_diffusers(root: Path) -> Layout:
    layout = Layout("diffusers", root)
    index = load_json(root / "model_index.json")
    if (pipeline := str(index.get("_class_name") or "nameless pipeline")) not in PIPELINES:
        layout.pipeline = pipeline
    experts: Mapping[Role, Path] = {"transformer": root / "transformer"}
    if index.get("transformer_2") not in (None, [None, None]):
        experts = {"high_noise": root / "transformer", "low_noise": root / "transformer_2"}
        layout.boundary = _read_boundary(index, root / "model_index.json")
    _add_experts(layout, experts)
    layout.add(
        "text_encoder", find_safetensors(root / "text_encoder", "model"), "text_encoder/model.safetensors"
    )
    _add_tokenizer(layout, "tokenizer/spiece.model")
    layout.add("vae", find_safetensors(root / "vae", DIT), f"vae/{DIT}.safetensors")
    _add_image_encoder(layout, find_safetensors(root / "image_encoder", "model"))
    return layout


def _add_experts(layout: Layout, folders: Mapping[Role, Path]) -> None:
    for role, folder in folders.items():
        name = (folder / f"{DIT}.safetensors").relative_to(layout.root).as_posix()
        expert = {"high_noise": "high-noise", "low_noise": "low-noise"}.get(role)
        layout.add(
            role,
            find_safetensors(folder, DIT),
            f"{name} (the {expert} expert of Wan 2.2 A14B)" if expert else name,
        )
        if disk.is_file(folder / "config.json"):
            layout.configs[role] = folder / "config.json"


def _add_tokenizer(layout: Layout, *names: str) -> None:
    """Add the SentencePiece model. If transformers saved only its own tokenizer.json, say where to get it."""
    found = _find_first(layout.root, *names)
    json_name = f"{names[0].rpartition('/')[0]}/tokenizer.json"
    name = names[0]
    if disk.is_file(layout.root / json_name):
        name += f" (only {json_name} is there, which wancli does not read)"
    layout.add("tokenizer", found, name)


def _read_boundary(index: Mapping[str, object], path: Path) -> float | None:
    """Return the boundary_ratio of a pipeline of two experts; None if it says none."""
    ratio = index.get("boundary_ratio")
    if ratio is None:
        return None
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise CheckpointError(
            f"boundary_ratio is {ratio!r}, and it is a number between 0 and 1",
            where=str(path),
            hint="Wan2.2-T2V-A14B has 0.875",
        )
    return float(ratio)


def _add_image_encoder(layout: Layout, files: tuple[Path, ...] | None) -> None:
    """Add the image encoder, if there is one. Only the transformer can tell whether it is missing."""
    if files:
        layout.files["image_encoder"] = files


def _find_first(root: Path, *choices: str) -> tuple[Path, ...] | None:
    return next(((root / choice,) for choice in choices if disk.is_file(root / choice)), None)
