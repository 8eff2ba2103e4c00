"""The stages of the training, each from the files of earlier ones to a file of its own in DIR.

text      spiece.model, text.pt   tokenizer, and the text encoder warmed up
latents   latents.pt              the linear latent space
vae       vae.pt                  decoder and encoder for it
dit       dit.pt                  a shallow transformer, and the text encoder trained with it
grow      grow.pt                 each of its blocks five times
finetune  finetune.pt             the deep transformer, with prompts swapped in some blocks
pack                              a checkpoint folder
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from scripts.mini import check, dit, pack, text, vae
from scripts.mini.latents import GRID, Latents, fit
from scripts.mini.recipe import Recipe
from scripts.mini.training import Pace, load, rng_of, save, train
from scripts.mini.world import draw_all, random_scene


@dataclass(frozen=True)
class Workshop:
    """One training run: its folder, its numbers, and how long to work now."""

    folder: Path
    recipe: Recipe
    device: torch.device
    pace: Pace
    into: Path  # where `pack` writes

    def file(self, name: str) -> Path:
        return self.folder / name

    def latents(self) -> Latents:
        return Latents.of(load(self.file("latents.pt")), self.device)


def run_text(shop: Workshop) -> bool:
    spiece = shop.file("spiece.model")
    if not spiece.exists():
        text.write_tokenizer(spiece)
    trainer = text.TextTrainer(shop.recipe, spiece, shop.device)
    return train("text", trainer, shop.recipe.text_steps, shop.file("text.pt"), shop.pace)


def run_latents(shop: Workshop) -> bool:
    if not shop.file("latents.pt").exists():
        save(shop.file("latents.pt"), fit(shop.recipe.latents_clips, shop.recipe.seed).state())
    latents = shop.latents()
    rng = rng_of(shop.recipe.seed, "latents check", 0)
    clips_BCTYX = draw_all([random_scene(rng) for _ in range(32)], GRID, shop.device)
    print(f"latents: PSNR {vae.psnr(latents.decode(latents.encode(clips_BCTYX)), clips_BCTYX):.1f} dB")
    return True


def run_vae(shop: Workshop) -> bool:
    trainer = vae.VAETrainer(shop.recipe, shop.latents(), shop.device)
    return train("vae", trainer, shop.recipe.vae_steps, shop.file("vae.pt"), shop.pace)


def run_dit(shop: Workshop) -> bool:
    start = load(shop.file("text.pt"))
    trainer = dit.DiTTrainer(
        "dit", shop.recipe, start, shop.latents(), shop.file("spiece.model"), shop.device
    )
    return train("dit", trainer, shop.recipe.dit_steps, shop.file("dit.pt"), shop.pace)


def run_grow(shop: Workshop) -> bool:
    if not shop.file("grow.pt").exists():
        trained = load(shop.file("dit.pt"))
        grown = dit.grow(trained["average"]["model"], shop.recipe.copies)
        kept = {"vocabulary": trained["vocabulary"], "text": trained["average"]["text"], "model": grown}
        save(shop.file("grow.pt"), kept)
    print(f"grow: {shop.recipe.grown} blocks")
    return True


def run_finetune(shop: Workshop) -> bool:
    start = load(shop.file("grow.pt"))
    spiece = shop.file("spiece.model")
    trainer = dit.DiTTrainer("finetune", shop.recipe, start, shop.latents(), spiece, shop.device)
    return train("finetune", trainer, shop.recipe.finetune_steps, shop.file("finetune.pt"), shop.pace)


def run_pack(shop: Workshop) -> bool:
    pack.pack(shop.folder, shop.into, shop.recipe)
    return True


def run_check(shop: Workshop) -> bool:
    check.check(shop.folder, shop.recipe, 64, shop.device)
    return True


STAGES: dict[str, Callable[[Workshop], bool]] = {
    "text": run_text,
    "latents": run_latents,
    "vae": run_vae,
    "dit": run_dit,
    "grow": run_grow,
    "finetune": run_finetune,
    "pack": run_pack,
}
