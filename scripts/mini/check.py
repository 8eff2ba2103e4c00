"""How far the training is: what the samples of held-out prompts show, and what the VAE loses."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from scripts.mini import dit, vae
from scripts.mini.captions import STYLES, caption
from scripts.mini.latents import Latents
from scripts.mini.recipe import Recipe
from scripts.mini.recognise import recognise
from scripts.mini.training import load
from scripts.mini.world import ATTRIBUTES, HELD_OUT, Grid, draw_all, random_scene
from wancli.models.vae import WanVAE
from wancli.text.tokenizer import Tokenizer

GRID: Grid = (9, 64, 64)


def check(folder: Path, recipe: Recipe, count: int, device: torch.device) -> dict[str, float]:
    """Prints and returns the share of held-out prompts whose samples show what they say, and PSNRs in dB.

    Samples of the newest transformer, decoded by the VAE if it has been trained, else linearly.
    """
    rng = random.Random(f"{recipe.seed} check")
    scenes = [random_scene(rng, HELD_OUT) for _ in range(count)]
    prompts = [caption(scene, rng, STYLES[i % len(STYLES)]) for i, scene in enumerate(scenes)]
    latents = Latents.of(load(folder / "latents.pt"), device)
    table = {}
    network = None
    if (folder / "vae.pt").exists():
        network = vae.build(recipe)
        network.load_state_dict(load(folder / "vae.pt")["average"])
        network.to(device)
        clips_BCTYX = draw_all(scenes[:16], GRID, device)
        ours = [network.encode(clip_CTYX) for clip_CTYX in clips_BCTYX]
        for part, latents_B in (("decoder", [*latents.encode(clips_BCTYX)]), ("encoder and decoder", ours)):
            decoded_BCTYX = torch.stack([_decoded(network, z_CTYX) for z_CTYX in latents_B])
            table[f"PSNR of {part}"] = vae.psnr(decoded_BCTYX, clips_BCTYX)
    newest = folder / ("finetune.pt" if (folder / "finetune.pt").exists() else "dit.pt")
    if newest.exists():
        tokenizer = Tokenizer(folder / "spiece.model")
        ids = [tokenizer.to_ids(prompt) for prompt in prompts]
        z_BCTYX = dit.sample(load(newest), recipe, ids, GRID, device)
        right: Counter[str] = Counter()
        for scene, z_CTYX in zip(scenes, z_BCTYX, strict=True):
            video_CTYX = _decoded(network, z_CTYX) if network else latents.decode(z_CTYX[None])[0]
            right.update(name for name, agrees in recognise(video_CTYX.cpu()).agrees(scene).items() if agrees)
        table |= {name: right[name] / count for name in ATTRIBUTES}
    for name, value in table.items():
        print(f"check: {name} {value:.1f} dB" if "PSNR" in name else f"check: {name} {value:.0%} of {count}")
    return table


def _decoded(network: WanVAE, z_CTYX: Tensor) -> Tensor:
    return torch.cat(list(network.decode(z_CTYX)), dim=1)
