"""What a folder of weights is, from its names, config.json and headers alone: no torch, no data.

Official layout                                 diffusers layout
  diffusion_pytorch_model*.safetensors            model_index.json
  config.json                                     transformer/  config.json, *.safetensors
  models_t5_umt5-xxl-enc-bf16.pth                 text_encoder/ model*.safetensors
  google/umt5-xxl/spiece.model                    tokenizer/    spiece.model
  Wan2.1_VAE.pth                                  vae/          diffusion_pytorch_model.safetensors
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from wancli import files
from wancli.errors import CheckpointError, MachineError
from wancli.experts import Expert
from wancli.models.config import T5Config, VAE22Config, VAEConfig, WanConfig
from wancli.models.variants import BY_CHANNELS, MINI, MINI_DIM, TWO_EXPERTS, Variant
from wancli.weights.headers import DOWNLOAD_AGAIN, TensorInfo, header, headers
from wancli.weights.names import transformer_from_diffusers, umt5_to_transformers, vae_renaming
from wancli.weights.pickles import pickle_header
from wancli.weights.sizes import any_vae_config, other_model, t5_config, transformer_config

Naming: TypeAlias = Literal["official", "diffusers"]

FLOATS = {"F16", "BF16", "F32", "F64"}
CONFIG_FROM_DIFFUSERS = {
    "num_attention_heads": "num_heads",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
}
T2V_CLASSES = {"WanPipeline"}


@dataclass(frozen=True)
class Checkpoint:
    """A Wan text-to-video model on disk: every file is there, and the transformer's headers are sound.

    Of two experts `transformer_files` are those of the low-noise one.
    """

    root: Path
    variant: Variant
    transformer: WanConfig
    naming: Naming  # of the transformer's tensors
    transformer_files: tuple[Path, ...]
    text_encoder_files: tuple[Path, ...]
    text_encoder_naming: Literal["official", "transformers"]
    tokenizer: Path  # the SentencePiece model
    vae_files: tuple[Path, ...]
    vae_naming: Naming
    high_noise_files: tuple[Path, ...] = ()  # of the high-noise expert, where there are two

    def files_of(self, expert: Expert) -> tuple[Path, ...]:
        """The transformer, or one of the two."""
        return self.high_noise_files if expert == "high" else self.transformer_files


def identify(root: Path) -> Checkpoint:
    """The checkpoint in a folder, official or diffusers layout.

    Reads names and headers only. Raises CheckpointError, naming the file, if a part or a shard is
    missing or damaged, if config.json and tensors disagree, or if it is another kind of model.
    """
    if not root.is_dir():
        raise CheckpointError(
            "no such folder", where=str(root), hint="give the folder that holds the weights"
        )
    if (root / "model_index.json").is_file():
        return _diffusers(root)
    return _official(root)


def text_encoder_sizes(checkpoint: Checkpoint) -> T5Config:
    """The sizes of UMT5, from its headers alone. Raises CheckpointError."""
    rename = umt5_to_transformers if checkpoint.text_encoder_naming == "official" else str
    return t5_config(_shapes(checkpoint.text_encoder_files, rename), str(checkpoint.text_encoder_files[0]))


def vae_sizes(checkpoint: Checkpoint) -> VAEConfig | VAE22Config:
    """The sizes of the VAE, from its headers alone. Raises CheckpointError, also for another model's VAE."""
    shapes, where = _shapes(checkpoint.vae_files, str), str(checkpoint.vae_files[0])
    rename = vae_renaming(shapes)
    sizes = any_vae_config({rename(name): shape for name, shape in shapes.items()}, where)
    if sizes.z_dim != checkpoint.transformer.out_dim:
        raise CheckpointError(
            f"a VAE of {sizes.z_dim} latent channels; the transformer makes {checkpoint.transformer.out_dim}",
            where=where,
            hint="TI2V-5B goes with Wan2.2_VAE, all other models with Wan2.1_VAE",
        )
    return sizes


def _shapes(paths: Sequence[Path], rename: Callable[[str], str]) -> dict[str, tuple[int, ...]]:
    found = [pickle_header(path) if path.suffix == ".pth" else header(path) for path in paths]
    return {rename(name): info.shape for tensors in found for name, info in tensors.items()}


def fingerprint(paths: Sequence[Path], memo: Path) -> str:
    """SHA-256 of the files' whole content, as hex: of one file its plain digest, of several the digest
    of their digests in this order.

    Digests are remembered in the JSON file `memo` as long as a file keeps its path, size, inode and
    times; a memo that is damaged or missing is made anew.
    """
    known = _memo(memo)
    now = {_identity(path): path for path in paths}
    digests = {key: known.get(key) or _sha256(path) for key, path in now.items()}
    # A file that changed while it was read gets a new identity, and its digest no entry.
    fresh = {key: digest for key, digest in digests.items() if key == _identity(now[key])}
    if not fresh.items() <= known.items():
        with suppress(MachineError):  # the memo saves time, and is not worth failing for
            files.replace(memo, json.dumps(known | fresh, indent=1).encode())
    if len(paths) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256("".join(digests.values()).encode()).hexdigest()


