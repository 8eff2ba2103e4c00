"""The transformer: flow matching on latents of the world's clips, the text encoder trained with it.

v = noise - x0 at x = (1-σ)·x0 + σ·noise, σ uniform and then shifted by 3. A tenth of the prompts are
empty. Between the stages `dit` and `finetune` every block becomes five (stage `grow`).

From the second half of `dit` on some samples read a second prompt in a range of blocks, and their
target takes each attribute from either scene, as the blocks of the range weigh in for it (ROLES). So
what a block answers for is taught: the background early, shape and motion in the middle, the colour
late, each fading into the next.

Letters: B samples, P prompts, C latent channels, T Y X latent frames, rows, columns, K blocks.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.mini import text
from scripts.mini.batched import project, velocity
from scripts.mini.captions import caption
from scripts.mini.latents import CHANNELS, Latents
from scripts.mini.muon import Muon
from scripts.mini.recipe import FINETUNED_GRIDS, TRAINED_GRIDS, Recipe
from scripts.mini.training import Average, State, Tensors, adamw, chunks, rate, rng_of, set_rate, torch_rng
from scripts.mini.world import ATTRIBUTES, Grid, Scene, draw_all, held_out, random_scene
from wancli.models.dit import WanModel
from wancli.text.tokenizer import Tokenizer

SHIFT = 3.0
EMPTY = 0.1
AVERAGE = 0.999
PADDING_STEPS = 1000  # until the padding counts in full
MUON_RATE = {"dit": 2e-3, "finetune": 8e-4}
ADAM_RATE = {"dit": 1e-3, "finetune": 4e-4}
ROLES = {"background": 0.15, "shape": 0.4, "direction": 0.6, "colour": 0.85}  # where in the depth
ROLE_WIDTH = 0.15


def build(recipe: Recipe, blocks: int) -> WanModel:
    """A transformer that predicts zero, its blocks almost closed."""
    torch.manual_seed(recipe.seed)
    model = WanModel(recipe.wan(blocks))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name.startswith(("head.", "time_projection.")):
            nn.init.zeros_(parameter)
        if name.endswith("modulation") and name.startswith("blocks."):
            parameter.data[:, (2, 5)] = 0.1  # the two gates
    return model


def grow(tensors: Tensors, copies: int) -> Tensors:
    """Each block `copies` times over, every copy adding that fraction of what the block added."""
    grown = {}
    for name, tensor in tensors.items():
        if not name.startswith("blocks."):
            grown[name] = tensor.clone()
            continue
        _, block, part = name.split(".", 2)
        adds = part.startswith(("self_attn.o.", "cross_attn.o.", "ffn.2."))
        for copy in range(copies):
            grown[f"blocks.{int(block) * copies + copy}.{part}"] = tensor / copies if adds else tensor.clone()
    return grown


class DiTTrainer:
    """The stages `dit` and `finetune`."""

    def __init__(
        self,
        stage: Literal["dit", "finetune"],
        recipe: Recipe,
        start: State,
        latents: Latents,
        spiece: Path,
        device: torch.device,
    ) -> None:
        """`start` is the state of the stage `text`, or of `grow`."""
        finetune = stage == "finetune"
        self.samples = recipe.finetune_batch if finetune else recipe.dit_batch
        self._steps = recipe.finetune_steps if finetune else recipe.dit_steps
        self._grids = FINETUNED_GRIDS if finetune else TRAINED_GRIDS
        self._swaps = recipe.swaps
        self._swaps_from = 0 if finetune else recipe.dit_steps // 2
        self._stage, self._seed, self._device, self._latents = stage, recipe.seed, device, latents
        self._tokenizer = Tokenizer(spiece)
        self._vocabulary = start["vocabulary"]
        self.text = text.build(recipe.t5(self._vocabulary), 0, device)
        text.load_text(self.text, start["text"])
        self.model = build(recipe, recipe.grown if finetune else recipe.blocks)
        if finetune:
            self.model.load_state_dict(start["model"])
        self.model.to(device)
        self.averages = {"model": Average(self.model, AVERAGE), "text": Average(self.text, AVERAGE)}
        named = dict(self.model.named_parameters())
        matrices = [p for name, p in named.items() if name.startswith("blocks.") and p.ndim == 2]
        others = [p for name, p in named.items() if not name.startswith("blocks.") or p.ndim != 2]
        self._muon = Muon(matrices)
        self._adamw = adamw([*others, *self.text.parameters()])

    def step(self, i: int) -> Tensor:
        loss = self.loss(i)
        self._adamw.zero_grad()
        self.model.zero_grad()
        torch.autograd.backward(loss)
        parameters = [*self.model.parameters(), *self.text.parameters()]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        factor = rate(i, self._steps)
        self._muon.step(MUON_RATE[self._stage] * factor)
        set_rate(self._adamw, ADAM_RATE[self._stage] * factor)
        self._adamw.step()
        for average in self.averages.values():
            average.update(i)
        return loss

    def loss(self, i: int) -> Tensor:
        """Mean square error of the velocity on the i-th batch."""
        rng = rng_of(self._seed, self._stage, i)
        scenes, prompts, read_KB = self._batch(rng, self._swaps if i >= self._swaps_from else 0.0)
        grids, weights = zip(*self._grids, strict=True)
        x0_BCTYX = self._latents.encode(draw_all(scenes, rng.choices(grids, weights)[0], self._device))
        generator = torch_rng(rng)
        noise_BCTYX = torch.randn(x0_BCTYX.shape, generator=generator).to(self._device)
        u_B = torch.rand(len(scenes), generator=generator).to(self._device)
        sigma_B = SHIFT * u_B / (1 + (SHIFT - 1) * u_B)
        x_BCTYX = torch.lerp(x0_BCTYX, noise_BCTYX, sigma_B[:, None, None, None, None])
        padding = 1.0 if self._stage == "finetune" else min(1.0, i / PADDING_STEPS)
        texts = project(self.model, *text.encode(self.text, prompts), padding)
        v_BCTYX = velocity(self.model, x_BCTYX, 1000 * sigma_B, texts, read_KB.to(self._device))
        return F.mse_loss(v_BCTYX, noise_BCTYX - x0_BCTYX)

    def _batch(self, rng: random.Random, swaps: float) -> tuple[list[Scene], list[list[int]], Tensor]:
        """Target scenes, prompts as ids, and the prompt that each block reads for each sample."""
        style = text.random_style(rng)
        depth = len(self.model.blocks)
        targets: list[Scene] = []
        prompts: list[list[int]] = []
        read_KB = torch.empty(depth, self.samples, dtype=torch.long)
        for sample in range(self.samples):
            scene = random_scene(rng)
            read_KB[:, sample] = len(prompts)
            words = "" if rng.random() < EMPTY else caption(scene, rng, style)
            prompts.append(self._tokenizer.to_ids(words))
            if words and rng.random() < swaps:
                injected = random_scene(rng)
                low, high = random_range(rng, depth)
                scene = blended(scene, injected, low / depth, high / depth, rng)
                read_KB[low:high, sample] = len(prompts)
                prompts.append(self._tokenizer.to_ids(caption(injected, rng, style)))
            targets.append(scene)
        return targets, prompts, read_KB

    def state(self) -> State:
        return {
            "vocabulary": self._vocabulary,
            "text": dict(self.text.named_parameters()),
            "model": self.model.state_dict(),
            "average": {part: average.tensors for part, average in self.averages.items()},
            "muon": self._muon.state(),
            "adamw": self._adamw.state_dict(),
        }

    def load(self, state: State) -> None:
        text.load_text(self.text, state["text"])
        self.model.load_state_dict(state["model"])
        for part, average in self.averages.items():
            average.load(state["average"][part])
        self._muon.load(state["muon"])
        self._adamw.load_state_dict(state["adamw"])


def random_range(rng: random.Random, depth: int) -> tuple[int, int]:
    """First and last-plus-one block of a range, from one block to all of them."""
    low, high = sorted(rng.sample(range(depth + 1), 2))
    return low, high


def share(attribute: str, low: float, high: float) -> float:
    """How much of what decides an attribute lies between two depths in [0, 1]: the area under a bell."""

    def below(depth: float) -> float:
        return math.erf((depth - ROLES[attribute]) / (ROLE_WIDTH * 2**0.5))

    return (below(high) - below(low)) / (below(1) - below(0))


def blended(main: Scene, injected: Scene, low: float, high: float, rng: random.Random) -> Scene:
    """The main scene with each attribute of the other as likely as the depths low..high decide it.

    Drawn again until the combination is one to train on; with the whole depth it is the injected scene.
    """
    while True:
        taken = [name for name in ATTRIBUTES if rng.random() < share(name, low, high)]
        scene = dataclasses.replace(main, **{name: getattr(injected, name) for name in taken})
        if not held_out(scene):
            return scene


@torch.no_grad()
def sample(
    trained: State, recipe: Recipe, prompts: Sequence[Sequence[int]], grid: Grid, device: torch.device
) -> Tensor:
    """Latents [P, 16, T, Y, X] of prompts, by the averaged weights: 16 Euler steps, guidance 3."""
    blocks = 1 + max(int(name.split(".")[1]) for name in trained["model"] if name.startswith("blocks."))
    model = build(recipe, blocks)
    model.load_state_dict(trained["average"]["model"])
    model.to(device)
    encoder = text.build(recipe.t5(trained["vocabulary"]), 0, device)
    text.load_text(encoder, trained["average"]["text"])
    frames, height, width = grid
    shape = (CHANNELS, (frames + 3) // 4, height // 8, width // 8)
    sigmas = [SHIFT * u / (1 + (SHIFT - 1) * u) for u in torch.linspace(1, 0, 17).tolist()]
    parts = []
    for numbers in chunks(len(prompts), 64):
        some = [prompts[i] for i in numbers]
        generator = torch.Generator().manual_seed(numbers.start)
        x_BCTYX = torch.randn(len(some), *shape, generator=generator).to(device)
        texts = project(model, *text.encode(encoder, [*some, [1]]))
        own_KB = torch.arange(len(some), device=device).expand(blocks, -1)
        empty_KB = torch.full_like(own_KB, len(some))
        for sigma, after in pairwise(sigmas):
            t_B = torch.full((len(some),), 1000 * sigma, device=device)
            cond, uncond = (velocity(model, x_BCTYX, t_B, texts, read) for read in (own_KB, empty_KB))
            x_BCTYX = x_BCTYX + (after - sigma) * (uncond + 3.0 * (cond - uncond))
        parts.append(x_BCTYX)
    return torch.cat(parts)
