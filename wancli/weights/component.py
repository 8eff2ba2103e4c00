"""A Component: one network in one file, or in all its shards, as its headers describe it.

A Component is data, made by `wancli.weights.recognize`. When it is loaded, `map_key` turns a name in the file
into the network's own (official; for the text encoder that of transformers).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from wancli.errors import CheckpointError
from wancli.models.config import CLIPConfig, Expert, T5Config, VAE22Config, VAEConfig, WanConfig
from wancli.models.variants import Variant
from wancli.storage import links
from wancli.weights.formats.gguf_header import umt5_to_transformers as umt5_from_gguf
from wancli.weights.formats.key_mapping import (
    clip_from_transformers,
    is_tokenizer,
    plain_name,
    transformer_from_diffusers,
    umt5_to_transformers,
    vae22_from_diffusers,
    vae_from_diffusers,
)
from wancli.weights.formats.quant_schemes import PLAIN, Precision, Scheme, is_helper
from wancli.weights.formats.tensor_index import OTHER_NETWORKS, Container
from wancli.weights.lora.describe import LoraInfo

Kind: TypeAlias = Literal["transformer", "text encoder", "image encoder", "vae", "lora", "other"]
Naming: TypeAlias = Literal["official", "diffusers", "transformers", "gguf"]

_RENAME: dict[tuple[Kind, Naming], Callable[[str], str]] = {
    ("transformer", "diffusers"): transformer_from_diffusers,
    ("vae", "diffusers"): vae_from_diffusers,
    ("text encoder", "official"): umt5_to_transformers,
    ("text encoder", "gguf"): umt5_from_gguf,
    ("image encoder", "transformers"): clip_from_transformers,
}
# Pattern of a name -> the class of tensor whose precision is reported; the first match counts.
_GROUPS: dict[Kind, dict[str, str]] = {
    "transformer": {
        r"blocks\.\d+\.(self_attn|cross_attn)\.(q|k|v|o|k_img|v_img)\.weight|blocks\.\d+\.ffn\.\d\.weight": (
            "block matrices"
        ),
        r".*blocks\.\d+\..*": "block biases, norms",
        r".*": "embeddings, head",
    },
    "text encoder": {
        r"(shared|encoder\.embed_tokens)\..*": "token embedding",
        r".*(SelfAttention\.[qkvo]|DenseReluDense\.w\w+)\.weight": "block matrices",
        r".*": "norms, position bias",
    },
    "image encoder": {
        r"transformer\.\d+\.(attn\.(to_\w+|proj)|mlp\.\d)\.weight": "block matrices",
        r".*": "embeddings, norms, biases",
    },
    "vae": {r".*\.weight": "convolutions", r".*": "biases, norms"},
}
_TWO_FILES = re.compile(r"(?i)(high|low)[-_. ]?noise")
_ONE_WORD = re.compile(r"(?<![A-Za-z])(HIGH|LOW)(?![A-Za-z])")
_A14B_WORD = re.compile(r"(?i)(?<![a-z])(high|low)(?![a-z])")


@dataclass(frozen=True)
class Component:
    """One network. If wancli cannot use it, `refusal` says why and `hint` what to use instead; else both are
    empty.

    `config` is None if the sizes are not enough to build the network. `missing` are tensors that some block
    lacks and other blocks have. `mismatches` are all differences from a network of these sizes; for a VAE
    they show when it is built.
    """

    kind: Kind
    name: str
    files: tuple[Path, ...]
    container: Container
    naming: Naming = "official"
    prefix: str = ""  # before every name in the file
    scheme: Scheme = PLAIN
    config: WanConfig | T5Config | CLIPConfig | VAEConfig | VAE22Config | None = None
    sizes: tuple[tuple[str, int], ...] = ()
    variant: Variant | None = None
    variant_reason: str = ""  # what tells the variant from others of the same shapes, if there are any
    expert: Expert | None = None  # by the words in its name; shapes do not tell
    precision: tuple[Precision, ...] = ()
    parameters: int = 0
    tensors: int = 0
    missing: tuple[str, ...] = ()
    mismatches: tuple[str, ...] = ()
    tokenizer_file: Path | None = None  # the one of `files` that also holds the SentencePiece model
    compiled: bool = False  # saved while torch.compile wrapped it, or blocks of it
    lora: LoraInfo | None = None
    refusal: str = ""
    hint: str = ""

    @property
    def tokenizer(self) -> bool:
        return self.tokenizer_file is not None

    def precision_of(self, group: str) -> Precision:
        """Return how a class of tensors is stored; an empty Precision if the component has no such class."""
        return next((entry for entry in self.precision if entry.group == group), Precision(group, ()))

    def map_key(self, name: str) -> str | None:
        """Return the network's name for a tensor of the file, or None if it belongs to another network
        there.
        """
        name = plain_name(name)
        if not name.startswith(self.prefix) or is_tokenizer(name):
            return None
        if not self.prefix and name.startswith(OTHER_NETWORKS):
            return None
        return self.rename_key(name.removeprefix(self.prefix))

    def rename_key(self, name: str) -> str:
        """Return the network's name for a tensor whose prefix is taken off."""
        if self.naming == "diffusers" and isinstance(self.config, VAE22Config):
            return vae22_from_diffusers(name)
        return get_renaming(self.kind, self.naming)(name)


