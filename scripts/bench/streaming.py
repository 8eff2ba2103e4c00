"""Measure the overhead of streaming: the same forwards with resident and streamed blocks, in alternation.

    python -m scripts.bench.streaming [--tiny] [--dir DIR]

Blocks of 14B in fp8, in one process. Two distinct blocks are repeated to the depth of a deep model, so that
the resident model needs the memory of two. The file is in the page cache, as it is after the first step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

# As the command sets them; read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from torch import nn

from scripts.bench.markdown import describe_machine, table
from scripts.make_random_checkpoint import MODELS, write_checkpoint
from wancli.models.config import WanConfig
from wancli.models.dit import Request, WanModel
from wancli.models.dit_layers import Blocks
from wancli.weights.checkpoint import Checkpoint, identify
from wancli.weights.loader import load_transformer, read_transformer_weights
from wancli.weights.offload import OffloadedBlocks, matrix_names, place_weights

DISTINCT = 2
PROMPT = 60  # tokens
TINY = WanConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=DISTINCT, text_dim=32, freq_dim=64)
COLUMNS = ("forwards of one pass", "resident s/block", "streamed s/block", "overhead", "best runs")


@dataclass(frozen=True)
class Case:
    """Forwards batched on one pass over `depth` blocks.

    A pass waits for its first block, so a pass over few blocks has more overhead than one over 40.
    """

    forwards: int
    grid: tuple[int, int, int]  # of the latent
    depth: int
    rounds: int

    @property
    def what(self) -> str:
        t, y, x = self.grid
        return f"{self.forwards} of {t * y * x // 4} tokens"


CASES = (Case(1, (1, 32, 32), depth=16, rounds=3), Case(2, (2, 32, 32), depth=6, rounds=2))
TINY_CASES = (Case(1, (1, 8, 8), depth=3, rounds=1), Case(2, (2, 8, 8), depth=5, rounds=1))


@dataclass(frozen=True)
class Overhead:
    """Seconds per block of each run, resident and streamed."""

    what: str
    resident: Sequence[float]
    streamed: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.streamed) / statistics.median(self.resident) - 1

    @property
    def best(self) -> float:
        return min(self.streamed) / min(self.resident) - 1

    def cells(self) -> list[str]:
        medians = (f"{statistics.median(runs):.3f}" for runs in (self.resident, self.streamed))
        return [self.what, *medians, f"{self.median:+.1%}", f"{self.best:+.1%}"]


def build_models(folder: Path, config: WanConfig, depth: int) -> tuple[WanModel, WanModel]:
    """Build a resident and a streamed model of `depth` blocks, which share all layers outside the blocks."""
    checkpoint = _make_checkpoint(folder, config)
    resident = load_transformer(checkpoint)
    streamed = WanModel.__new__(WanModel)
    nn.Module.__init__(streamed)
    streamed.config = resident.config
    for name, child in resident.named_children():
        streamed.add_module(name, child)
    blocks = list(resident.blocks)
    with torch.device("meta"):
        meta_blocks = WanModel(replace(config, num_layers=depth)).blocks
    _load_small_weights(meta_blocks, blocks)
    weights = read_transformer_weights(checkpoint)
    names = matrix_names(meta_blocks, "blocks")
    source = {name: weights[_distinct_name(name)] for name in names}
    streamed.blocks = OffloadedBlocks(meta_blocks, "blocks", place_weights(source, "streamed", "cpu"), "cpu")
    resident.blocks = Blocks(blocks[i % DISTINCT] for i in range(depth))
    return resident, streamed.eval()


def _make_checkpoint(folder: Path, config: WanConfig) -> Checkpoint:
    """Return the checkpoint of two blocks; make it if it does not exist."""
    if not folder.exists():
        write_checkpoint(
            folder, replace(config, num_layers=DISTINCT), dtype="fp8", text_encoder="tiny", vae="tiny"
        )
    return identify(folder)


def _distinct_name(name: str) -> str:
    """Return the name in the checkpoint of a matrix of the deep model."""
    _, index, part = name.split(".", 2)
    return f"blocks.{int(index) % DISTINCT}.{part}"


def _load_small_weights(meta_blocks: nn.ModuleList, blocks: Sequence[nn.Module]) -> None:
    """Load everything except the matrices into blocks on the meta device."""
    for i, block in enumerate(meta_blocks):
        state = blocks[i % DISTINCT].state_dict()
        small = {name: tensor for name, tensor in state.items() if tensor.dim() != 2}
        block.load_state_dict(small, strict=False, assign=True)


@torch.inference_mode()
def measure(models: tuple[WanModel, WanModel], case: Case) -> Overhead:
    """Time both models. The warm-up computes text keys and values."""
    torch.manual_seed(0)
    config = models[0].config
    context = models[0].project(torch.randn(PROMPT, config.text_dim))
    x_BCTYX = torch.randn(1, config.in_dim, *case.grid)
    requests = [Request(x_BCTYX, 500.0, [((context, 1.0),)] * case.depth) for _ in range(case.forwards)]
    runs = [_run_of(model, requests) for model in models]
    if not torch.equal(*(run()[0] for run in runs)):
        raise AssertionError("resident and streamed blocks differ")
    seconds: list[list[float]] = [[], []]
    for _ in range(case.rounds):
        for run, log in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            log.append((time.perf_counter() - start) / case.depth)
    return Overhead(case.what, *seconds)


def _run_of(model: WanModel, requests: Sequence[Request]) -> Callable[[], list[torch.Tensor]]:
    return lambda: model.predict_velocities(requests)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="Measure the overhead of streaming.")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: does it run?")
    parser.add_argument("--dir", type=Path, help="folder of the checkpoint; made if missing")
    args = parser.parse_args(argv)
    config, cases = (TINY, TINY_CASES) if args.tiny else (MODELS["14B"], CASES)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.dir or Path(temporary) / "model"
        rows = [measure(build_models(folder, config, case.depth), case) for case in cases]
    print(table(COLUMNS, [row.cells() for row in rows]))
    print(
        f"{describe_machine()}; " + ", ".join(f"{case.rounds} runs of {case.depth} blocks" for case in cases)
    )


if __name__ == "__main__":
    main(sys.argv[1:])
