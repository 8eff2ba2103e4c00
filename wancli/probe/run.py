"""Measures what a probe asks for: along one shot, or by whole renders."""

from __future__ import annotations

from wancli.engine.context import RenderContext
from wancli.injection.block_map import BlockMap
from wancli.probe.request import ProbeRequest


def run_probe(probe: ProbeRequest, tools: RenderContext) -> BlockMap:
    """The map. Raises what `trajectory.measure` and `renders.measure` raise."""
    if probe.method == "render":
        from wancli.probe import renders

        return renders.measure(probe, tools)
    from wancli.probe import trajectory

    return trajectory.measure(probe, tools)
