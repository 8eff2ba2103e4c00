"""`wancli probe --method render`: a shot is rendered for every range of blocks, and scored in pixels.

The renders are shots like others: those that agree share steps, what was stopped goes on, what is done is
not rendered again.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from wancli.engine import batch
from wancli.engine.context import RenderContext
from wancli.injection.block_map import BlockMap, format_blocks
from wancli.injection.table import Rule
from wancli.plan import batching
from wancli.plan.shot import Plan, Shot
from wancli.probe import request
from wancli.probe.request import ProbeRequest
from wancli.video import mp4


def measure(probe: ProbeRequest, tools: RenderContext) -> BlockMap:
    """The map. The videos stay in NAME.map beside the output NAME.mp4.

    Raises what ends a batch, the error of a shot that failed, and Stopped, after which the same call goes on.
    """
    began = time.monotonic()
    shots = plan_renders(probe)
    for outcome in batch.render(Plan(probe.job, tuple(shots), ()), tools):
        if outcome.error:
            raise outcome.error
    plain, *others = shots
    total = [mean_difference(shot.output, plain.output) for shot in others]
    blocks = sum(_count_forwards(shot) for shot in shots)
    return request.build_map(probe, [], total, time.monotonic() - began, blocks)


def plan_renders(probe: ProbeRequest) -> list[Shot]:
    """The plain shot, and one for each range: the first rule of the shot, at its steps, with strength 1."""
    rule = probe.shot.rules[0]
    shots = [_with_output(probe.plain_shot, 0, "plain")]
    for index, blocks in enumerate(probe.ranges, 1):
        range_rule: Rule = replace(rule, blocks=tuple((block, 1.0) for block in blocks))
        shot = replace(probe.plain_shot, rules=(range_rule,), injected=probe.shot.injected[:1])
        shots.append(_with_output(shot, index, f"blocks {format_blocks(blocks)}"))
    return batching.assign_batches(shots)


def _with_output(shot: Shot, index: int, name: str) -> Shot:
    folder = shot.output.with_suffix(".map")
    output = folder / f"{index:02d}-{name.replace(' ', '-')}.mp4"
    return replace(shot, index=index, id=name, labels={}, output=output)


def _count_forwards(shot: Shot) -> float:
    steps = shot.steps - (shot.fork.step if shot.fork else 0)
    return steps * shot.forwards_per_step


def mean_difference(a: Path, b: Path) -> float:
    """Mean |a - b| over all frames, pixels and colours of two videos of one size, from 0 to 255."""
    import numpy as np

    total = count = 0
    for one, other in zip(mp4.read_frames(a), mp4.read_frames(b), strict=True):
        pixels, others = (np.frombuffer(frame.rgb, dtype=np.uint8).astype(np.int16) for frame in (one, other))
        total += int(np.abs(pixels - others).sum())
        count += pixels.size
    return total / count