def _official(root: Path) -> Checkpoint:
    high = root / "high_noise_model"
    folders = (root / "low_noise_model", high) if high.is_dir() else (root, None)
    variant, config, naming, transformer, high_noise = _transformers(*folders)
    text_encoder = _first(root, "models_t5_umt5-xxl-enc-bf16.safetensors", "models_t5_umt5-xxl-enc-bf16.pth")
    version = "2.2" if config.out_dim == 48 else "2.1"
    vae = _first(root, f"Wan{version}_VAE.safetensors", f"Wan{version}_VAE.pth")
    return Checkpoint(
        root=root,
        variant=variant,
        transformer=config,
        naming=naming,
        transformer_files=transformer,
        text_encoder_files=(text_encoder,),
        text_encoder_naming="official",
        tokenizer=_first(root, "google/umt5-xxl/spiece.model"),
        vae_files=(vae,),
        vae_naming="official",
        high_noise_files=high_noise,
    )


def _diffusers(root: Path) -> Checkpoint:
    index = _json(root / "model_index.json")
    if index.get("_class_name") not in T2V_CLASSES:
        raise other_model(f"{index.get('_class_name')}", str(root / "model_index.json"))
    first, second = root / "transformer", root / "transformer_2"  # the high-noise expert comes first
    two = index.get("transformer_2", [None, None]) != [None, None]
    variant, config, naming, transformer, high_noise = _transformers(
        *((second, first) if two else (first, None))
    )
    return Checkpoint(
        root=root,
        variant=variant,
        transformer=config,
        naming=naming,
        transformer_files=transformer,
        text_encoder_files=_safetensors(root / "text_encoder", "model"),
        text_encoder_naming="transformers",
        tokenizer=_first(root, "tokenizer/spiece.model"),
        vae_files=_safetensors(root / "vae", "diffusion_pytorch_model"),
        vae_naming="diffusers",
        high_noise_files=high_noise,
    )


def _transformers(
    low: Path, high: Path | None
) -> tuple[Variant, WanConfig, Naming, tuple[Path, ...], tuple[Path, ...]]:
    """The transformer in the folder `low`; in `high` the high-noise expert, if the model has one."""
    files = _safetensors(low, "diffusion_pytorch_model")
    config, naming = _transformer(files, low / "config.json")
    if high is None:
        variant = MINI if config.dim == MINI_DIM else BY_CHANNELS[config.out_dim]
        return variant, config, naming, files, ()
    high_noise = _safetensors(high, "diffusion_pytorch_model")
    if _transformer(high_noise, high / "config.json") != (config, naming):
        raise CheckpointError(f"another size or naming than {low.name}", where=str(high), hint=DOWNLOAD_AGAIN)
    return TWO_EXPERTS, config, naming, files, high_noise


def _transformer(paths: tuple[Path, ...], config_path: Path) -> tuple[WanConfig, Naming]:
    """Sizes and naming of the transformer; `config_path` may be missing."""
    found = headers(paths)
    where = str(paths[0])
    if foreign := sorted(name for name, info in found.items() if info.dtype not in FLOATS):
        raise CheckpointError(
            f"{foreign[0]} is stored as {found[foreign[0]].dtype}; wancli loads fp32, fp16 and bf16 weights",
            where=where,
            hint="use the bf16 or fp32 version of this checkpoint",
        )
    naming: Naming = "diffusers" if "condition_embedder.time_proj.weight" in found else "official"
    rename = transformer_from_diffusers if naming == "diffusers" else str
    shapes = {rename(name): info.shape for name, info in found.items()}
    said = _json(config_path) if config_path.is_file() else {}
    said = {CONFIG_FROM_DIFFUSERS.get(key, key): value for key, value in said.items()}
    return transformer_config(shapes, said, where), naming


def _safetensors(folder: Path, stem: str) -> tuple[Path, ...]:
    """One file, or the shards that its index lists, each holding the tensors the index puts there."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return (single,)
    if not index.is_file():
        raise CheckpointError(f"{single.name} is missing", where=str(folder), hint=DOWNLOAD_AGAIN)
    weight_map = _json(index).get("weight_map")
    plain = re.compile(r"[\w.-]+\.safetensors")
    if not isinstance(weight_map, dict) or not all(plain.fullmatch(str(s)) for s in weight_map.values()):
        raise CheckpointError("no index of shards in this folder", where=str(index), hint=DOWNLOAD_AGAIN)
    shards = {name: header(folder / name) for name in sorted(set(weight_map.values()))}
    _check_index(index, weight_map, shards)
    return tuple(folder / name for name in shards)


def _check_index(index: Path, weight_map: dict[str, str], shards: dict[str, dict[str, TensorInfo]]) -> None:
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(f"{name} is not in {shard}", where=str(index), hint=DOWNLOAD_AGAIN)


def _first(root: Path, *choices: str) -> Path:
    for choice in choices:
        if (root / choice).is_file():
            return root / choice
    raise CheckpointError(f"{' or '.join(choices)} is missing", where=str(root), hint=DOWNLOAD_AGAIN)


def _json(path: Path) -> dict[str, object]:
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError("not valid JSON", where=str(path), hint=DOWNLOAD_AGAIN) from error
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error
    if not isinstance(document, dict):
        raise CheckpointError("not a JSON object", where=str(path), hint=DOWNLOAD_AGAIN)
    return document


def _memo(path: Path) -> dict[str, str]:
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: value for key, value in known.items() if re.fullmatch("[0-9a-f]{64}", str(value))}


def _identity(path: Path) -> str:
    """Changes whenever the file behind the path may have changed."""
    real = path.resolve()
    stat = real.stat()
    return f"{real}|{stat.st_dev}|{stat.st_ino}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}"


def _sha256(path: Path) -> str:
    try:
        return files.sha256(path)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from None
