"""Run a probe by its method: along the denoising of one shot, or by full renders."""

from __future__ import annotations

from wancli.engine.context import RenderContext
from wancli.injection.block_map import BlockMap
from wancli.probe.request import ProbeRequest


def run_probe(probe: ProbeRequest, context: RenderContext) -> BlockMap:
    """Measure a map. Raises what `trajectory.measure` and `renders.measure` raise."""
    if probe.method == "render":
        from wancli.probe import renders

        return renders.measure(probe, context)
    from wancli.probe import trajectory

    return trajectory.measure(probe, context)
