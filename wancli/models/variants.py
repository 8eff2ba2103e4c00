"""What each Wan variant was made for: the official sampling defaults, one row each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Defaults:
    """Used where a job says nothing, and what a latent [z, T, H/s, W/s] is made of. Sizes in pixels.

    A model with a `boundary` has two experts: one for timesteps from 1000·boundary up, with
    guidance `guidance_high`, and one for those below, with `guidance`.
    """

    width: int
    height: int
    frames: int
    fps: int
    steps: int
    shift: float
    guidance: float
    guidance_high: float | None = None
    boundary: float | None = None
    z_channels: int = 16
    vae_stride: int = 8

    @property
    def stride(self) -> int:
        """What width and height must be multiples of: a patch is 2x2 latent pixels."""
        return 2 * self.vae_stride


T2V = Defaults(width=832, height=480, frames=81, fps=16, steps=50, shift=5.0, guidance=5.0)
T2V_A14B = Defaults(
    width=1280,
    height=720,
    frames=81,
    fps=16,
    steps=40,
    shift=12.0,
    guidance=3.0,
    guidance_high=4.0,
    boundary=0.875,
)
TI2V_5B = Defaults(
    width=1280,
    height=704,
    frames=121,
    fps=24,
    steps=50,
    shift=5.0,
    guidance=5.0,
    z_channels=48,
    vae_stride=16,
)

# `sample_neg_prompt` of the official configs, the same in 2.1 and 2.2.
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
