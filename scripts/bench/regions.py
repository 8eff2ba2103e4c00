"""`python -m scripts.bench.regions`: what a rule in an area costs in a forward, as a table in Markdown.

All variants run in turn in one process, and the fastest run of each counts: another process may disturb any
run. `cross-attention` is that layer alone. Networks are random, of the widths of 1.3B. Takes some minutes.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping
from functools import partial

# Large pages for tensors of many MB; read when torch is first imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch

from scripts.bench.markdown import describe_machine, table
from wancli.injection.area import Area
from wancli.injection.contexts import ContextCache, TokenAreas
from wancli.injection.exprs import Cell, Text
from wancli.injection.table import Rule, apply_rule
from wancli.models.config import ComputeOptions, WanConfig
from wancli.models.dit import Block, WanModel

CONFIG = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=1)
GRID = (5, 60, 104)  # of a latent: 7,800 tokens
PROMPTS = {"main": 60, "other": 60, "third": 60}  # their tokens
CHUNK = 2048  # tokens
LEFT, RIGHT = Area(region=(0, 0, 0.5, 1)), Area(region=(0.5, 0, 1, 1))
SOFT, EARLY = Area(region=(0.5, 0, 1, 1), feather=0.5), Area(frames=(0, 8))


def inject(*areas: Area | None) -> Cell:
    """Return a cell in which each area reads another prompt."""
    cell: Cell = ((Text("main"), 1.0),)
    for text, area in zip(("other", "third"), areas):
        rule = Rule(text, ((0, 1.0),), ((0, 1.0),), ("cond",), "replace", 1.0, area=area)
        cell = apply_rule(rule, cell, Text("main"), 1.0)
    return cell


def lerp(area: Area) -> Cell:
    rule = Rule("other", ((0, 0.6),), ((0, 1.0),), ("cond",), "context-lerp", 1.0, area=area)
    return apply_rule(rule, ((Text("main"), 1.0),), Text("main"), 0.6)


CELLS: Mapping[str, Cell] = {
    "plain": ((Text("main"), 1.0),),
    "hard region, right half": inject(RIGHT),
    "the same, context-lerp": lerp(RIGHT),
    "feathered region": inject(SOFT),
    "two regions, left and right": inject(LEFT, RIGHT),
    "frames 0-8": inject(EARLY),
}
IN_CHUNKS = ("plain", "hard region, right half", "frames 0-8")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layer", action="store_true", help="measure cross-attention alone")
    options = parser.parse_args()
    torch.manual_seed(0)
    whole = WanModel(CONFIG).eval()
    chunked = WanModel(CONFIG, ComputeOptions(chunk=CHUNK)).eval()
    chunked.load_state_dict(whole.state_dict(), assign=True)
    texts = {id: torch.randn(count, CONFIG.text_dim) for id, count in PROMPTS.items()}
    x_BCTYX = torch.randn(1, CONFIG.in_dim, *GRID)
    areas = TokenAreas.of_latent(x_BCTYX[0])
    x_BLD = torch.randn(1, GRID[0] * GRID[1] * GRID[2] // 4, CONFIG.dim)
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for name, model in (
        () if options.layer else (("forward", whole), (f"forward, chunks of {CHUNK:,}", chunked))
    ):
        cache = ContextCache(model, texts)
        for cell_name in CELLS if model is whole else IN_CHUNKS:
            cell = CELLS[cell_name]
            runs[name, cell_name] = partial(model, x_BCTYX, 500.0, [cache.mix(cell, areas)])
    cache, block = ContextCache(whole, texts), whole.blocks[0]
    assert isinstance(block, Block)
    for cell_name, cell in CELLS.items():
        runs["cross-attention", cell_name] = partial(block.cross_attn, x_BLD, cache.mix(cell, areas))
    seconds = {key: float("inf") for key in runs}
    for _ in range(options.rounds):
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[key] = min(seconds[key], time.perf_counter() - start)
    columns = [*dict.fromkeys(name for name, _ in runs)]

    def to_cell(name: str, reads: str) -> str:
        if (name, reads) not in seconds:
            return ""
        took, plain = seconds[name, reads], seconds[name, "plain"]
        return f"{took:.3f} ({100 * (took / plain - 1):+.1f} %)"

    rows = [[reads, *(to_cell(name, reads) for name in columns)] for reads in CELLS]
    print(table(["reads", *(f"{name}, s" for name in columns)], rows))
    print(f"- {describe_machine()}; fastest of {options.rounds} runs, in turn")


if __name__ == "__main__":
    main()
