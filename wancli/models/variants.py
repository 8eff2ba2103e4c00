"""What each Wan variant was made for: the official sampling defaults, one row each.

Source: generate.py and wan/configs of the official Wan2.1 and Wan2.2 repositories. These rows win
over a diffusers scheduler_config.json, whose flow_shift is 3 for most of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace


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
    solver: str = "unipc"
    name: str = field(default="Wan 2.1 T2V", compare=False)

    @property
    def stride(self) -> int:
        """What width and height must be multiples of: a patch is 2x2 latent pixels."""
        return 2 * self.vae_stride


T2V = Defaults(width=832, height=480, frames=81, fps=16, steps=50, shift=5.0, guidance=5.0)
T2V_1_3B = replace(T2V, name="Wan2.1-T2V-1.3B")
T2V_14B = replace(T2V, width=1280, height=720, name="Wan2.1-T2V-14B")
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
    name="Wan2.2-T2V-A14B",
)
TWO_EXPERTS = replace(T2V_A14B, name="Wan 2.2 T2V")
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
    name="Wan2.2-TI2V-5B",
)
TI2V = replace(TI2V_5B, name="Wan 2.2 TI2V")

# (dim, ffn_dim, num_layers, in_dim) of the released transformers. Wan2.1-T2V-14B and the two experts
# of Wan2.2-T2V-A14B have the same. Any other width takes the row of its channels.
RELEASED = {
    (1536, 8960, 30, 16): T2V_1_3B,
    (5120, 13824, 40, 16): T2V_14B,
    (3072, 14336, 30, 48): TI2V_5B,
}
BY_CHANNELS = {16: T2V, 48: TI2V}

# `sample_neg_prompt` of the official configs, the same in 2.1 and 2.2.
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
