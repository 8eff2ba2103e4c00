"""Lists the tensors of a weight file in any container: names, dtypes and shapes, no data, no torch.

The first bytes identify the container: safetensors, a .pth that torch.save wrote, or GGUF. The shards of one
network make one TensorIndex.
"""

from __future__ import annotations

import codecs
import os
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from wancli.errors import CheckpointError
from wancli.storage import disk, links
from wancli.weights.formats import safetensors_header
from wancli.weights.formats.key_mapping import COMPILED, is_tokenizer, plain_name
from wancli.weights.formats.pickle_header import read_pickle_header
from wancli.weights.formats.safetensors_header import DOWNLOAD_AGAIN, Header, TensorInfo, open_weights

Container: TypeAlias = Literal["safetensors", "pth", "gguf"]

# Prefixes of the other networks in a whole checkpoint.
OTHER_NETWORKS = ("vae.", "first_stage_model.", "text_encoders.", "cond_stage_model.")
SUFFIXES = (".safetensors", ".gguf", ".pth", ".pt", ".ckpt", ".bin")
# A damaged file is identified by its suffix, so that the reader of that format reports the damage.
BY_SUFFIX: dict[str, Container] = {
    ".gguf": "gguf",
    ".pth": "pth",
    ".pt": "pth",
    ".safetensors": "safetensors",
}
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
MAGICS = (b"GGUF", b"PK\x03\x04")  # first bytes of a GGUF file, and of a .pth that torch.save wrote
# What download programs keep beside a file of full size until all of it has arrived.
CONTROL_FILES = {".aria2": "aria2", ".st": "axel", ".lftp-pget-status": "lftp"}
FIRST_BYTES = 64  # no header of weights is text that far
PRINTABLE = frozenset(string.printable.encode())
# First bytes, in lower case -> a description of a file that is not weights, and a hint.
NOT_WEIGHT_FILES = {
    b"version https://git-lfs": ("a Git LFS pointer, not the weights", "run `git lfs pull` in its folder"),
    b"<!doctype": ("a web page, not the weights", DOWNLOAD_AGAIN),
    b"<html": ("a web page, not the weights", DOWNLOAD_AGAIN),
    b"\x80\x02": (
        "a bare pickle of old PyTorch, which wancli does not open",
        "save the weights as .safetensors where you trust them",
    ),
}


@dataclass(frozen=True, eq=False)
class TensorIndex:
    """The tensors of one file or of all its shards, in the order of their headers."""

    files: tuple[Path, ...]
    container: Container
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]  # of a safetensors header; of GGUF the texts, and the keys of all else
    sources: dict[str, tuple[Header, str]]  # of safetensors: the header of a tensor, and its name there
    owners: dict[str, Path]  # the file that holds a tensor
    compiled: bool  # whether torch.compile wrapped the network, or blocks of it, when it was saved

    def read_bytes(self, name: str) -> bytes:
        """Read the bytes of a tensor; empty for containers other than safetensors."""
        header, stored_name = self.sources.get(name, (None, ""))
        return header.read_bytes(stored_name) if header else b""

    def find_tokenizer(self) -> Path | None:
        """Return the file that holds a SentencePiece model, wherever in it; None if no file does."""
        if "tokenizer.ggml.tokens" in self.metadata:
            return self.files[0]  # where llama.cpp leaves the key-values when it splits a file
        name = next(filter(is_tokenizer, self.tensors), None)
        return self.owners[name] if name else None


