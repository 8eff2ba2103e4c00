"""Measure block maps of wan-mini, and how well they agree.

    python -m scripts.bench.probe [--pairs 3] [--seeds 2] [--size 64x64]

For each pair of prompts and each seed a map by every method at three noise levels, and three renders: plain,
and injected into the top and the bottom quarter of the blocks of the map (`auto:top10`, `auto:bottom10`).
Then the agreement of maps, and the time of a map in forwards of the same process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from scripts.bench.markdown import describe_machine, table
from wancli.engine.batch import render
from wancli.engine.context import RenderContext
from wancli.engine.encode_stage import encode_prompts
from wancli.engine.networks import Networks
from wancli.injection import block_map
from wancli.injection.block_map import BlockMap, Method
from wancli.injection.block_map_store import BlockMapStore
from wancli.injection.contexts import ContextCache
from wancli.injection.exprs import Text
from wancli.injection.selectors import parse_blocks
from wancli.job.loader import parse
from wancli.plan.planner import build_plan
from wancli.plan.render_plan import Plan
from wancli.plan.shot import Shot
from wancli.probe import request, run, sensitivity
from wancli.probe.renders import mean_difference
from wancli.progress import Progress
from wancli.sampling import denoise
from wancli.storage.cache import Store

PAIRS = (
    (
        "A red circle drifts to the left across dark stripes.",
        "A blue triangle moves up in front of a white background.",
    ),
    (
        "A green square moves to the right. The background is black.",
        "A yellow circle moves down in front of grey.",
    ),
    (
        "A yellow triangle moves up in front of a white background.",
        "A red square moves to the left across dark stripes.",
    ),
)
METHODS: tuple[Method, ...] = ("inject", "gradient", "skip")
Maps = dict[tuple[int, int, Method], BlockMap]  # by pair, seed and method


def job(pair: int, seed: int, size: str, **more: Any) -> dict[str, Any]:
    main, injected = PAIRS[pair]
    rule = {"prompt": injected, **more.pop("rule", {})}
    return {"prompt": main, "seed": seed, "size": size, "output": "{id}.mp4", "inject": [rule], **more}


def plan_job(folder: Path, args: dict[str, Any], *, unmeasured: bool = False) -> Plan:
    file = parse(json.dumps(args).encode(), "job", "job", folder)
    return build_plan(file, folder / "cache" / "hashes.json", allow_missing_maps=unmeasured)


def measure_maps(folder: Path, context: RenderContext, pairs: int, seeds: int, size: str) -> Maps:
    maps: Maps = {}
    for pair, seed, method in itertools.product(range(pairs), range(seeds), METHODS):
        asked = request.plan_probe(plan_job(folder, job(pair, seed, size)), method, 3, None, None)
        maps[pair, seed, method] = run.run_probe(asked, context)
    return maps


def render_quarters(
    folder: Path, context: RenderContext, maps: Maps, pair: int, seed: int, size: str
) -> tuple[float, float]:
    """Return the mean |difference| from the plain video, of the top and of the bottom quarter of blocks."""
    shelf = BlockMapStore(folder / "cache" / "maps")
    shelf.put(maps[pair, seed, "inject"])
    name = f"{pair}-{seed}"
    quarter = maps[pair, seed, "inject"].model.blocks // 4
    items = [{"id": f"{name}-plain", "inject": []}] + [
        {"id": f"{name}-{end}", "inject": [{"prompt": PAIRS[pair][1], "blocks": f"auto:{end}{quarter}"}]}
        for end in ("top", "bottom")
    ]
    shots = plan_job(folder, job(pair, seed, size, items=items))
    for outcome in render(shots, context):
        if outcome.error:
            raise outcome.error
    plain, top, bottom = (shot.output for shot in shots.shots)
    return mean_difference(top, plain), mean_difference(bottom, plain)


def correlation(a: Sequence[float], b: Sequence[float], *, ranks: bool) -> float:
    """Return Pearson's correlation, or Spearman's for ranks."""
    if ranks:
        a, b = ([sorted(values).index(value) for value in values] for values in (a, b))
    return statistics.correlation(a, b)


def agreements(maps: Maps) -> Iterator[tuple[str, str, list[float]]]:
    """Yield the pairs compared, the method, and their correlations."""

    def across(method: Method, place: int) -> list[float]:
        keys = [key for key in maps if key[2] == method]
        pairs = [
            (a, b)
            for a, b in itertools.combinations(keys, 2)
            if a[place] != b[place] and a[1 - place] == b[1 - place]
        ]
        return [correlation(maps[a].total, maps[b].total, ranks=False) for a, b in pairs]

    for method in METHODS:
        yield "two seeds", method, across(method, 1)
        if len({key[0] for key in maps}) > 1:
            yield "two pairs of prompts", method, across(method, 0)
        levels = [
            correlation(a, b, ranks=False)
            for key, one in maps.items()
            if key[2] == method
            for a, b in itertools.combinations(one.values, 2)
        ]
        yield "two noise levels", method, levels
    for method in METHODS[1:]:
        with_inject = [
            correlation(one.total, maps[pair, seed, "inject"].total, ranks=True)
            for (pair, seed, other), one in maps.items()
            if other == method
        ]
        yield "ranks, with inject", method, with_inject


def costs(folder: Path, context: RenderContext, size: str) -> Iterator[tuple[str, float]]:
    """Yield the processor time of one noise level of each method, in forwards."""
    (shot,) = plan_job(folder, job(0, 0, size)).shots
    encoded, _ = encode_prompts(shot.model, shot.prompts, context)
    model = Networks(shot.model).transformer("only").requires_grad_(False)
    with torch.no_grad():
        place = _probe_point(model, shot, {id: one.embedding.rows_NE for id, one in encoded.items()})
        plain, depth = place.plain, len(place.plain)

        def forward() -> None:
            model(place.x_1CTYX, place.t, plain)

        def injected() -> None:
            rows = [[*plain[:b], place.injected[b], *plain[b + 1 :]] for b in range(depth)]
            list(sensitivity.predict_velocities(place, rows))

        def derived() -> None:
            list(sensitivity.compute_derivatives(place, torch.randn_like(place.x_1CTYX)))

        forward()
        took = {name: [0.0, 0.0] for name in ("inject", "gradient")}
        for _ in range(7):  # forwards before and after each: other work runs on the machine
            for name, work, times in (("inject", injected, 1), ("gradient", derived, 6)):
                around = _processor_time(forward, 11)
                took[name][0] += _processor_time(work, times) / times
                took[name][1] += (around + _processor_time(forward, 11)) / 22
    yield f"forward, {shot.tokens} tokens", took["inject"][1] / 7
    for name, (of_it, of_forward) in took.items():
        yield f"{name}, one level, in forwards", of_it / of_forward


def _processor_time(work: Callable[[], None], times: int) -> float:
    """Return the processor time of some runs."""
    began = time.process_time()
    for _ in range(times):
        work()
    return time.process_time() - began


def _probe_point(model: Any, shot: Shot, rows_NE: dict[str, Any]) -> sensitivity.ProbePoint:
    contexts = ContextCache(model, rows_NE)
    depth = shot.model.checkpoint.transformer_config.num_layers
    plain, injected = (
        [((contexts.context(Text(text.id)), 1.0),)] * depth for text in (shot.prompt, shot.injected[0])
    )
    x_1CTYX = denoise.draw_noise(shot.latent_shape, shot.seed)[None]
    return sensitivity.ProbePoint(model, x_1CTYX, shot.sigma_schedule.timesteps[3], plain, injected)


def main() -> None:
    parser = argparse.ArgumentParser(description="Block maps of wan-mini.")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--size", default="64x64")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        context = RenderContext(Store(folder / "cache" / "embeddings"), Progress())
        maps = measure_maps(folder, context, args.pairs, args.seeds, args.size)
        print(table(("agreement between", "by", "mean", "least", "of"), list(_agreement_cells(maps))))
        rows = []
        for pair, seed in itertools.product(range(args.pairs), range(args.seeds)):
            top, bottom = render_quarters(folder, context, maps, pair, seed, args.size)
            rows.append([str(pair), str(seed), f"{top:.1f}", f"{bottom:.1f}", f"{top / bottom:.1f}"])
        print(table(("prompts", "seed", "top quarter", "bottom quarter", "ratio"), rows))
        thirds = [_third_cells(maps, method) for method in METHODS]
        print(table(("mean of", "early", "middle", "late"), thirds))
        for method in METHODS:
            total = [statistics.mean(values) for values in zip(*_totals(maps, method))]
            print(f"- {method}, mean of all: {block_map.suggest_blocks(total, None)}")
        for what, value in costs(folder, context, args.size):
            print(f"- {what}: {value:.3g}")
    print(f"- {describe_machine()}")


def _agreement_cells(maps: Maps) -> Iterator[list[str]]:
    for what, method, values in agreements(maps):
        if values:
            yield [what, method, f"{statistics.mean(values):.2f}", f"{min(values):.2f}", str(len(values))]


def _totals(maps: Maps, method: Method) -> list[list[float]]:
    return [one.total for key, one in maps.items() if key[2] == method]


def _third_cells(maps: Maps, method: Method) -> list[str]:
    total = [statistics.mean(values) for values in zip(*_totals(maps, method))]
    shares = [
        statistics.mean(total[block] for block in parse_blocks(name, len(total)))
        for name in ("early", "middle", "late")
    ]
    return [method, *(f"{100 * share:.2f} %" for share in shares)]


if __name__ == "__main__":
    main()
