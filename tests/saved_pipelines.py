"""Pipelines of random weights: as diffusers saves them, and as diffusers runs them.

Letters of shapes: N tokens of a prompt, E text width, C T Y X latent channels, frames, rows, columns.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from jobs import SPIECE
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from wancli.models.vae22 import LATENT_MEAN, LATENT_STD
from wancli.sampling.solvers import build_sigma_schedule


class OurTimes(UniPCMultistepScheduler):
    """Their solver on the official noise levels; theirs differ in the third digit."""

    def set_timesteps(self, steps: int, device: Any = None, **_: Any) -> None:
        super().set_timesteps(steps, device)
        ours = build_sigma_schedule("unipc", steps, self.config.flow_shift)
        self.sigmas, self.timesteps = torch.tensor(ours.sigmas), torch.tensor(ours.timesteps)


class SavedPipeline:
    """A pipeline in memory, and the folder that `save_pretrained` wrote."""

    def __init__(
        self, folder: Path, pipeline: Any, vae: AutoencoderKLWan, shift: float, **settings: Any
    ) -> None:
        self.folder = folder
        self.pieces = SentencePieceProcessor(model_file=str(SPIECE))
        self.text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=self.pieces.get_piece_size(),
                d_model=32,
                d_kv=10,
                d_ff=48,
                num_layers=1,
                num_heads=3,
            )
        ).eval()
        self.pipe = pipeline(
            tokenizer=None,
            text_encoder=self.text_encoder,
            vae=vae.eval(),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
            ),
            **settings,
        )
        self.pipe.save_pretrained(folder)
        (folder / "tokenizer").mkdir()
        shutil.copy(SPIECE, folder / "tokenizer" / "spiece.model")
        self.pipe.scheduler = OurTimes.from_config(self.pipe.scheduler.config)
        self.pipe.set_progress_bar_config(disable=True)

    def context(self, text: str) -> Tensor:
        """[1, 512, E] as WanPipeline makes it: rows of the tokens, then zeros."""
        ids = torch.tensor([[*self.pieces.encode(text), 1]])
        rows_1NE = self.text_encoder(ids, torch.ones_like(ids)).last_hidden_state
        return F.pad(rows_1NE, (0, 0, 0, 512 - ids.shape[1]))

    def latents(self, shape: tuple[int, ...], seed: int, prompt: str, negative: str, **call: Any) -> Tensor:
        """Their whole pipeline from our noise: [C, T, Y, X]."""
        result: Tensor = self.pipe(
            prompt_embeds=self.context(prompt),
            negative_prompt_embeds=self.context(negative),
            latents=torch.randn(shape, generator=torch.Generator().manual_seed(seed))[None],
            output_type="latent",
            **call,
        ).frames[0]
        return result


def random_transformer(channels_in: int = 16, channels: int = 16, **image: Any) -> WanTransformer3DModel:
    network = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=22,
        in_channels=channels_in,
        out_channels=channels,
        text_dim=32,
        freq_dim=32,
        ffn_dim=60,
        num_layers=3,
        **image,
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return network.eval()


def random_vae22() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=8,
        z_dim=48,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=list(LATENT_MEAN),
        latents_std=list(LATENT_STD),
    )
