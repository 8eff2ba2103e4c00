"""What block maps of wan-mini show, and how sure they are.

    python -m scripts.bench.probe [--pairs 3] [--seeds 2] [--size 64x64]

For each pair of prompts and each seed a map by every method at three noise levels, and three renders: plain,
and injected into the top and the bottom quarter of the blocks by the map, which `auto:top10` and
`auto:bottom10` take. Then what agrees with what, and how long a map takes, in forwards of the same process.
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

from scripts.bench.markdown import stamp, table
from wancli.engine.batch import render
from wancli.engine.context import RenderContext
from wancli.engine.encode_stage import encode_prompts
from wancli.engine.networks import Networks
from wancli.injection import block_map
from wancli.injection.block_map import BlockMap, BlockMapStore, Method
from wancli.injection.contexts import ContextCache
from wancli.injection.table import Text, parse_blocks
from wancli.job.loader import parse
from wancli.plan.planner import build_plan
from wancli.plan.shot import Plan, Shot
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
Found = dict[tuple[int, int, Method], BlockMap]  # by pair, seed and method


def job(pair: int, seed: int, size: str, **more: Any) -> dict[str, Any]:
    main, injected = PAIRS[pair]
    rule = {"prompt": injected, **more.pop("rule", {})}
    return {"prompt": main, "seed": seed, "size": size, "output": "{id}.mp4", "inject": [rule], **more}


def planned(folder: Path, said: dict[str, Any], *, unmeasured: bool = False) -> Plan:
    file = parse(json.dumps(said).encode(), "job", "job", folder)
    return build_plan(file, folder / "cache" / "hashes.json", allow_missing_maps=unmeasured)


def surveyed(folder: Path, tools: RenderContext, pairs: int, seeds: int, size: str) -> Found:
    found: Found = {}
    for pair, seed, method in itertools.product(range(pairs), range(seeds), METHODS):
        asked = request.plan_probe(planned(folder, job(pair, seed, size)), method, 3, None, None)
        found[pair, seed, method] = run.run_probe(asked, tools)
    return found


def rendered(
    folder: Path, tools: RenderContext, found: Found, pair: int, seed: int, size: str
) -> tuple[float, float]:
    """Mean |difference| from the plain video: of the top and of the bottom quarter of the blocks."""
    shelf = BlockMapStore(folder / "cache" / "maps")
    shelf.put(found[pair, seed, "inject"])
    name = f"{pair}-{seed}"
    quarter = found[pair, seed, "inject"].model.blocks // 4
    items = [{"id": f"{name}-plain", "inject": []}] + [
        {"id": f"{name}-{end}", "inject": [{"prompt": PAIRS[pair][1], "blocks": f"auto:{end}{quarter}"}]}
        for end in ("top", "bottom")
    ]
    shots = planned(folder, job(pair, seed, size, items=items))
    for outcome in render(shots, tools):
        if outcome.error:
            raise outcome.error
    plain, top, bottom = (shot.output for shot in shots.shots)
    return mean_difference(top, plain), mean_difference(bottom, plain)


def correlation(a: Sequence[float], b: Sequence[float], *, ranks: bool) -> float:
    """Pearson's, or of ranks Spearman's."""
    if ranks:
        a, b = ([sorted(values).index(value) for value in values] for values in (a, b))
    return statistics.correlation(a, b)


def agreements(found: Found) -> Iterator[tuple[str, str, list[float]]]:
    """What is compared, by what, and the correlations."""

    def across(method: Method, place: int) -> list[float]:
        keys = [key for key in found if key[2] == method]
        pairs = [
            (a, b)
            for a, b in itertools.combinations(keys, 2)
            if a[place] != b[place] and a[1 - place] == b[1 - place]
        ]
        return [correlation(found[a].total, found[b].total, ranks=False) for a, b in pairs]

    for method in METHODS:
        yield "two seeds", method, across(method, 1)
        if len({key[0] for key in found}) > 1:
            yield "two pairs of prompts", method, across(method, 0)
        levels = [
            correlation(a, b, ranks=False)
            for key, one in found.items()
            if key[2] == method
            for a, b in itertools.combinations(one.values, 2)
        ]
        yield "two noise levels", method, levels
    for method in METHODS[1:]:
        with_inject = [
            correlation(one.total, found[pair, seed, "inject"].total, ranks=True)
            for (pair, seed, other), one in found.items()
            if other == method
        ]
        yield "ranks, with inject", method, with_inject


def costs(folder: Path, tools: RenderContext, size: str) -> Iterator[tuple[str, float]]:
    """One noise level of each method in forwards, in processor time."""
    (shot,) = planned(folder, job(0, 0, size)).shots
    encoded, _ = encode_prompts(shot.model, shot.prompts, tools)
    model = Networks(shot.model).transformer("only").requires_grad_(False)
    with torch.no_grad():
        place = _place(model, shot, {id: one.embedding.rows_NE for id, one in encoded.items()})
        plain, depth = place.plain, len(place.plain)

        def forward() -> None:
            model(place.x_1CTYX, place.t, plain)

        def injected() -> None:
            rows = [[*plain[:b], place.injected[b], *plain[b + 1 :]] for b in range(depth)]
            list(sensitivity.velocities(place, rows))

        def derived() -> None:
            list(sensitivity.derivatives(place, torch.randn_like(place.x_1CTYX)))

        forward()
        took = {name: [0.0, 0.0] for name in ("inject", "gradient")}
        for _ in range(7):  # forwards before and after each, for what else runs on the machine
            for name, work, times in (("inject", injected, 1), ("gradient", derived, 6)):
                around = _seconds(forward, 11)
                took[name][0] += _seconds(work, times) / times
                took[name][1] += (around + _seconds(forward, 11)) / 22
    yield f"forward, {shot.tokens} tokens", took["inject"][1] / 7
    for name, (of_it, of_forward) in took.items():
        yield f"{name}, one level, in forwards", of_it / of_forward


def _seconds(work: Callable[[], None], times: int) -> float:
    """Processor time."""
    began = time.process_time()
    for _ in range(times):
        work()
    return time.process_time() - began


def _place(model: Any, shot: Shot, rows_NE: dict[str, Any]) -> sensitivity.ProbePoint:
    contexts = ContextCache(model, rows_NE)
    depth = shot.model.checkpoint.transformer.num_layers
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
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tools = RenderContext(Store(folder / "cache" / "embeddings"), Progress())
        found = surveyed(folder, tools, said.pairs, said.seeds, said.size)
        print(table(("agreement between", "by", "mean", "least", "of"), list(_cells(found))))
        rows = []
        for pair, seed in itertools.product(range(said.pairs), range(said.seeds)):
            top, bottom = rendered(folder, tools, found, pair, seed, said.size)
            rows.append([str(pair), str(seed), f"{top:.1f}", f"{bottom:.1f}", f"{top / bottom:.1f}"])
        print(table(("prompts", "seed", "top quarter", "bottom quarter", "ratio"), rows))
        thirds = [_thirds(found, method) for method in METHODS]
        print(table(("mean of", "early", "middle", "late"), thirds))
        for method in METHODS:
            total = [statistics.mean(values) for values in zip(*_of(found, method))]
            print(f"- {method}, mean of all: {block_map.suggest_blocks(total, None)}")
        for what, value in costs(folder, tools, said.size):
            print(f"- {what}: {value:.3g}")
    print(f"- {stamp()}")


def _cells(found: Found) -> Iterator[list[str]]:
    for what, method, values in agreements(found):
        if values:
            yield [what, method, f"{statistics.mean(values):.2f}", f"{min(values):.2f}", str(len(values))]


def _of(found: Found, method: Method) -> list[list[float]]:
    return [one.total for key, one in found.items() if key[2] == method]


def _thirds(found: Found, method: Method) -> list[str]:
    total = [statistics.mean(values) for values in zip(*_of(found, method))]
    shares = [
        statistics.mean(total[block] for block in parse_blocks(name, len(total)))
        for name in ("early", "middle", "late")
    ]
    return [method, *(f"{100 * share:.2f} %" for share in shares)]


if __name__ == "__main__":
    main()
