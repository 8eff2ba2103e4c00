"""Attention maps of a finished latent: noise is added to it, and a forward is recorded at each noise level.

Letters of shapes: C latent channels, T Y X the latent grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from wancli.engine.context import RenderContext
from wancli.engine.encode_stage import encode_prompts
from wancli.engine.networks import Networks, check_weights, prepare_device
from wancli.engine.picture_stage import encode_frames
from wancli.injection.attention_spec import AttentionSpec, Group
from wancli.injection.table import Table
from wancli.plan import backends
from wancli.plan.shot import Shot
from wancli.resources.measure import oom_as_error
from wancli.sampling.solvers import SigmaSchedule, State
from wancli.sampling.stages import Stage
from wancli.video import mp4

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from wancli.injection.attention_maps import AttentionMaps


def record_levels(
    shot: Shot, latent: Tensor | Path, sigmas: Sequence[float], context: RenderContext
) -> AttentionMaps:
    """Record the maps of a shot at noise levels, a group of steps for each: x = (1-sigma)·latent +
    sigma·noise, with the noise of the shot.

    The latent may be a video, which the VAE encodes. Every block reads the shot's own prompt alone; the
    LoRAs and the expert are those of the step whose noise level is nearest. Raises NotFinite, OutOfMemory,
    and Stopped between two levels.
    """
    import torch

    from wancli.injection.attention_maps import AttentionMaps

    assert shot.attention
    groups = tuple(Group((i,), f"sigma {sigma:g}") for i, sigma in enumerate(sigmas))
    spec: AttentionSpec = replace(shot.attention, steps=groups)
    prepare_device(shot.model.device)
    backends.check_backends(shot.model)
    check_weights(shot.model.checkpoint)
    networks = Networks(shot.model)
    with oom_as_error("attention", f"shot {shot.id}"), torch.inference_mode():
        z_CTYX = latent if isinstance(latent, torch.Tensor) else encode_video(latent, networks)
        maps = AttentionMaps.zeros(spec, shot.tokens, shot.model.device)
        return _record(shot, z_CTYX.to(shot.model.device), sigmas, maps, networks, context).to("cpu")


def encode_video(path: Path, networks: Networks) -> Tensor:
    """Return the latent of an MP4, which is near the latent that the video was decoded from. The VAE is
    released.
    """
    import torch

    vae, device = networks.vae, networks.model.device

    def read_chunks() -> Iterator[Tensor]:
        frames: list[Tensor] = []
        for number, frame in enumerate(mp4.read_frames(path)):
            pixels = torch.frombuffer(bytearray(frame.rgb), dtype=torch.uint8)
            frames.append(pixels.view(frame.height, frame.width, 3).permute(2, 0, 1).to(device))
            if number % 4 == 0:
                yield torch.stack(frames, dim=1).float() / 127.5 - 1
                frames = []

    z_CTYX = vae.encode_chunks(read_chunks())
    networks.release()
    return z_CTYX


def _record(
    shot: Shot,
    z_CTYX: Tensor,
    sigmas: Sequence[float],
    maps: AttentionMaps,
    networks: Networks,
    context: RenderContext,
) -> AttentionMaps:
    """Add one forward for each level to the maps."""
    from wancli.injection.contexts import ContextCache
    from wancli.models.given_frames import NO_FRAMES
    from wancli.sampling import denoise

    encoded, _ = encode_prompts(shot.model, [shot.prompt], context)
    frames, errors, _ = encode_frames([shot], networks, context)
    if failed := errors.get(shot.index):
        assert failed.error
        raise failed.error
    device, own = shot.model.device, frames.get(shot.index)
    given = own.frames.to(device) if own else NO_FRAMES
    clip_NE = {id: rows_NE.to(device) for id, rows_NE in own.clip_NE.items()} if own else {}
    rows_NE = {shot.prompt.id: encoded[shot.prompt.id].embedding.rows_NE.to(device)}
    noise_CTYX = denoise.draw_noise(shot.latent_shape, shot.seed, shot.noise).to(device)
    depth = shot.model.checkpoint.transformer_config.num_layers
    table = Table([], {"cond": shot.prompt.id}, depth, len(sigmas), image=shot.clip_id)
    schedule = SigmaSchedule(tuple(1000 * sigma for sigma in sigmas), (*sigmas, 0.0))
    loras = networks.loras(shot.loras)
    with context.progress.phase("attention", [shot.id], len(sigmas)) as bar:
        for i, sigma in enumerate(sigmas):
            if context.stop.requested:
                raise context.stop.error(f"{i} of {len(sigmas)} noise levels recorded, nothing was written")
            step = nearest_step(shot, sigma)
            expert = next(stage.expert for stage in shot.stages if step in stage.steps)
            model = networks.transformer(expert)
            networks.patches.apply_step(loras, step, expert)
            run = denoise.DenoiseRun(
                State((1 - sigma) * z_CTYX + sigma * noise_CTYX),
                schedule,
                "euler",
                table,
                ContextCache(model, rows_NE, clip_NE),
                Stage(expert, range(i, i + 1), 1.0),
                given=given,
                attention=maps,
            )
            (result,) = denoise.denoise(model, run)
            assert result.attention
            maps = result.attention
            bar.advance()
    return maps


def nearest_step(shot: Shot, sigma: float) -> int:
    """Return the step of a shot whose noise level is nearest."""
    sigmas = shot.sigma_schedule.sigmas
    return min(range(shot.steps), key=lambda step: abs(sigmas[step] - sigma))
