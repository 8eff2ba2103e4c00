"""The VAE: a decoder trained on the linear latents, and an encoder that learns to give them.

Both are wancli's networks, run on several clips at once by vmap, which on a CPU is five times faster
than one after the other. Muon steps the kernels of the convolutions: after 90 steps the loss is half
that of AdamW. A little noise on the latents makes the decoder forgive the encoder and the
transformer.

Letters: B clips, C latent channels, T Y X frames, rows and columns of latents or of videos.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from scripts.mini.latents import Latents
from scripts.mini.muon import Muon
from scripts.mini.recipe import Recipe
from scripts.mini.training import Average, State, adamw, rate, rng_of, set_rate, torch_rng
from scripts.mini.world import Grid, Scene, cover_all, draw_all, random_scene
from wancli.models.vae import LATENT_MEAN, LATENT_STD, WanVAE
from wancli.models.vae_layers import CausalCache, ResidualBlock

GRIDS: tuple[tuple[Grid, int], ...] = (
    ((9, 48, 48), 6),
    ((9, 64, 64), 3),
    ((17, 48, 48), 1),
)
MUON_RATE = 2e-3
ADAM_RATE = 1e-3
AVERAGE = 0.999
SHAPE_WEIGHT = 4.0  # of the pixels in and around the shape
AROUND = 5  # pixels
NOISE = 0.05
ENCODER_EVERY = 3  # steps; a regression onto a linear map is the easier half


def build(recipe: Recipe) -> WanVAE:
    """A VAE whose inner scale is that of normalised latents, and whose residual blocks start closed."""
    torch.manual_seed(recipe.seed)
    vae = WanVAE(recipe.vae())
    for module in vae.modules():
        if isinstance(module, ResidualBlock):
            last = module.steps[3]
            nn.init.zeros_(last.weight)
            assert last.bias is not None
            nn.init.zeros_(last.bias)
    mean_C, std_C = torch.tensor(LATENT_MEAN), torch.tensor(LATENT_STD)
    channels = len(mean_C)
    assert vae.conv1.bias is not None
    assert vae.conv2.bias is not None
    with torch.no_grad():
        # What WanVAE puts around the networks is undone here: they begin with variance 1.
        vae.conv2.weight.copy_(torch.diag(1 / std_C)[..., None, None, None])
        vae.conv2.bias.copy_(-mean_C / std_C)
        vae.conv1.weight.zero_()
        vae.conv1.weight[:channels, :channels] = torch.diag(std_C)[..., None, None, None]
        vae.conv1.bias.copy_(torch.cat([mean_C, torch.full((channels,), -5.0)]))
    return vae


def decode(vae: WanVAE, z_BCTYX: Tensor) -> Tensor:
    """Videos of normalised latents, not clamped; differentiable."""
    return _over_clips(lambda z_CTYX: vae.decode_chunk(z_CTYX, CausalCache()), z_BCTYX)


def encode(vae: WanVAE, video_BCTYX: Tensor) -> Tensor:
    """Normalised latents of videos; differentiable."""
    mean_C, std_C = (torch.tensor(v, device=video_BCTYX.device) for v in (LATENT_MEAN, LATENT_STD))
    raw_BCTYX = _over_clips(lambda video_CTYX: vae.encode_chunk(video_CTYX, CausalCache())[0], video_BCTYX)
    return (raw_BCTYX - mean_C[:, None, None, None]) / std_C[:, None, None, None]


def _over_clips(network: Callable[[Tensor], Tensor], x_BCTYX: Tensor) -> Tensor:
    # The CPU's fused attention has no batching rule; and only the differentiable path of the
    # networks has no buffers of its own, hence gradients on.
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        y_BCTYX: Tensor = torch.vmap(network)(x_BCTYX)
    return y_BCTYX


def psnr(a: Tensor, b: Tensor) -> float:
    """In dB, of videos in [-1, 1]."""
    return float(-10 * torch.log10((a.clamp(-1, 1) - b).square().mean() / 4))


class VAETrainer:
    """The stage `vae`. Its loss is the decoder's."""

    def __init__(self, recipe: Recipe, latents: Latents, device: torch.device) -> None:
        self.samples, self._steps, self._seed = recipe.vae_batch, recipe.vae_steps, recipe.seed
        self._latents, self._device = latents, device
        self.vae = build(recipe).to(device)
        self.average = Average(self.vae, AVERAGE)
        self._halves = {
            "decoder": Half(self.vae.decoder, self.vae.conv2),
            "encoder": Half(self.vae.encoder, self.vae.conv1),
        }

    def step(self, i: int) -> Tensor:
        rng = rng_of(self._seed, "vae", i)
        grids, weights = zip(*GRIDS, strict=True)
        grid = rng.choices(grids, weights)[0]
        scenes = [random_scene(rng) for _ in range(self.samples)]
        video_BCTYX = draw_all(scenes, grid, self._device)
        z_BCTYX = self._latents.encode(video_BCTYX)
        noise_BCTYX = torch.randn(z_BCTYX.shape, generator=torch_rng(rng)).to(self._device)
        loss = weighted_loss(decode(self.vae, z_BCTYX + NOISE * noise_BCTYX), video_BCTYX, scenes)
        factor = rate(i, self._steps)
        self._halves["decoder"].descend(loss, factor)
        if i % ENCODER_EVERY == 0:
            self._halves["encoder"].descend(F.mse_loss(encode(self.vae, video_BCTYX), z_BCTYX), factor)
        self.average.update(i)
        return loss

    def state(self) -> State:
        return {
            "vae": self.vae.state_dict(),
            "average": self.average.tensors,
            "halves": {name: half.state() for name, half in self._halves.items()},
        }

    def load(self, state: State) -> None:
        self.vae.load_state_dict(state["vae"])
        self.average.load(state["average"])
        for name, half in self._halves.items():
            half.load(state["halves"][name])


