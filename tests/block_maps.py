"""A measured block map of a model of 8 blocks, for the tests of maps and of their store."""

from __future__ import annotations

from typing import Any

from wancli.injection import block_map
from wancli.injection.block_map import BlockMap, MapModel, PromptPair

SHA = "ab" * 32
TOTAL = [0.3, 0.1, 0.9, 0.2, 0.9, 0.0, 0.5, 0.4]


def measured_map(**changes: Any) -> BlockMap:
    facts: dict[str, Any] = {
        "job": "reef",
        "shot": "0001",
        "model": MapModel(root="/models/wan", sha256=SHA, blocks=8),
        "loras": [],
        "method": "inject",
        "prompts": [PromptPair(main="A cat.", injected="A reef.", ids=["aa", "bb"])],
        "size": "64x64",
        "frames": 1,
        "seed": 0,
        "levels": [block_map.NoiseLevel(step=1, sigma=0.8)],
        "unit": "relative change of the velocity",
        "values": [TOTAL],
        "ranges": None,
        "total": TOTAL,
        "suggestion": "[2, 4]",
        "seconds": 1.5,
        "forwards": 5.5,
        "versions": {"wancli": "0.1.0"},
        "created": "2026-11-23T10:00:00+00:00",
    }
    return BlockMap(**(facts | changes))
