"""A pipeline of random weights saved by diffusers, rendered by us, against diffusers' own networks.

Letters of shapes: N tokens of a prompt, E text width, C T Y X latent channels, frames, rows, columns.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.hooks import MagCacheConfig, apply_mag_cache
from jobs import CAT, FISH, SPIECE, latents_of, manifest_of, rule, run_wancli, tiny_job, words, write_job
from oracles import relative_error
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

import wancli
from wancli.sampling.solvers import build_sigma_schedule
from wancli.video import mp4
from wancli.weights.checkpoint import identify
from wancli.weights.loader import load_vae

SHIFT, STEPS, SEED = 3.0, 3, 11
NEGATIVE = "crowded market, fog"


class Saved:
    """A pipeline in memory, and the folder that `save_pretrained` wrote."""

    def __init__(self, folder: Path, **saving: Any) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.pieces = SentencePieceProcessor(model_file=str(SPIECE))
        self.text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=self.pieces.get_piece_size(),
                d_model=32,
                d_kv=10,
                d_ff=48,
                num_layers=2,
                num_heads=3,
            )
        ).eval()
        self.transformer = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=22,
            text_dim=32,
            freq_dim=32,
            ffn_dim=60,
            num_layers=3,
        ).eval()
        for parameter in self.transformer.parameters():
            torch.nn.init.normal_(parameter, std=0.25)
        self.vae = AutoencoderKLWan(base_dim=4).eval()
        self.scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
        )
        WanPipeline(
            tokenizer=None,
            text_encoder=self.text_encoder,
            vae=self.vae,
            scheduler=self.scheduler,
            transformer=self.transformer,
        ).save_pretrained(folder, **saving)
        (folder / "tokenizer").mkdir()
        shutil.copy(SPIECE, folder / "tokenizer" / "spiece.model")

    def context(self, text: str) -> Tensor:
        """[1, 512, E] as WanPipeline makes it: rows of the tokens, then zeros."""
        ids = torch.tensor([[*self.pieces.encode(text), 1]])
        rows_1NE = self.text_encoder(ids, torch.ones_like(ids)).last_hidden_state
        return F.pad(rows_1NE, (0, 0, 0, 512 - ids.shape[1]))

    def latents(self, prompt: str, guidance: float, frames: int) -> Tensor:
        """Their transformer and solver on our noise and noise levels: [C, T, Y, X]."""
        plan = build_sigma_schedule("unipc", STEPS, SHIFT)
        self.scheduler.set_timesteps(STEPS)
        self.scheduler.sigmas = torch.tensor(plan.sigmas)
        self.scheduler.timesteps = torch.arange(STEPS, 0, -1)
        texts = [self.context(prompt)] + [self.context(NEGATIVE)] * (guidance != 1)
        shape = (1, 16, (frames - 1) // 4 + 1, 8, 8)
        x = torch.randn(shape[1:], generator=torch.Generator().manual_seed(SEED))[None]
        for step, t in enumerate(plan.timesteps):
            cond, *uncond = (self.transformer(x, torch.tensor([t]), text).sample for text in texts)
            v = uncond[0] + guidance * (cond - uncond[0]) if uncond else cond
            x = self.scheduler.step(v, self.scheduler.timesteps[step], x, return_dict=False)[0]
        return x[0]

    def frames(self, z_CTYX: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(values).view(-1, 1, 1, 1)
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        return self.vae.decode((z_CTYX * std + mean)[None]).sample[0].clamp(-1, 1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("diffusers"))


def job(saved: Saved, **changes: Any) -> dict[str, Any]:
    sampler = {"steps": STEPS, "shift": SHIFT, "guidance": changes.pop("guidance", 5.0)}
    kept = {"keep_latents": True, "crf": 0}
    return tiny_job(saved.folder, negative=NEGATIVE, seed=SEED, sampler=sampler, video=kept, **changes)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    ("prompt", "guidance", "frames"),
    [(CAT, 5.0, 5), (words(256), 4.0, 1), (CAT, 1, 1), ("cat", 1, 9)],
    ids=["guided", "256 tokens, 1 frame", "guidance 1, 1 frame", "guidance 1, 9 frames"],
)
@torch.inference_mode()
def test_a_pipeline_saved_by_diffusers_renders_to_the_latents_of_diffusers(
    saved: Saved, tmp_path: Path, capsys: Any, prompt: str, guidance: float, frames: int
) -> None:
    result = run_wancli(
        capsys,
        "render",
        "-q",
        write_job(tmp_path, job(saved, prompt=prompt, guidance=guidance, frames=frames)),
    )
    assert result.code == 0, result.err
    ours, theirs = latents_of(tmp_path), saved.latents(prompt, guidance, frames)
    assert relative_error(ours, theirs) <= 1e-4
    assert relative_error(saved.latents(FISH, guidance, frames), theirs) > 1e-2  # the text has a say in them

    decoded = saved.frames(theirs)
    again = torch.cat(list(load_vae(identify(saved.folder), "cpu").decode(ours)), dim=1)
    assert (again - decoded).abs().max() < 1e-3
    found = list(mp4.read_frames(tmp_path / "out" / "clip.mp4"))
    assert len(found) == frames
    shown = torch.stack(
        [torch.frombuffer(bytearray(f.rgb), dtype=torch.uint8).view(64, 64, 3) for f in found]
    )
    luma = torch.tensor([0.2126, 0.7152, 0.0722])
    grey = ((decoded.permute(1, 2, 3, 0) + 1) / 2) @ luma
    assert (shown.float() / 255 @ luma - grey).abs().mean() < 0.01


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_pipeline_saved_in_shards_is_the_same_pipeline(saved: Saved, tmp_path: Path, capsys: Any) -> None:
    sharded = Saved(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((sharded.folder / "transformer").glob("*.safetensors"))) > 1
    for name, model in (("whole", saved), ("shards", sharded)):
        path = write_job(tmp_path / name, job(model, inject=[rule(blocks="late")]))
        assert run_wancli(capsys, "render", "-q", path).code == 0
    assert torch.equal(latents_of(tmp_path / "whole"), latents_of(tmp_path / "shards"))
    body = manifest_of(tmp_path / "shards")
    assert (body["model"]["sizes"]["num_heads"], body["model"]["sizes"]["num_layers"]) == (2, 3)
    assert body["injection"][0]["hits_by_block"] == {"2": STEPS}


def test_a_cached_shot_is_that_of_diffusers_with_its_hooks(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps, name = 20, "Wan2.1-T2V-1.3B"
    said = job(saved, frames=5, prompt=CAT, cache={"table": name}) | {
        "sampler": {"steps": steps, "solver": "euler", "shift": SHIFT, "guidance": 5.0}
    }
    assert run_wancli(capsys, "render", write_job(tmp_path, said), "-q").code == 0
    found = latents_of(tmp_path)
    schedule = build_sigma_schedule("euler", steps, SHIFT)
    contexts = {"cond": saved.context(CAT), "uncond": saved.context(NEGATIVE)}

    def sample(transformer: WanTransformer3DModel) -> Tensor:
        x = torch.randn(found.shape, generator=torch.Generator().manual_seed(SEED))[None]
        for i, t in enumerate(schedule.timesteps):
            v = {}
            for branch, text in contexts.items():
                with transformer.cache_context(branch):
                    v[branch] = transformer(x, torch.tensor([t]), text).sample
            guided = v["uncond"] + 5.0 * (v["cond"] - v["uncond"])
            x = x + (schedule.sigmas[i + 1] - schedule.sigmas[i]) * guided
        return x[0]

    ratios = json.loads((Path(wancli.__file__).parent / "assets" / "magcache.json").read_text())[name]["cond"]
    cached = copy.deepcopy(saved.transformer)
    apply_mag_cache(cached, MagCacheConfig(0.12, 4, 0.2, num_inference_steps=steps, mag_ratios=ratios))
    with torch.inference_mode():
        assert relative_error(found, sample(cached)) < 1e-4
        assert relative_error(found, sample(saved.transformer)) > 1e-2