class Half:
    """The optimizers of encoder or decoder: Muon for the kernels between its first and its last layer."""

    def __init__(self, network: nn.Module, outer: nn.Module) -> None:
        named = [*network.named_parameters(), *outer.named_parameters(prefix="outer")]
        inner = [not name.startswith(("conv1.", "head.", "outer.")) and p.ndim >= 4 for name, p in named]
        self._parameters = [p for _, p in named]
        self._muon = Muon([p for (_, p), is_inner in zip(named, inner, strict=True) if is_inner])
        self._adamw = adamw([p for (_, p), is_inner in zip(named, inner, strict=True) if not is_inner])

    def descend(self, loss: Tensor, factor: float) -> None:
        for parameter in self._parameters:
            parameter.grad = None
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._muon.step(MUON_RATE * factor)
        set_rate(self._adamw, ADAM_RATE * factor)
        self._adamw.step()

    def state(self) -> State:
        return {"muon": self._muon.state(), "adamw": self._adamw.state_dict()}

    def load(self, state: State) -> None:
        self._muon.load(state["muon"])
        self._adamw.load_state_dict(state["adamw"])


def weighted_loss(made_BCTYX: Tensor, video_BCTYX: Tensor, scenes: list[Scene]) -> Tensor:
    """Mean square error in which the shape and its surroundings count more."""
    _, _, frames, height, width = video_BCTYX.shape
    cover_BTYX = cover_all(scenes, (frames, height, width), video_BCTYX.device)
    near_BTYX = F.max_pool2d((cover_BTYX > 0).float(), 2 * AROUND + 1, stride=1, padding=AROUND)
    weight_B1TYX = 1 + (SHAPE_WEIGHT - 1) * near_BTYX[:, None]
    error_BCTYX = (made_BCTYX - video_BCTYX).square() * weight_B1TYX
    return error_BCTYX.mean() / weight_B1TYX.mean()
