"""Compare VAE decoding with diffusers' AutoencoderKLWan: the real width, one set of random weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from scripts.bench.machine import Row, peak_growth, time_alternately
from wancli.models.config import VAEConfig
from wancli.models.vae import LATENT_MEAN, LATENT_STD, WanVAE
from wancli.weights.formats.key_mapping import vae_from_diffusers


def rows() -> list[Row]:
    """Measure speed on a short clip, then memory on a short and a long clip (timed once)."""
    torch.manual_seed(0)
    theirs: Any = AutoencoderKLWan()  # type: ignore[no-untyped-call]
    ours = WanVAE(VAEConfig())
    weights = {vae_from_diffusers(name): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict(weights, assign=True)
    return [
        _measure_speed(ours, theirs, frames=9, size=128, repeats=3),
        _measure_memory(ours, theirs, frames=9, size=64),
        _measure_memory(ours, theirs, frames=81, size=64),
    ]


def _measure_speed(ours: WanVAE, theirs: Any, frames: int, size: int, repeats: int) -> Row:
    decode_ours, decode_theirs = _build_decoders(ours, theirs, frames, size)
    ours_s, theirs_s = time_alternately(decode_ours, decode_theirs, repeats)
    return Row(
        what=f"VAE decode, {frames} frames of {size}x{size}",
        ours_s=ours_s,
        theirs_s=theirs_s,
        flop=_count_flop(frames, size),
        ours_mib=_measure_time_and_peak(decode_ours)[1],
        theirs_mib=_measure_time_and_peak(decode_theirs)[1],
    )


def _measure_memory(ours: WanVAE, theirs: Any, frames: int, size: int) -> Row:
    (ours_s, ours_mib), (theirs_s, theirs_mib) = map(
        _measure_time_and_peak, _build_decoders(ours, theirs, frames, size)
    )
    what = f"VAE decode, {frames} frames of {size}x{size}"
    return Row(what, ours_s, theirs_s, _count_flop(frames, size), ours_mib, theirs_mib)


def _measure_time_and_peak(run: Callable[[], None]) -> tuple[float, float]:
    """Measure seconds of one run and the MiB it adds."""
    start = time.perf_counter()
    mib = peak_growth(run)
    return time.perf_counter() - start, mib


def _build_decoders(
    ours: WanVAE, theirs: Any, frames: int, size: int
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return functions that decode a normalised latent; ours yields frames as they come."""
    z = _draw_latent(frames, size)
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (LATENT_MEAN, LATENT_STD))

    def decode_ours() -> None:
        for _ in ours.decode(z):
            pass

    def decode_theirs() -> None:
        with torch.no_grad():
            theirs.decode((z * std + mean)[None])

    return decode_ours, decode_theirs


def _count_flop(frames: int, size: int) -> float:
    """Count the arithmetic of the plain network, on diffusers' (ours needs fewer multiplications)."""
    with torch.device("meta"):
        vae: Any = AutoencoderKLWan()  # type: ignore[no-untyped-call]
        z = _draw_latent(frames, size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.decode(z[None])
    return float(counter.get_total_flops())


def _draw_latent(frames: int, size: int) -> Tensor:
    return torch.randn(16, (frames + 3) // 4, size // 8, size // 8)
