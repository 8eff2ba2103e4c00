"""The official sampling defaults of each Wan variant, one row each.

Source: generate.py and wan/configs of the official Wan2.1 and Wan2.2 repositories. These rows take precedence
over the scheduler_config.json of diffusers, whose flow_shift is 3 for all variants.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

# `sample_neg_prompt` of the official configs, the same in 2.1 and 2.2.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)

NO_SHAKING = "镜头晃动，"  # of I2V and FLF2V of Wan 2.1, before all else
NO_CUTS = "镜头切换，"  # of FLF2V, before that

Need = Literal["none", "optional", "required"]


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
    first_picture: Need = "none"  # whether the first frame of a video is given, and the last one
    last_picture: Need = "none"
    shift_480p: float | None = None  # the shift of videos of 832x480 pixels or fewer, if it is another
    named: str = ""  # a pattern of names of files and folders that tells it from others of the same shapes

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
    first_picture="optional",
)
TI2V = replace(TI2V_5B, name="Wan 2.2 TI2V")
I2V_720P = Variant(
    "Wan2.1-I2V-14B-720P",
    width=1280,
    height=720,
    frames=81,
    fps=16,
    steps=40,
    shift=5.0,
    shift_480p=3.0,
    guidance=5.0,
    negative=NO_SHAKING + NEGATIVE_PROMPT,
    first_picture="required",
    named="720p",
)
I2V_480P = replace(I2V_720P, name="Wan2.1-I2V-14B-480P", width=832, height=480, named="480p")
FLF2V = replace(
    I2V_720P,
    name="Wan2.1-FLF2V-14B-720P",
    steps=50,
    shift=16.0,
    shift_480p=None,
    negative=NO_CUTS + NO_SHAKING + NEGATIVE_PROMPT,
    last_picture="required",
    named="",
)
# Of VideoX-Fun: its examples take 50 steps with guidance 6, and shift 3 at 480p.
FUN_INP_14B = replace(
    I2V_480P,
    name="Wan2.1-Fun-14B-InP",
    steps=50,
    guidance=6.0,
    negative=NEGATIVE_PROMPT,
    last_picture="optional",
    named=r"(?<![a-z])fun([-_ .].{0,12})?inp(aint)?(?![a-z])",
)
FUN_INP_1_3B = replace(FUN_INP_14B, name="Wan2.1-Fun-1.3B-InP")
I2V_A14B = Variant(
    "Wan2.2-I2V-A14B",
    width=1280,
    height=720,
    frames=81,
    fps=16,
    steps=40,
    shift=5.0,
    guidance=3.5,
    guidance_low=3.5,
    boundary=0.900,
    first_picture="required",
    last_picture="optional",
)
FUN_A14B_INP = replace(I2V_A14B, name="Wan2.2-Fun-A14B-InP", named=FUN_INP_14B.named)
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
# Variants whose transformers have tensors of the same names and shapes. The first one is meant if neither the
# job nor a name says which. For other widths, too, then without 14B in their names.
I2V_21 = (I2V_480P, I2V_720P, FUN_INP_14B)
I2V_22 = (I2V_A14B, FUN_A14B_INP)
# The width of a released transformer -> the models that a LoRA of this width is for.
NAMES_BY_WIDTH = {1536: "Wan2.1 1.3B", 3072: "Wan2.2 5B", 5120: "Wan 14B"}
BY_CHANNELS = {16: T2V, 48: TI2V}
