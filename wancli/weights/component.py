"""A Part: one network in one file, or in all its shards, as headers tell; and what its tensors are called.

A Part is data, found by `wancli.weights.recognize`. Loading asks it for names: `own_name` takes the name
in the file to that of the network (official; for the text encoder that of transformers).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from wancli.models.config import Expert, T5Config, VAE22Config, VAEConfig, WanConfig
from wancli.models.variants import Variant
from wancli.weights.formats.gguf import umt5_to_transformers as umt5_from_gguf
from wancli.weights.formats.key_mapping import (
    transformer_from_diffusers,
    umt5_to_transformers,
    vae22_from_diffusers,
    vae_from_diffusers,
)
from wancli.weights.formats.quant_schemes import PLAIN, Precision, Scheme, is_helper
from wancli.weights.formats.tensor_index import OTHER_NETWORKS, Container
from wancli.weights.lora.describe import LoraInfo

Kind: TypeAlias = Literal["transformer", "text encoder", "vae", "lora", "other"]
Naming: TypeAlias = Literal["official", "diffusers", "transformers", "gguf"]

_RENAME: dict[tuple[Kind, Naming], Callable[[str], str]] = {
    ("transformer", "diffusers"): transformer_from_diffusers,
    ("vae", "diffusers"): vae_from_diffusers,
    ("text encoder", "official"): umt5_to_transformers,
    ("text encoder", "gguf"): umt5_from_gguf,
}
# Parts of a name -> the class of tensor that its precision is told for; the first that is in it.
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
    "vae": {r".*\.weight": "convolutions", r".*": "biases, norms"},
}
_TWO_FILES = re.compile(r"(?i)(high|low)[-_. ]?noise")
_ONE_WORD = re.compile(r"(?<![A-Za-z])(HIGH|LOW)(?![A-Za-z])")
_A14B_WORD = re.compile(r"(?i)(?<![a-z])(high|low)(?![a-z])")


@dataclass(frozen=True)
class Component:
    """One network. `refusal` says why wancli cannot use it, `hint` what to use instead; else both are empty.

    `config` is None where sizes are not enough to build the network. `gaps` are tensors that some
    block lacks and the others have, `misfits` all that is not as a network of these sizes has it (of a VAE,
    that shows when it is built).
    """

    kind: Kind
    name: str
    files: tuple[Path, ...]
    container: Container
    naming: Naming = "official"
    prefix: str = ""  # before every name in the file
    scheme: Scheme = PLAIN
    config: WanConfig | T5Config | VAEConfig | VAE22Config | None = None
    sizes: tuple[tuple[str, int], ...] = ()
    variant: Variant | None = None
    expert: Expert | None = None  # by the words in its name; shapes do not tell
    precision: tuple[Precision, ...] = ()
    parameters: int = 0
    tensors: int = 0
    missing: tuple[str, ...] = ()
    mismatches: tuple[str, ...] = ()
    tokenizer: bool = False  # the SentencePiece model is in the file
    lora: LoraInfo | None = None
    refusal: str = ""
    hint: str = ""

    def precision_of(self, group: str) -> Precision:
        """How a class of tensors is stored; a class that the part does not have is empty."""
        return next((found for found in self.precision if found.group == group), Precision(group, ()))

    def map_key(self, name: str) -> str | None:
        """The network's name for a tensor of the file; None for what belongs to another network there."""
        if not name.startswith(self.prefix) or name.endswith("spiece_model"):
            return None
        if not self.prefix and name.startswith(OTHER_NETWORKS):
            return None
        return self.rename_key(name.removeprefix(self.prefix))

    def rename_key(self, name: str) -> str:
        """The network's name for a tensor, its prefix taken off."""
        if self.naming == "diffusers" and isinstance(self.config, VAE22Config):
            return vae22_from_diffusers(name)
        return get_renaming(self.kind, self.naming)(name)


def get_renaming(kind: Kind, naming: Naming) -> Callable[[str], str]:
    """From the names of a layout to the network's own."""
    return _RENAME.get((kind, naming), str)


def tensor_groups(kind: Kind) -> tuple[str, ...]:
    """The classes of tensors of a kind of network, in the order to show them."""
    return tuple(_GROUPS.get(kind, {}).values())


def classify_tensor(kind: Kind, name: str) -> str:
    """The class of a tensor, by its own name, that `Part.precision` counts it in."""
    if is_helper(name):
        return "scales, markers"
    patterns = _GROUPS.get(kind, {r".*": "tensors"})
    return next(group for pattern, group in patterns.items() if re.fullmatch(pattern, name))


def expert_from_name(path: Path) -> Expert | None:
    """Which expert of Wan 2.2 A14B a file says it is, by its name, else by its folder's.

    The words are those of ComfyUI (high_noise), kijai (HIGH) and QuantStack (HighNoise); a plain
    `high` counts in a name with A14B.
    """
    for name in (path.name, path.parent.name):
        found = _TWO_FILES.search(name) or _ONE_WORD.search(name)
        if not found and "a14b" in name.lower():
            found = _A14B_WORD.search(name)
        if found:
            return "high" if found[1].lower() == "high" else "low"
    return None


def find_missing(names: Mapping[str, object]) -> tuple[str, ...]:
    """Names that a block lacks though another block has them, and whole blocks that are absent."""
    pattern = re.compile(r"(?P<head>(?:encoder\.)?blocks?\.)(?P<number>\d+)\.(?P<rest>.+)")
    blocks: dict[tuple[str, int], set[str]] = {}
    for name in names:
        if match := pattern.fullmatch(name):
            blocks.setdefault((match["head"], int(match["number"])), set()).add(match["rest"])
    found = []
    for head in sorted({head for head, _ in blocks}):
        numbers = [number for h, number in blocks if h == head]
        every = set().union(*(rests for (h, _), rests in blocks.items() if h == head))
        for number in range(max(numbers) + 1):
            present = blocks.get((head, number), set())
            found += [f"{head}{number}.*"] if not present else []
            found += [f"{head}{number}.{rest}" for rest in sorted(every - present)] if present else []
    return tuple(found)
