"""What a training run is made of, as one row of numbers that every stage reads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.mini.world import Grid
from wancli.errors import JobError
from wancli.models.config import T5Config, VAEConfig, WanConfig
from wancli.storage import atomic


@dataclass(frozen=True)
class Recipe:
    """Widths, lengths and batches: those of the wan-mini that wancli ships. A GPU wants larger batches."""

    seed: int = 0
    dim: int = 88  # of the transformer; its feed-forward is twice as wide
    heads: int = 4
    blocks: int = 8  # trained first
    copies: int = 5  # of each, by the stage `grow`
    text_dim: int = 64
    vae_dim: int = 16  # with dim 88: 15.6 MB in all
    text_steps: int = 400
    text_batch: int = 64
    latents_clips: int = 384
    vae_steps: int = 1800
    vae_batch: int = 4
    dit_steps: int = 6000
    dit_batch: int = 64
    finetune_steps: int = 1000
    finetune_batch: int = 48
    swaps: float = 0.25  # of the samples read a second prompt in some blocks, from half of `dit` on

    def wan(self, blocks: int) -> WanConfig:
        return WanConfig(self.dim, 2 * self.dim, self.heads, blocks, text_dim=self.text_dim)

    def vae(self) -> VAEConfig:
        return VAEConfig(dim=self.vae_dim)

    def t5(self, vocab_size: int) -> T5Config:
        return T5Config(
            vocab_size,
            self.text_dim,
            d_kv=16,
            d_ff=2 * self.text_dim,
            num_layers=2,
            num_heads=self.text_dim // 16,
        )

    @property
    def grown(self) -> int:
        return self.blocks * self.copies


# Clips a stage trains on, and how often each size comes up.
TRAINED_GRIDS: tuple[tuple[Grid, int], ...] = (((9, 48, 48), 4), ((9, 64, 64), 1))
FINETUNED_GRIDS: tuple[tuple[Grid, int], ...] = (
    ((9, 48, 48), 4),
    ((9, 64, 64), 4),
    ((9, 48, 80), 1),
    ((17, 48, 48), 1),
    ((5, 64, 64), 1),
)


def recipe(folder: Path, changes: Sequence[str]) -> Recipe:
    """The recipe of a run: what DIR/recipe.json says, with `name=number` changes, which are kept there."""
    path = folder / "recipe.json"
    values = json.loads(path.read_text()) if path.exists() else {}
    kinds = {name: type(value) for name, value in dataclasses.asdict(Recipe()).items()}
    for change in changes:
        name, _, number = change.partition("=")
        if name not in kinds:
            raise JobError(f"no such number: {name}", where="--set", hint=f"There are {', '.join(kinds)}.")
        try:
            values[name] = kinds[name](number)
        except ValueError:
            raise JobError(f"{number!r} is not {kinds[name].__name__}", where=f"--set {name}") from None
    made = Recipe(**values)
    text = json.dumps(dataclasses.asdict(made), indent=1) + "\n"
    if not path.exists() or path.read_text() != text:
        atomic.replace(path, text.encode())
    return made
