"""Measures what a probe asks for: along one shot, or by whole renders."""

from __future__ import annotations

from wancli.engine.context import RenderContext
from wancli.injection.block_map import Map
from wancli.probe.request import Survey


def measured(asked: Survey, tools: RenderContext) -> Map:
    """The map. Raises what `trajectory.measure` and `renders.measure` raise."""
    if asked.method == "render":
        from wancli.probe import renders

        return renders.measure(asked, tools)
    from wancli.probe import trajectory

    return trajectory.measure(asked, tools)
