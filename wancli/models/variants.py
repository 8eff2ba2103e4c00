"""The official sampling defaults of each Wan variant, one row each.

Source: generate.py and wan/configs of the official Wan2.1 and Wan2.2 repositories. These rows take precedence
over the scheduler_config.json of diffusers, whose flow_shift is 3 for all variants.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# `sample_neg_prompt` of the official configs, the same in 2.1 and 2.2.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True)
class Variant:
    """Defaults of one variant, for all that a job leaves out. Sizes are in pixels.

    Width and height must be multiples of `stride`: the stride of the VAE times the patch size. A latent has
    `latent_channels`; one step in it is 4 frames and `vae_stride` pixels.
    """

    name: str
    width: int
    height: int
    frames: int
    fps: int
    steps: int
    shift: float
    guidance: float  # of the high-noise expert if there are two
    guidance_low: float | None = None  # of the low-noise expert
    boundary: float | None = None  # the high-noise expert takes timesteps from 1000 * boundary up
    stride: int = 16
    latent_channels: int = 16
    negative: str = NEGATIVE_PROMPT

    @property
    def vae_stride(self) -> int:
        return self.stride // 2


T2V = Variant("Wan 2.1 T2V", width=832, height=480, frames=81, fps=16, steps=50, shift=5.0, guidance=5.0)
T2V_1_3B = replace(T2V, name="Wan2.1-T2V-1.3B")
T2V_14B = replace(T2V, name="Wan2.1-T2V-14B", width=1280, height=720)
T2V_A14B = Variant(
    "Wan2.2-T2V-A14B",
    width=1280,
    height=720,
    frames=81,
    fps=16,
    steps=40,
    shift=12.0,
    guidance=4.0,
    guidance_low=3.0,
    boundary=0.875,
)
TWO_EXPERTS = replace(T2V_A14B, name="Wan 2.2 T2V")
TI2V_5B = Variant(
    "Wan2.2-TI2V-5B",
    width=1280,
    height=704,
    frames=121,
    fps=24,
    steps=50,
    shift=5.0,
    guidance=5.0,
    stride=32,
    latent_channels=48,
)
TI2V = replace(TI2V_5B, name="Wan 2.2 TI2V")
MINI = Variant(
    "wan-mini", width=64, height=64, frames=9, fps=8, steps=20, shift=3.0, guidance=3.0, negative=""
)
MINI_DIM = 88  # no other Wan is as narrow

# (dim, ffn_dim, num_layers, in_dim) of the released transformers. Wan2.1-T2V-14B and the two experts
# of Wan2.2-T2V-A14B have the same. Any other width takes the row of its channels.
RELEASED = {
    (1536, 8960, 30, 16): T2V_1_3B,
    (5120, 13824, 40, 16): T2V_14B,
    (3072, 14336, 30, 48): TI2V_5B,
}
# The width of a released transformer -> the models that a LoRA of this width is for.
NAMES_BY_WIDTH = {1536: "Wan2.1 1.3B", 3072: "Wan2.2 5B", 5120: "Wan 14B"}
BY_CHANNELS = {16: T2V, 48: TI2V}
