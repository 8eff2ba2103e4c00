"""What each Wan variant was made for: the official sampling defaults, one row each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Defaults:
    """Used where a job says nothing. Sizes in pixels, `stride` what they must be a multiple of."""

    width: int
    height: int
    frames: int
    fps: int
    steps: int
    shift: float
    guidance: float
    negative: str
    stride: int = 16


# `sample_neg_prompt` of the official configs, the same in 2.1 and 2.2.
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)

T2V = Defaults(width=832, height=480, frames=81, fps=16, steps=50, shift=5.0, guidance=5.0, negative=NEGATIVE)
MINI = Defaults(width=64, height=64, frames=9, fps=8, steps=20, shift=3.0, guidance=3.0, negative="")
MINI_DIM = 88  # no other Wan is as narrow


def defaults_of(dim: int) -> Defaults:
    """The row of the transformer that is `dim` wide."""
    return MINI if dim == MINI_DIM else T2V
