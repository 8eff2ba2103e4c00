"""Single files that make up a checkpoint: named one by one, or found in the folders ComfyUI keeps.

    diffusion_models/  one transformer, or a high-noise and a low-noise one
    text_encoders/     UMT5
    vae/               its VAE

or all of them in one folder. Nothing is guessed: where two files would do, both are named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wancli.errors import CheckpointError
from wancli.weights.component import Kind, Part
from wancli.weights.folder_layouts import load_json, spiece_in, tree_of, weights_in, weights_of
from wancli.weights.formats.tensor_index import contents
from wancli.weights.recognize import read_config, recognise

HINT = "name the files in the job: model: {transformer: FILE, text_encoder: FILE, vae: FILE, ...}"
# What every kind of network has, for the message when a file has none.
_SIGN = {
    "transformer": "'patch_embedding.weight'",
    "text encoder": "'token_embedding.weight'",
    "vae": "'decoder.middle.0.residual.0.gamma'",
}


@dataclass(frozen=True)
class Files:
    """A checkpoint named file by file: `transformer`, or `high_noise` and `low_noise`; all absolute.

    A whole checkpoint in one file needs only `transformer`; a text encoder that holds its
    SentencePiece model needs no `tokenizer`. `heads` is needed where the width is no multiple of 128.
    """

    transformer: Path | None = None
    high_noise: Path | None = None
    low_noise: Path | None = None
    text_encoder: Path | None = None
    tokenizer: Path | None = None
    vae: Path | None = None
    heads: int | None = None

    @property
    def main(self) -> Path | None:
        """The file that gives the checkpoint its name."""
        return self.transformer or self.high_noise or self.low_noise


def parts_of(path: Path, said: Mapping[str, object] | None = None) -> tuple[Part, ...]:
    """All networks in a file, in its set of shards, or in a folder that holds one network.

    A folder's config.json adds to `said`. Raises CheckpointError.
    """
    config = path / "config.json"
    in_folder = read_config(load_json(config)) if config.is_file() else {}
    return recognise(contents(weights_of(path)), in_folder | dict(said or {}))


def part_in(paths: Sequence[Path], kind: Kind, said: Mapping[str, object] | None = None) -> Part:
    """The network of this kind in these files. Raises CheckpointError where there is none."""
    return pick(recognise(contents(paths), said), kind, paths[0])


def pick(parts: Sequence[Part], kind: Kind, path: Path) -> Part:
    """The one part of this kind. Raises CheckpointError naming what is there instead."""
    found = [part for part in parts if part.kind == kind]
    if len(found) == 1:
        return found[0]
    name = "VAE" if kind == "vae" else kind
    if found:
        raise CheckpointError(f"holds {len(found)} of {name}", where=str(path), hint=HINT)
    if parts:
        raise CheckpointError(f"no {name}: this is a {parts[0].name}", where=str(path), hint=HINT)
    raise CheckpointError(f"no Wan {name}: {_SIGN.get(kind, 'its network')} is missing", where=str(path))


def beside(path: Path) -> Files:
    """A single file and what the folders around it hold: the other expert, text encoder, tokenizer, VAE.

    Raises CheckpointError for a file that holds no transformer.
    """
    return _completed(path, parts_of(path), _known_in(tree_of(path), apart_from=path))


def _completed(path: Path, parts: Sequence[Part], others: Sequence[tuple[Path, Part]]) -> Files:
    transformer = pick(parts, "transformer", path)
    root = tree_of(path)
    high, low = (path, None) if transformer.expert == "high" else (None, path)
    if transformer.expert is not None:
        partner = next((p for p, part in others if _are_experts(transformer, part)), None)
        high, low = high or partner, low or partner
    kinds = {part.kind for part in parts}
    return Files(
        transformer=path if transformer.expert is None else None,
        high_noise=high if transformer.expert else None,
        low_noise=low if transformer.expert else None,
        text_encoder=path if "text encoder" in kinds else _only(others, "text encoder", transformer),
        tokenizer=spiece_in(root) or spiece_in(path.parent),
        vae=path if "vae" in kinds else _only(others, "vae", transformer),
    )


def only_in(root: Path) -> Files:
    """The one checkpoint that a folder of single files holds. Raises CheckpointError for none and several."""
    known = _known_in(root)
    found = [(path, part) for path, part in known if part.kind == "transformer"]
    usable = [(path, part) for path, part in found if not part.refusal]
    if not usable:
        if found:
            raise CheckpointError(found[0][1].refusal, where=str(found[0][0]), hint=found[0][1].hint)
        raise CheckpointError(
            "no Wan transformer in this folder",
            where=str(root),
            hint="give an official or a diffusers folder, or the transformer's file",
        )
    first, part = usable[0]
    if len(usable) > 1 and not (len(usable) == 2 and _are_experts(part, usable[1][1])):
        raise CheckpointError(
            f"several transformers: {_named([path for path, _ in usable])}",
            where=str(root),
            hint="give the file instead of the folder, or " + HINT,
        )
    own = [part for path, part in known if path == first]
    return _completed(first, own, [(path, part) for path, part in known if path != first])


def _known_in(root: Path, apart_from: Path | None = None) -> list[tuple[Path, Part]]:
    """Every network in a folder of single files. What cannot be read is nobody's part."""
    found = []
    for path in weights_in(root):
        if path == apart_from:
            continue
        try:
            found += [(path, part) for part in parts_of(path)]
        except CheckpointError:
            continue
    return found


def _only(others: Sequence[tuple[Path, Part]], kind: Kind, transformer: Part) -> Path | None:
    """The file of this kind that fits the transformer, if there is one. Raises CheckpointError for more."""
    fitting = [
        path for path, part in others if part.kind == kind and not part.refusal and fits(part, transformer)
    ]
    if len(fitting) > 1:
        name = "VAEs" if kind == "vae" else f"{kind}s"
        raise CheckpointError(
            f"several {name} lie beside it: {_named(fitting)}", where=str(transformer.files[0]), hint=HINT
        )
    return fitting[0] if fitting else None


def fits(part: Part, transformer: Part) -> bool:
    """Whether a text encoder writes rows of the width, or a VAE the channels, that the transformer reads."""
    wanted, own = dict(transformer.sizes), dict(part.sizes)
    if part.kind == "vae":
        return own.get("z_dim") == wanted.get("out_dim")
    return own.get("d_model") == wanted.get("text_dim")


def _are_experts(a: Part, b: Part) -> bool:
    """Whether two transformers are the two experts of one model: their names differ in that word only."""
    names = [re.sub(r"(?i)high|low", "?", part.files[0].name) for part in (a, b)]
    return {a.expert, b.expert} == {"high", "low"} and names[0] == names[1]


def _named(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths)