def get_renaming(kind: Kind, naming: Naming) -> Callable[[str], str]:
    """Return the function from the names of a layout to the network's own."""
    return _RENAME.get((kind, naming), str)


def tensor_groups(kind: Kind) -> tuple[str, ...]:
    """Return the classes of tensors of a kind of network, in the order in which to show them."""
    return tuple(_GROUPS.get(kind, {}).values())


def classify_tensor(kind: Kind, name: str) -> str:
    """Return the class in which `Component.precision` counts a tensor, given its own name."""
    if is_helper(name):
        return "scales, markers"
    patterns = _GROUPS.get(kind, {r".*": "tensors"})
    return next(group for pattern, group in patterns.items() if re.fullmatch(pattern, name))


def expert_from_name(path: Path) -> Expert | None:
    """Return which expert of Wan 2.2 A14B the name of a file, or else of its folder, says that it is.

    The words are those of ComfyUI (high_noise), kijai (HIGH) and QuantStack (HighNoise); a plain `high`
    counts only in a name with A14B. A link and its target have a name each. Raises CheckpointError if they
    disagree.
    """
    files = links.list_names(path)
    for names in ([file.name for file in files], [file.parent.name for file in files]):
        said = {name: expert for name in names if (expert := _expert_in(name))}
        if len(set(said.values())) > 1:
            raise CheckpointError(
                f"its names say both experts: {' and '.join(said)}",
                where=str(path),
                hint="rename the link, or name the right file",
            )
        if said:
            return next(iter(said.values()))
    return None


def _expert_in(name: str) -> Expert | None:
    """Return the expert that one name says."""
    match = _TWO_FILES.search(name) or _ONE_WORD.search(name)
    if not match and "a14b" in name.lower():
        match = _A14B_WORD.search(name)
    if not match:
        return None
    return "high" if match[1].lower() == "high" else "low"


def find_missing(names: Mapping[str, object]) -> tuple[str, ...]:
    """Return the names that a block lacks though another block has them, and whole blocks that are
    missing.
    """
    pattern = re.compile(r"(?P<head>(?:encoder\.)?blocks?\.)(?P<number>\d+)\.(?P<rest>.+)")
    blocks: dict[tuple[str, int], set[str]] = {}
    for name in names:
        if match := pattern.fullmatch(name):
            blocks.setdefault((match["head"], int(match["number"])), set()).add(match["rest"])
    missing = []
    for head in sorted({head for head, _ in blocks}):
        numbers = [number for h, number in blocks if h == head]
        every = set().union(*(rests for (h, _), rests in blocks.items() if h == head))
        for number in range(max(numbers) + 1):
            present = blocks.get((head, number), set())
            missing += [f"{head}{number}.*"] if not present else []
            missing += [f"{head}{number}.{rest}" for rest in sorted(every - present)] if present else []
    return tuple(missing)
