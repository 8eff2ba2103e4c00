"""The world that wan-mini knows: one shape of one colour crosses a plain or striped background.

Letters: B scenes, T frames, Y rows, X columns. Videos are [3, T, Y, X] in [-1, 1]. Lengths within a
scene are fractions: of the short side of the frame, or of the room that the shape has to move in.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

import torch
from torch import Tensor

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = ("left", "right", "up", "down")
BACKGROUNDS = ("white", "black", "grey", "striped")
ATTRIBUTES = {"colour": COLOURS, "shape": SHAPES, "direction": DIRECTIONS, "background": BACKGROUNDS}

Combination: TypeAlias = tuple[str, str, str, str]  # in the order of ATTRIBUTES
Grid: TypeAlias = tuple[int, int, int]  # frames, rows and columns of a video, in pixels

INK = {
    "red": (0.8, -0.75, -0.75),
    "green": (-0.7, 0.5, -0.6),
    "blue": (-0.75, -0.5, 0.85),
    "yellow": (0.9, 0.75, -0.75),
}
PAPER = {"white": (0.9, 0.9), "black": (-0.9, -0.9), "grey": (0.0, 0.0), "striped": (-0.55, 0.15)}
STRIPE = 8  # columns of each vertical stripe, at every size
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x to the right, y down
REACH = {"circle": 1.0, "square": 0.86, "triangle": 1.35}  # how far a shape of size 1 extends
SIZES = (0.17, 0.23)
SPEEDS = (0.75, 1.0)


@dataclass(frozen=True)
class Scene:
    """What a clip shows. The last four are not in its caption."""

    colour: str
    shape: str
    direction: str
    background: str
    size: float  # of the shape, as a fraction of the short side
    across: float  # where on the axis it does not move on, 0..1 of the room
    start: float  # where its path begins, 0..1 of what the path leaves of the room
    speed: float  # how much of the room it crosses within the clip, however many frames that has

    @property
    def combination(self) -> Combination:
        return self.colour, self.shape, self.direction, self.background


def held_out(scene: Scene | Combination) -> bool:
    """Whether a combination is kept from training: a tenth of all, every value among them."""
    names = scene.combination if isinstance(scene, Scene) else scene
    c, s, d, b = (values.index(name) for values, name in zip(ATTRIBUTES.values(), names, strict=True))
    return (c + 5 * s + 3 * d + 7 * b) % 10 == 4


COMBINATIONS: tuple[Combination, ...] = tuple(product(COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS))
TRAINED = tuple(names for names in COMBINATIONS if not held_out(names))
HELD_OUT = tuple(names for names in COMBINATIONS if held_out(names))


def random_scene(rng: random.Random, among: Sequence[Combination] = TRAINED) -> Scene:
    """A scene of one of the combinations, all else drawn at random."""
    return Scene(
        *rng.choice(among),
        size=rng.uniform(*SIZES),
        across=rng.random(),
        start=rng.random(),
        speed=rng.uniform(*SPEEDS),
    )


def draw(scene: Scene, frames: int, height: int, width: int) -> Tensor:
    """The clip [3, T, Y, X] in [-1, 1], each pixel mixed by how much of it the shape covers."""
    return draw_all([scene], (frames, height, width))[0]


def draw_all(scenes: Sequence[Scene], grid: Grid, device: torch.device | str = "cpu") -> Tensor:
    """The clips of several scenes, [B, 3, T, Y, X]."""
    ink_B3 = torch.tensor([INK[scene.colour] for scene in scenes], device=device)
    paper_BX = torch.stack([background(scene.background, grid[2]) for scene in scenes]).to(device)
    cover_BTYX = cover_all(scenes, grid, device)
    paper_B1 = paper_BX[:, None, None, None]
    return torch.lerp(
        paper_B1.expand(-1, 3, *grid),
        ink_B3[:, :, None, None, None].expand(-1, -1, *grid),
        cover_BTYX[:, None],
    )


def background(name: str, width: int) -> Tensor:
    """The grey value of each column, [X]."""
    even, odd = PAPER[name]
    stripe_X = torch.arange(width) // STRIPE % 2
    return torch.where(stripe_X == 0, even, odd)


def cover_all(scenes: Sequence[Scene], grid: Grid, device: torch.device | str = "cpu") -> Tensor:
    """How much of each pixel the shape covers, [B, T, Y, X] in [0, 1]."""
    frames, height, width = grid
    side = min(height, width)
    radius_B = torch.tensor([scene.size * side for scene in scenes], device=device)
    ends_B4 = torch.tensor([_path(scene, height, width) for scene in scenes], device=device)
    time_T = torch.linspace(0, 1, frames, device=device) if frames > 1 else torch.tensor([0.5], device=device)
    centre_BT2 = torch.lerp(ends_B4[:, None, :2], ends_B4[:, None, 2:], time_T[:, None])
    cover_BTYX = torch.empty(len(scenes), *grid, device=device)
    for shape in SHAPES:
        chosen = [i for i, scene in enumerate(scenes) if scene.shape == shape]
        cover_BTYX[chosen] = coverage(shape, centre_BT2[chosen], radius_B[chosen], (height, width))
    return cover_BTYX


def coverage(shape: str, centre_BT2: Tensor, radius_B: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, T, Y, X]: 1 inside the shape, 0 outside, in between within a pixel of its edge."""
    y_Y1, x_X = (torch.arange(n, device=centre_BT2.device) + 0.5 for n in size)
    x_BTYX = x_X - centre_BT2[..., 0, None, None]
    y_BTYX = y_Y1[:, None] - centre_BT2[..., 1, None, None]
    r_B111 = radius_B[:, None, None, None]
    if shape == "circle":
        beyond = torch.hypot(x_BTYX, y_BTYX) - r_B111
    elif shape == "square":
        beyond = torch.maximum(x_BTYX.abs(), y_BTYX.abs()) - REACH["square"] * r_B111
    else:  # equilateral, a tip up: the distance to its three sides from the centre is half its reach
        slope = x_BTYX.abs() * 0.75**0.5 - y_BTYX / 2
        beyond = torch.maximum(slope, y_BTYX) - REACH["triangle"] / 2 * r_B111
    return (0.5 - beyond / 2).clamp(0, 1)


def _path(scene: Scene, height: int, width: int) -> tuple[float, float, float, float]:
    """First and last centre of the shape, in pixels: x, y, x, y. It never leaves the frame."""
    margin = REACH[scene.shape] * scene.size * min(height, width)
    step = STEPS[scene.direction]
    first, last = [0.0, 0.0], [0.0, 0.0]
    for axis, length in enumerate((width, height)):
        room = length - 2 * margin
        if step[axis]:
            travel = scene.speed * room
            low = margin + scene.start * (room - travel)
            first[axis], last[axis] = (low, low + travel)[:: step[axis]]
        else:
            first[axis] = last[axis] = margin + scene.across * room
    return first[0], first[1], last[0], last[1]
