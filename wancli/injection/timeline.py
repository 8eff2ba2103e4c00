"""A prompt that changes over the frames of a video: its segments, and what blocks read instead of one prompt.

Cut and crossfade: each segment is a prompt of its own, with a weight for every latent frame; the weights of
all segments add up to 1. Relay: one prompt holds the words of all segments, and a bias keeps the words of a
segment from other frames. Source: Prompt Relay, arXiv 2604.10030. Loads without torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from wancli.injection.area import Area, TokenGrid, compute_weights
from wancli.injection.exprs import AreaWeight, Cell, Emphasis, Text

PromptBlend = Literal["cut", "crossfade", "relay"]
_EPSILON = 1e-3
_SIGMA = 1 / math.log(1 / _EPSILON)
RELAY_BORDER = 2  # latent frames at either end of a segment in which its words fade


@dataclass(frozen=True)
class Segment:
    """Frames of a video, first and last included, and what blocks read there: the id of an embedding and,
    of a relay, the first of the rows that the words of the segment have in it and the row after the last.
    """

    frames: tuple[int, int]
    id: str
    text: str
    rows: tuple[int, int] | None = None

    @property
    def latent_span(self) -> tuple[float, float]:
        """Where the segment begins and ends, in latent frames."""
        first, last = self.frames
        return _to_latent(first), _to_latent(last + 1)

    def relay_bias(self, latent_frame: int) -> float:
        """Return what a relay adds to the logits of the words in a latent frame:
        -relu(|f - mid| - w)² / 2σ², with w = length/2 - 2 latent frames or, if that is less, 0.
        """
        start, stop = self.latent_span
        window = max((stop - start) / 2 - RELAY_BORDER, 0)
        distance = abs(latent_frame + 0.5 - (start + stop) / 2)
        return -(max(distance - window, 0) ** 2) / (2 * _SIGMA**2)


def _to_latent(frame: int) -> float:
    """Return where a frame begins, in latent frames: the first of them holds one frame, all others four."""
    return (frame + 3) / 4 if frame else 0


@dataclass(frozen=True)
class Timeline:
    """The segments of a video: one begins where the one before ends.

    A crossfade mixes two of them in `fade` frames around each border. The prompt of a relay begins with the
    words `common`, which have no bias.
    """

    segments: tuple[Segment, ...]
    blend: PromptBlend
    fade: int = 0
    common: str = ""

    @property
    def text(self) -> str:
        """The texts of all segments, for people."""
        texts = " | ".join(segment.text for segment in self.segments)
        return f"{self.common} {texts}" if self.common else texts

    @property
    def cell(self) -> Cell:
        """What a block reads."""
        if self.blend == "relay":
            return self._relay_cell()
        return tuple((Text(segment.id), AreaWeight(1.0, (self._area(segment),))) for segment in self.segments)

    def _area(self, segment: Segment) -> Area:
        return Area(segment.frames, fade=self.fade)

    def _relay_cell(self) -> Cell:
        grid = TokenGrid(self._latent_frames, 1, 1)
        cell = []
        for latent_frame, (start, stop) in enumerate(grid.frame_intervals):
            biases = tuple(
                (row, bias)
                for segment in self.segments
                if (bias := segment.relay_bias(latent_frame))
                for row in range(*segment.rows or ())
            )
            area = Area((int(start), int(stop) - 1))
            cell.append((Emphasis(Text(self.segments[0].id), biases), AreaWeight(1.0, (area,))))
        return tuple(cell)

    @property
    def _latent_frames(self) -> int:
        return self.segments[-1].frames[1] // 4 + 1

    def frame_weights(self) -> list[list[float]]:
        """Return for each segment its weight in every latent frame; of a relay how often its words count
        there.
        """
        if self.blend == "relay":
            frames = range(self._latent_frames)
            return [[round(math.exp(segment.relay_bias(f)), 6) for f in frames] for segment in self.segments]
        grid = TokenGrid(self._latent_frames, 1, 1)
        areas = (self._area(segment) for segment in self.segments)
        return [[float(weight) for weight in compute_weights(area, grid)[:, 0, 0]] for area in areas]

    @property
    def pixel_settings(self) -> dict[str, Any]:
        """All that changes the video, for a key."""
        segments = [
            [segment.id, segment.frames, *([segment.rows] if segment.rows else [])]
            for segment in self.segments
        ]
        return {"segments": segments, "blend": self.blend, **({"fade": self.fade} if self.fade else {})}
