"""Which files of a repository a render reads, from their names alone.

A repository may hold the same network in several precisions, containers and frameworks. These functions
choose what `wancli.weights.folder_layouts` would take, and nothing else.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from wancli.errors import JobError
from wancli.units import list_some
from wancli.weights.folder_layouts import CLIP_NAMES, DIT, T5_NAMES, TOKENIZER_PATH, VAE_NAMES
from wancli.weights.formats.tensor_index import SHARD, SUFFIXES

LISTED = 12  # names in a message
# Of several precisions of one network, the one that is closest to what wancli computes in.
_PRECISIONS = ("", "bf16", "fp16", "fp32")
_EXPERT_WORDS = {"high": "low", "High": "Low", "HIGH": "LOW"}


def choose_files(files: Sequence[str], path: str = "") -> list[str]:
    """Return the files of a repository that a render reads, or those that a folder or file of it needs.

    Raises JobError if the path names nothing, or the repository holds several single files.
    """
    if path:
        if path in files:
            return _with_companions(files, path)
        below = [file.removeprefix(f"{path}/") for file in files if file.startswith(f"{path}/")]
        if below:
            return [f"{path}/{file}" for file in choose_files(below)]
        named = [file for file in files if PurePosixPath(file).name == path]
        if len(named) == 1:
            return _with_companions(files, named[0])
        raise _unknown_path_error(files, path)
    if "model_index.json" in files:
        return ["model_index.json", *_choose_diffusers(files)]
    if any(file in files for file in (*T5_NAMES, *VAE_NAMES)) or _choose_network(files, "", DIT):
        return [*_choose_official(files)]
    weights = list_weights(files)
    if len(weights) == 1:
        return weights
    raise _unknown_path_error(files, "")


def list_weights(files: Sequence[str]) -> list[str]:
    """List the files of weights; of a set of shards the first."""
    weights = [file for file in files if PurePosixPath(file).suffix.lower() in SUFFIXES]
    return [file for file in weights if not (m := SHARD.fullmatch(_base(file))) or int(m["number"]) == 1]


def _choose_official(files: Sequence[str]) -> Iterator[str]:
    experts = [folder for folder in ("high_noise_model/", "low_noise_model/") if _has(files, folder)]
    for folder in experts or [""]:
        yield from _choose_network(files, folder, DIT)
        yield from (f"{folder}{name}" for name in ("config.json",) if f"{folder}{name}" in files)
    for names in (T5_NAMES, VAE_NAMES, CLIP_NAMES, (TOKENIZER_PATH, "spiece.model")):
        yield from [name for name in names if name in files][:1]


def _choose_diffusers(files: Sequence[str]) -> Iterator[str]:
    for folder in ("transformer/", "transformer_2/"):
        yield from _choose_network(files, folder, DIT)
        yield from (name for name in (f"{folder}config.json",) if name in files)
    yield from _choose_network(files, "text_encoder/", "model")
    yield from (name for name in ("tokenizer/spiece.model",) if name in files)
    yield from _choose_network(files, "vae/", DIT)
    yield from _choose_network(files, "image_encoder/", "model")


def _choose_network(files: Sequence[str], folder: str, stem: str) -> list[str]:
    """Return the one file of a network, or its shards and their index; of several precisions the first."""
    for precision in _PRECISIONS:
        name = f"{folder}{stem}{f'.{precision}' if precision else ''}"
        if f"{name}.safetensors" in files:
            return [f"{name}.safetensors"]
        shards = fnmatch.filter(files, f"{name}-?????-of-?????.safetensors")
        if shards:
            index = f"{name}.safetensors.index.json"
            return [*([index] if index in files else []), *sorted(shards)]
    return []


def _with_companions(files: Sequence[str], file: str) -> list[str]:
    """Return a file, the other shards of its set, and the other expert if its name says which one it is."""
    chosen = [file]
    if match := SHARD.fullmatch(_base(file)):
        pattern = re.compile(re.escape(_base(file)).replace(match["number"], r"\d+", 1))
        folder = file.removesuffix(_base(file))
        chosen = sorted(f for f in files if f.startswith(folder) and pattern.fullmatch(_base(f)))
    for high, low in _EXPERT_WORDS.items():
        for word, other in ((high, low), (low, high)):
            partner = file.replace(word, other)
            if partner != file and partner in files and partner not in chosen:
                chosen.append(partner)
    return chosen


def _unknown_path_error(files: Sequence[str], path: str) -> JobError:
    weights = list_weights(files)
    names = list_some(weights, LISTED)
    if path:
        return JobError(f"the repository has no {path}", hint=f"It has {names or 'no weights'}.")
    if not weights:
        return JobError("the repository has no weights that wancli reads")
    hint = f"Write REPOSITORY:FILE with one of {names}."
    return JobError("the repository holds several models; which one is meant?", hint=hint)


def _has(files: Sequence[str], folder: str) -> bool:
    return any(file.startswith(folder) for file in files)


def _base(file: str) -> str:
    return PurePosixPath(file).name
