"""A block map for people: a strip of blocks for each noise level, the ranking, and a suggestion."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence

from wancli.injection.block_map import BlockMap, MeasuredBranch, format_blocks, rank
from wancli.report.terminal import draw_bar, draw_ruler, truncate, wrap
from wancli.units import format_seconds, pluralize

STRONGEST = 8


def format_map(found: BlockMap) -> Iterator[str]:
    """Format a map within 80 columns, for up to 60 blocks. Each strip is scaled to its own largest value."""
    levels = len(found.levels)
    places = pluralize(len(found.ranges), "range") if found.ranges else f"{found.model.blocks} blocks"
    where = f" at {pluralize(levels, 'noise level')}" if levels else ""
    yield f"{found.method} map of shot {found.shot}: {places}{where}"
    yield f"{found.unit}; {found.forwards:g} forwards in {format_seconds(found.seconds)}"
    for attended, branch in found.branches.items():
        if found.image:
            hits = "" if branch.hits is None else f": {pluralize(branch.hits, 'hit')}"
            yield f"\n{attended} branch, {truncate(branch.injected, 44)}{hits}"
        yield from _format_branch(found, branch)


def _format_branch(found: BlockMap, branch: MeasuredBranch) -> Iterator[str]:
    levels = len(found.levels)
    yield f"\n{'block':>18}  {draw_ruler(found.model.blocks)}"
    for level, values in zip(found.levels, branch.values):
        yield f"{f'step {level.step} sigma {level.sigma:.2f}':>18}  {_draw_strip(found, values)}"
    if levels != 1:
        yield f"{'mean' if levels else 'all steps':>18}  {_draw_strip(found, branch.total)}"
    parts = branch.parts or {}
    most = max((max(values) for values in parts.values()), default=0.0)
    for name, values in parts.items():
        yield f"{name:>18}  {_draw_strip(found, values, most)}"
    if parts:
        yield f"{'':>18}  parts have one scale, up to {_format_value(found, most)}"
    yield ""
    line = "strongest:"
    for place in rank(branch.total)[:STRONGEST]:
        part = f"  {_range_label(found, place)} {_format_value(found, branch.total[place])}"
        if len(line) + len(part) > 80:
            yield line
            line = " " * len("strongest:")
        line += part
    yield line
    if branch.changes:
        yield from _format_changes(found, branch.changes)
    yield f"suggestion: blocks: {branch.suggestion}"


def _format_changes(found: BlockMap, changes: Mapping[str, Sequence[float]]) -> Iterator[str]:
    """Format what changed in the pixels: a row for each range, and the range that changed each kind most."""
    yield ""
    yield f"{'blocks':>18}" + "".join(f"  {kind:>12}" for kind in changes)
    for place in range(len(found.ranges or [])):
        cells = []
        for values in changes.values():
            share = values[place] / (max(values) or 1.0)
            cells.append(f"  {f'{100 * values[place]:.1f} % {draw_bar([share])}':>12}")
        yield f"{_range_label(found, place):>18}" + "".join(cells)
    most = {kind: rank(values)[0] for kind, values in changes.items() if any(values)}
    strongest = [f"{kind} by blocks {_range_label(found, place)}" for kind, place in most.items()]
    if strongest:
        yield from wrap(f"changed most: {', '.join(strongest)}", "  ")


def format_next_step(found: BlockMap, job: str) -> Iterator[str]:
    """Format the command that renders the suggestion, beside the other outputs of the job."""
    branch = next(iter(found.branches.values()))
    words = ["wancli", "render", job, "--pick", found.shot, "--set", f"inject.0.blocks={branch.suggestion}"]
    yield f"check it: {shlex.join([*words, '-o', 'check/'])}"


def _draw_strip(found: BlockMap, values: Sequence[float], most: float | None = None) -> str:
    """Draw one character for each block; the blocks of a range share the value of the range. A full bar is
    `most`, or the largest of the values.
    """
    top = (max(values) if most is None else most) or 1.0
    shares = [0.0] * found.model.blocks
    ranges = found.ranges or [[block] for block in range(found.model.blocks)]
    for blocks, value in zip(ranges, values):
        for block in blocks:
            shares[block] = max(shares[block], value / top)
    return draw_bar(shares)


def _range_label(found: BlockMap, place: int) -> str:
    return str(place) if found.ranges is None else format_blocks(found.ranges[place])


def _format_value(found: BlockMap, value: float) -> str:
    return f"({value:.2f})" if found.method == "render" else f"({100 * value:.2f} %)"