def read_index(paths: Sequence[Path]) -> TensorIndex:
    """Read the headers of one file, or of all shards of one network.

    Raises CheckpointError if a file does not hold weights, is damaged, or repeats a name.
    """
    all_tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    sources: dict[str, tuple[Header, str]] = {}
    owners: dict[str, Path] = {}
    compiled = False
    kind: Container = "safetensors"
    for path in paths:
        kind = detect_container(path)
        tensors: dict[str, TensorInfo]
        if kind == "safetensors":
            header = safetensors_header.read_header(path)
            tensors, metadata = header.tensors, metadata | header.metadata
            sources |= {plain_name(name): (header, name) for name in tensors}
        elif kind == "pth":
            tensors = read_pickle_header(path)
        else:
            from wancli.weights.formats import gguf_header

            gguf = gguf_header.read_header(path)
            tensors = dict(gguf.tensors)
            metadata |= {key: v if isinstance(v, str) else "" for key, v in gguf.values.items()}
        compiled |= any(f"{COMPILED}." in name for name in tensors)
        tensors = {plain_name(name): info for name, info in tensors.items()}
        if twice := sorted(all_tensors.keys() & tensors.keys()):
            raise CheckpointError(f"{twice[0]} is in another shard too", where=str(path), hint=DOWNLOAD_AGAIN)
        all_tensors |= tensors
        owners |= dict.fromkeys(tensors, path)
    return TensorIndex(tuple(paths), kind, all_tensors, metadata, sources, owners, compiled)


def detect_container(path: Path) -> Container:
    """Detect the container of a file by its first bytes.

    Raises CheckpointError if it does not hold weights, and for a download that has not ended.
    """
    check_complete(path)
    with open_weights(path) as file:
        first, size = file.read(FIRST_BYTES), os.fstat(file.fileno()).st_size
    refuse_text(path, first)
    if first.startswith(b"GGUF"):
        return "gguf"
    if first.startswith(b"PK\x03\x04"):
        return "pth"
    if begins_safetensors(first, size):
        return "safetensors"
    suffixes = (name.suffix.lower() for name in links.list_names(path))
    return next((BY_SUFFIX[suffix] for suffix in suffixes if suffix in BY_SUFFIX), "safetensors")


def refuse_text(path: Path, first: bytes) -> None:
    """Raise CheckpointError for a file that begins like what a server sends in place of a file of weights."""
    text = first.removeprefix(codecs.BOM_UTF8).lstrip()
    for magic, (what, hint) in NOT_WEIGHT_FILES.items():
        if text.lower().startswith(magic):
            raise CheckpointError(f"this is {what}", where=str(path), hint=hint)
    if text and all(byte in PRINTABLE for byte in text):
        line = text.decode("ascii").splitlines()[0]
        raise CheckpointError(
            f"this is a text, not the weights: it begins with {line!r}", where=str(path), hint=DOWNLOAD_AGAIN
        )


@disk.reading_weights()
def check_complete(path: Path) -> None:
    """Raise CheckpointError for a download that has not ended: its size may be right already."""
    for name in links.list_names(path):
        for suffix, program in CONTROL_FILES.items():
            control = name.with_name(name.name + suffix)
            if disk.is_file(control):
                raise CheckpointError(
                    f"{program} has not finished this download: {control.name} is beside it",
                    where=str(path),
                    hint=f"let {program} finish it, or delete {control.name} if the file is whole",
                )


def begins_safetensors(first: bytes, size: int) -> bool:
    """Return whether a file of this size that begins so is a safetensors file."""
    return first[8:9] == b"{" and int.from_bytes(first[:8], "little") <= size - 8


def is_safetensors(path: Path) -> bool:
    """Return whether a file is a safetensors file, by its first bytes, or else its names."""
    return looks_like_weights(path) and detect_container(path) == "safetensors"


def looks_like_weights(path: Path) -> bool:
    """Return whether a file looks like weights, by a name of it or its first bytes."""
    if any(name.suffix.lower() in SUFFIXES for name in links.list_names(path)):
        return True
    try:
        with open_weights(path) as file:
            first = file.read(9)
    except CheckpointError:
        return False
    return first.startswith(MAGICS) or first[8:] == b"{"


def expand_shards(path: Path) -> tuple[Path, ...]:
    """Return the file, or all shards of its set. A missing shard shows only when it is opened.

    GGUF and safetensors sets are named NAME-00001-of-00006, by links or by the files.
    """
    named = ((name, SHARD.fullmatch(name.name)) for name in links.list_names(path))
    name, match = next(((name, match) for name, match in named if match), (path, None))
    if match is None:
        return (path,)
    count = int(match["count"])
    return tuple(
        name.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}{match['suffix']}")
        for number in range(1, count + 1)
    )
