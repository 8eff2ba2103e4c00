"""`wancli probe --method render`: render the shot once for every range of blocks, and compare the pixels.

The renders are ordinary shots: equal steps are shared, a stopped render resumes, and a finished one is not
rendered again.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from wancli.engine import batch
from wancli.engine.context import RenderContext
from wancli.injection.block_map import BlockMap, format_blocks
from wancli.injection.table import Rule
from wancli.plan import batching
from wancli.plan.render_plan import Plan
from wancli.plan.shot import Shot
from wancli.probe import request
from wancli.probe.request import Measured, ProbeRequest
from wancli.video import mp4
from wancli.video.kinds_of_change import KINDS, measure_kinds

if TYPE_CHECKING:
    from wancli.video.kinds_of_change import Picture


def measure(probe: ProbeRequest, context: RenderContext) -> BlockMap:
    """Measure a map. The videos stay in the folder NAME.map beside the output NAME.mp4.

    Raises an error that stops a batch, the error of a failed shot, or Stopped; the same call then resumes.
    """
    began = time.monotonic()
    shots = plan_renders(probe)
    schedule = batching.build_schedule(shots)
    for outcome in batch.render(Plan(probe.job, tuple(shots), (), schedule=schedule), context):
        if outcome.error:
            raise outcome.error
    plain, *others = shots
    looked_at = iter([(shot.output, plain.output) for shot in others])
    measured = {
        subject.attended: _compare_ranges([next(looked_at) for _ in probe.ranges])
        for subject in probe.subjects
    }
    forwards = sum(
        (shot.steps - schedule.placement(shot).shared_steps) * shot.forwards_per_step for shot in shots
    )
    return request.build_map(probe, measured, time.monotonic() - began, forwards)


def _compare_ranges(pairs: Sequence[tuple[Path, Path]]) -> Measured:
    """Compare the video of each range with the plain one: by how much the pixels changed, and what did."""
    kinds = [
        measure_kinds(partial(_read_pictures, plain), partial(_read_pictures, other))
        for other, plain in pairs
    ]
    changes = {kind: [found[kind] for found in kinds] for kind in KINDS}
    return Measured([], [mean_difference(*pair) for pair in pairs], changes=changes)


def _read_pictures(path: Path) -> Iterator[Picture]:
    import numpy as np

    for frame in mp4.read_frames(path):
        yield np.frombuffer(frame.rgb, dtype=np.uint8).reshape(frame.height, frame.width, 3)


def plan_renders(probe: ProbeRequest) -> list[Shot]:
    """Return the plain shot, and for each subject and range a shot with the rule on that range, at strength
    1.
    """
    shots = [_with_output(probe.plain_shot, 0, "plain")]
    for subject, blocks in itertools.product(probe.subjects, probe.ranges):
        range_rule: Rule = replace(subject.rule, blocks=tuple((block, 1.0) for block in blocks))
        shot = replace(probe.plain_shot, rules=(range_rule,), injected=(subject.injected,))
        name = "image blocks" if subject.attended == "image" else "blocks"
        shots.append(_with_output(shot, len(shots), f"{name} {format_blocks(blocks)}"))
    return shots


def _with_output(shot: Shot, index: int, name: str) -> Shot:
    folder = shot.output.with_suffix(".map")
    output = folder / f"{index:02d}-{name.replace(' ', '-')}.mp4"
    return replace(shot, index=index, id=name, labels={}, output=output)


def mean_difference(a: Path, b: Path) -> float:
    """Return the mean |a - b| of two videos of one size, over frames, pixels and colours, from 0 to 255."""
    import numpy as np

    total = count = 0
    for one, other in zip(mp4.read_frames(a), mp4.read_frames(b), strict=True):
        pixels, others = (np.frombuffer(frame.rgb, dtype=np.uint8).astype(np.int16) for frame in (one, other))
        total += int(np.abs(pixels - others).sum())
        count += pixels.size
    return total / count
