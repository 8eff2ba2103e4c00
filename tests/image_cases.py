"""The tiny checkpoints that make videos from pictures, with what the official code makes of them.

Each folder holds the networks that wan21-tiny does not have, and `reference.*`: cases with prompts, pictures
at the size of the video, CLIP rows, latents, velocities.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from wancli.models.config import WanConfig
from wancli.models.dit import WanModel

FIXTURES = Path(__file__).parent / "fixtures"
SETS = ("wan21-i2v-tiny", "wan21-flf2v-tiny", "wan22-i2v-tiny", "wan22-ti2v-tiny")
PICTURE, LAST = FIXTURES / "pictures" / "input.png", FIXTURES / "pictures" / "last.png"
CLIP = FIXTURES / "wan21-i2v-tiny" / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"


@dataclass(frozen=True)
class Case:
    """One run of the official code. Tensors of the reference are attributes of a case by their last word."""

    set: str
    name: str
    settings: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.set}-{self.name}"

    def has(self, tensor: str) -> bool:
        return f"{self.name}.{tensor}" in numbers(self.set)

    def __getitem__(self, tensor: str) -> Tensor:
        return numbers(self.set)[f"{self.name}.{tensor}"]

    @property
    def pictures(self) -> dict[int, Tensor]:
        """The given frames [3, Y, X] by their number. Some cases share those of another of the same size."""
        found = {}
        for key, number, tensor in (("image", 0, "image_resized"), ("last_image", -1, "last_resized")):
            if key in self.settings:
                alike = (self, *(other for other in cases(self.set) if self._has_pictures_of(other)))
                number %= self.settings["frames"]
                found[number] = next(case[tensor] for case in alike if case.has(tensor))
        return found

    def _has_pictures_of(self, other: Case) -> bool:
        keys = ("image", "last_image", "height", "width")
        return all(self.settings.get(key) == other.settings.get(key) for key in keys)

    @property
    def clip(self) -> str | None:
        """The beginning of the names of its CLIP tensors; None for a model that reads none."""
        names = [Path(self.settings[key]).stem for key in ("image", "last_image") if key in self.settings]
        prefix = f"clip.{'+'.join(names)}"
        return prefix if f"{prefix}.features" in numbers(self.set) else None

    @property
    def clip_rows(self) -> Tensor:
        return numbers(self.set)[f"{self.clip}.features"].flatten(0, 1)


@cache
def numbers(name: str) -> dict[str, Tensor]:
    return load_file(FIXTURES / name / "reference.safetensors")


@cache
def cases(name: str) -> tuple[Case, ...]:
    document = json.loads((FIXTURES / name / "reference.json").read_text())
    return tuple(Case(name, case, settings) for case, settings in document["cases"].items())


def all_cases() -> list[Case]:
    return [case for name in SETS for case in cases(name)]


def case_keys(of: str, name: str) -> dict[str, Any]:
    """The keys of a job that renders a case of a set."""
    reference = json.loads((FIXTURES / of / "reference.json").read_text())
    case, prompts = reference["cases"][name], reference["prompts"]
    guidance = case["cfg"] if "cfg" in case else {"high": case["cfg_high"], "low": case["cfg_low"]}
    roles = {"first": "image", "last": "last_image"}
    image = {role: str(FIXTURES / "pictures" / case[key]) for role, key in roles.items() if key in case}
    inject = []
    if rule := case.get("inject"):
        (first, last), (start, end) = rule["blocks"], rule["steps"]
        kept = {key: rule[key] for key in ("branch", "blend", "strength")}
        where = {"blocks": f"{first}-{last}", "steps": f"{start}-{end - 1}"}
        inject = [{"prompt": prompts["injection"]} | kept | where]
    return {
        "prompt": prompts["main"], "negative": prompts["negative"], "seed": case["seed"], "image": image,
        "sampler": {key: case[key] for key in ("solver", "steps", "shift")} | {"guidance": guidance},
        "frames": case["frames"], "size": {"area": case["max_area"]}, "text": {"max_tokens": 512},
        "inject": inject,
    }  # fmt: skip


def assemble(name: str, folder: Path) -> Path:
    """Make a whole official folder of a set, of links to its own networks and to those that it shares."""
    folder.mkdir(parents=True)
    shared = FIXTURES / "wan21-tiny"
    parts = [path for path in (FIXTURES / name).iterdir() if not path.name.startswith("reference")]
    parts += [shared / "google", shared / "models_t5_umt5-xxl-enc-bf16.pth"]
    if name != "wan22-ti2v-tiny":
        parts.append(shared / "Wan2.1_VAE.pth")
    if name == "wan21-flf2v-tiny":
        parts.append(CLIP)
    for part in parts:
        (folder / part.name).symlink_to(part)
    return folder


@cache
def load(folder: Path) -> WanModel:
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    rows = weights.get("img_emb.emb_pos")
    config = WanConfig(
        *(32, 64, 2, 40),
        in_dim=weights["patch_embedding.weight"].shape[1],
        out_dim=weights["head.head.weight"].shape[0] // 4,
        text_dim=64,
        freq_dim=64,
        image_dim=160 if "img_emb.proj.0.weight" in weights else None,
        image_rows=None if rows is None else rows.shape[1],
    )
    model = WanModel(config)
    model.load_state_dict(weights)
    return model.eval()
