"""What a video shows, judged by comparing it with the world's own renderer.

Letters: T frames, Y rows, X columns, K the four colours and the background.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scripts.mini.world import ATTRIBUTES, BACKGROUNDS, COLOURS, INK, SHAPES, Scene, background, coverage

LEAST_AREA = 0.008  # of the frame: a shape covers three times as much
LEAST_WAY = 0.05  # of the short side, between the first and the last third of the clip
AREAS = {"circle": 3.1416, "square": 4 * 0.86**2, "triangle": 0.75 * 3**0.5 * 1.35**2}  # for size 1
OFFSETS = (0.92, 1.0, 1.08)  # template sizes around the one that the area says


@dataclass(frozen=True)
class Seen:
    """What was recognised; None where nothing was: no shape, or one that stands still."""

    colour: str | None
    shape: str | None
    direction: str | None
    background: str
    overlap: float  # of the shape with its template, intersection over union

    def agrees(self, scene: Scene) -> dict[str, bool]:
        """Which attributes are those of a scene."""
        return {name: getattr(self, name) == getattr(scene, name) for name in ATTRIBUTES}


def recognise(video_CTYX: Tensor) -> Seen:
    """Colour of the foreground, shape by template overlap, direction by centroid, and background."""
    _, T, Y, X = video_CTYX.shape
    paper_X = {name: background(name, X).to(video_CTYX) for name in BACKGROUNDS}
    # Capped, so that a shape counts the same against every background.
    misfit = {name: (video_CTYX - paper_X[name]).abs().amax(0).clamp(max=0.4).mean() for name in BACKGROUNDS}
    behind = min(BACKGROUNDS, key=lambda name: float(misfit[name]))
    paper_CTYX = paper_X[behind].expand_as(video_CTYX)

    ink_KC = torch.tensor([INK[name] for name in COLOURS]).to(video_CTYX)
    candidates_KCTYX = torch.cat([ink_KC[..., None, None, None].expand(-1, -1, T, Y, X), paper_CTYX[None]])
    nearest_TYX = (candidates_KCTYX - video_CTYX).square().sum(1).argmin(0)
    counts = [int((nearest_TYX == k).sum()) for k in range(len(COLOURS))]
    best = max(range(len(COLOURS)), key=counts.__getitem__)
    if counts[best] < LEAST_AREA * nearest_TYX.numel():
        return Seen(None, None, None, behind, 0.0)

    away_CTYX = ink_KC[best][:, None, None, None] - paper_CTYX
    alpha_TYX = ((video_CTYX - paper_CTYX) * away_CTYX).sum(0) / away_CTYX.square().sum(0)
    alpha_TYX = torch.where(alpha_TYX > 0.3, alpha_TYX, 0.0).clamp(max=1)
    centre_T2, area = _centres(alpha_TYX)
    shape, overlap = _shape(alpha_TYX, centre_T2, area)
    return Seen(COLOURS[best], shape, _direction(centre_T2, min(Y, X)), behind, overlap)


def _centres(alpha_TYX: Tensor) -> tuple[Tensor, float]:
    """Centroid (x, y) of each frame and the area, both in pixels."""
    _, Y, X = alpha_TYX.shape
    x_X, y_Y = (torch.arange(n, device=alpha_TYX.device) + 0.5 for n in (X, Y))
    mass_T = alpha_TYX.sum((1, 2)).clamp(min=1e-6)
    x_T, y_T = (alpha_TYX.sum(1) * x_X).sum(1) / mass_T, (alpha_TYX.sum(2) * y_Y).sum(1) / mass_T
    return torch.stack([x_T, y_T], dim=1), float(mass_T.median())


def _direction(centre_T2: Tensor, side: int) -> str | None:
    third = max(1, len(centre_T2) // 3)
    x, y = (centre_T2[-third:].mean(0) - centre_T2[:third].mean(0)).tolist()
    if max(abs(x), abs(y)) < LEAST_WAY * side:
        return None
    if abs(x) > abs(y):
        return "right" if x > 0 else "left"
    return "down" if y > 0 else "up"


def _shape(alpha_TYX: Tensor, centre_T2: Tensor, area: float) -> tuple[str, float]:
    """The shape whose template, put on the centroids, overlaps best, and by how much."""
    best = SHAPES[0], 0.0
    for shape in SHAPES:
        for offset in OFFSETS:
            radius_1 = torch.tensor([offset * (area / AREAS[shape]) ** 0.5], device=alpha_TYX.device)
            template_TYX = coverage(
                shape, centre_T2[None], radius_1, (alpha_TYX.shape[1], alpha_TYX.shape[2])
            )[0]
            union = torch.maximum(alpha_TYX, template_TYX).sum()
            overlap = float(torch.minimum(alpha_TYX, template_TYX).sum() / union)
            best = max(best, (shape, overlap), key=lambda pair: pair[1])
    return best
