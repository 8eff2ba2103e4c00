"""Parse which blocks, steps and frames a rule selects, and its strength in each block and step.

Named ranges of blocks are thirds, halves and strides of the model's own depth. Every parser raises
ValueError with a message that has no file and no key; the caller adds them.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

NAMED_BLOCKS = ("all", "early", "middle", "late", "first_half", "second_half", "alternating", "sparse")


def parse_blocks(spec: str | int | Sequence[str | int], depth: int) -> tuple[int, ...]:
    """Parse `27-39`, `0-39:4`, `7`, `early`, or a list of these. Each block once, in the order written."""
    if not isinstance(spec, str | int):
        parts = [block for part in spec for block in parse_blocks(part, depth)]
        return tuple(dict.fromkeys(parts))
    if isinstance(spec, str) and spec.lower() in NAMED_BLOCKS:
        return _named_blocks(spec.lower(), depth)
    match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4})(?::(\d{1,4}))?)?", str(spec))
    if not match:
        raise ValueError(
            f"{spec!r} is not a block set; write 27-39, 0-39:4, 7, or one of {', '.join(NAMED_BLOCKS)}"
        )
    first = int(match[1])
    last = int(match[2] or first)
    stride = int(match[3] or 1)
    if first > last or stride == 0:
        raise ValueError(f"{spec!r} is empty")
    if last >= depth:
        raise ValueError(f"{last} is past the last block ({depth - 1})")
    return tuple(range(first, last + 1, stride))


def _named_blocks(name: str, depth: int) -> tuple[int, ...]:
    third, two_thirds, half = -(-depth // 3), -(-2 * depth // 3), depth // 2
    ranges = {
        "all": range(depth),
        "early": range(third),
        "middle": range(third, two_thirds),
        "late": range(two_thirds, depth),
        "first_half": range(half),
        "second_half": range(half, depth),
        "alternating": range(0, depth, 2),
        "sparse": range(0, depth, 4),
    }
    return tuple(ranges[name])


def parse_steps(spec: str | int | tuple[float, float], sigmas: Sequence[float]) -> tuple[int, ...]:
    """Parse `2-4` or `3` (0-based, inclusive), `0-40%` (i/N in [0, 0.4)), `all`, or a range of sigmas."""
    count = len(sigmas) - 1
    if isinstance(spec, tuple):
        low, high = spec
        slack = 1e-6  # sigmas are fp32
        return tuple(i for i in range(count) if low - slack <= sigmas[i] <= high + slack)
    if spec == "all":
        return tuple(range(count))
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*-\s*(\d+(?:\.\d+)?)\s*%", str(spec)):
        low, high = float(match[1]) / 100, float(match[2]) / 100
        if low >= high or high > 1:
            raise ValueError(f"{spec!r} is not a range of the steps; write 0-40% or 60-100%")
        return tuple(i for i in range(count) if low <= i / count < high)
    match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", str(spec))
    if not match:
        raise ValueError(f"{spec!r} is not a step range; write 2-4, 0-40%, all, or {{sigma: [0.5, 1.0]}}")
    first = int(match[1])
    last = int(match[2] or first)
    if first > last:
        raise ValueError(f"{spec!r} is empty")
    if last >= count:
        raise ValueError(f"{last} is past the last step ({count - 1})")
    return tuple(range(first, last + 1))


_NUMBER = r"(\d{1,9}(?:\.\d{1,9})?)"


def parse_frames(spec: str | int, count: int) -> tuple[int, int]:
    """Parse `0-40` or `8` (from 0, inclusive), `40-end`, or `0-50%` (frames i with i/N in [0, 0.5)) of a
    video of `count` frames. Returns the first and the last frame.
    """
    if match := re.fullmatch(rf"{_NUMBER}\s*-\s*{_NUMBER}\s*%", str(spec)):
        low, high = Fraction(match[1]) / 100, Fraction(match[2]) / 100
        if low >= high or high > 1:
            raise ValueError(f"{spec!r} is not a range of the frames; write 0-50% or 50-100%")
        return _frames_from(low * count, high * count, count, str(spec), lambda i: f"{100 * i / count:.4g} %")
    match = re.fullmatch(r"(\d{1,6})(?:\s*-\s*(\d{1,6}|end))?", str(spec))
    if not match:
        raise ValueError(f"{spec!r} is not a range of frames; write 0-40, 8, 40-end or 0-50%")
    first = int(match[1])
    last = count - 1 if match[2] == "end" else int(match[2] or first)
    if max(first, last) >= count:
        raise ValueError(f"{max(first, last)} is past the last frame ({count - 1})")
    if first > last:
        raise ValueError(f"{spec!r} is empty")
    return first, last


def parse_during(spec: str, fps: Fraction, count: int) -> tuple[int, int]:
    """Parse `1s-3s` or `2.5s-end`: the frames that begin in [1 s, 3 s), of a video of `count` frames.

    Returns the first and the last frame.
    """
    match = re.fullmatch(rf"{_NUMBER}\s*s?\s*-\s*(?:{_NUMBER}\s*s|end)", spec)
    if not match:
        raise ValueError(f"{spec!r} is not a time in the video; write 1s-3s or 2.5s-end")
    start, end = Fraction(match[1]), count / fps
    stop = Fraction(match[2]) if match[2] else end
    if max(start, stop) > end or start == end:
        raise ValueError(f"{float(max(start, stop)):g} s is past the end of the video ({float(end):.4g} s)")
    if start >= stop:
        raise ValueError(f"{spec!r} is empty")
    return _frames_from(start * fps, stop * fps, count, spec, lambda i: f"{float(i / fps):.4g} s")


def _frames_from(
    start: Fraction, stop: Fraction, count: int, spec: str, place: Callable[[int], str]
) -> tuple[int, int]:
    """Return the first and the last frame in [start, stop), which may lie between frames."""
    first, last = math.ceil(start), math.ceil(stop) - 1
    if first > last:
        near = min((i for i in (last, first) if i < count), key=lambda i: abs(i - (start + stop) / 2))
        raise ValueError(f"no frame begins in {spec!r}; the nearest, {near}, begins at {place(near)}")
    return first, last


@dataclass(frozen=True)
class Curve:
    """start + (end-start)·f(u), with u from 0 to 1 over the selected blocks (or steps).

    linear f = u; gaussian f = exp(-(u-center)²/2width²); sine f = ½ + ½·sin(2π·periods·u);
    step f alternates between 1 and 0 every `every` positions; random f is uniform in [0, 1), from `seed`.
    """

    shape: Literal["linear", "gaussian", "sine", "step", "random"]
    start: float = 0.0
    end: float = 1.0
    center: float = 0.5
    width: float = 0.2
    periods: float = 1.0
    every: int = 1
    seed: int = 0

    def values(self, count: int) -> tuple[float, ...]:
        rng = random.Random(self.seed)
        return tuple(self.start + (self.end - self.start) * self._f(k, count, rng) for k in range(count))

    def _f(self, k: int, count: int, rng: random.Random) -> float:
        u = k / (count - 1) if count > 1 else 0.0
        match self.shape:
            case "linear":
                return u
            case "gaussian":
                return math.exp(-((u - self.center) ** 2) / (2 * self.width**2))
            case "sine":
                return 0.5 + 0.5 * math.sin(2 * math.pi * self.periods * u)
            case "step":
                return float(k // self.every % 2 == 0)
            case "random":
                return rng.random()


def pair_strengths(
    spec: float | Sequence[float] | Curve, positions: Sequence[int]
) -> tuple[tuple[int, float], ...]:
    """Pair each selected block (or step) with its strength: a number for all, a list in order, or a curve."""
    if isinstance(spec, Curve):
        values = spec.values(len(positions))
    elif isinstance(spec, int | float):
        values = (float(spec),) * len(positions)
    else:
        values = tuple(spec)
        if len(values) != len(positions):
            raise ValueError(f"{len(values)} strengths for {len(positions)} positions")
    return tuple(zip(positions, values))
