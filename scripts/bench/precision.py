"""`python -m scripts.bench.precision`: the error of each format of weights, as a table in Markdown.

The error is that of the velocity compared with fp32, |v - v_fp32| / |v_fp32|, from the same latents and text,
which are noise. The models are two random blocks of 14B's widths under its head, one block in memory at a
time; wan-mini; and the tests' random checkpoint. Its rows of 48 and wan-mini's rows of 88 do not fit GGUF
blocks. Takes some minutes.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Large pages for tensors of many MB save two thirds of the time. Read when torch is first imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from torch import Tensor, nn

from scripts.bench.markdown import describe_machine
from scripts.bench.quantize import to_blocks
from wancli import wan_mini
from wancli.models.config import ComputeOptions, WanConfig
from wancli.models.dit import Block, Head, WanModel
from wancli.models.dit_layers import rope_table
from wancli.models.text_context import from_padded_rows
from wancli.weights.checkpoint import identify
from wancli.weights.formats.packed import FP8_MAX, Packed, pack_fp8
from wancli.weights.loader import FP32_PARAMETERS, read_transformer_weights

TINY = Path(__file__).parents[2] / "tests" / "fixtures" / "wan21-tiny"
MATRIX = re.compile(r"(blocks\.\d+\.)?((self|cross)_attn\.[qkvo]|ffn\.[02])\.weight")
WIDE = WanConfig(5120, 13824, 40, 2)
SPREAD = 0.02  # standard deviation of the random matrices: plain fp8 depends on it, scaled fp8 does not
GRID = (2, 4, 8)  # 64 tokens
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True)
class Mode:
    """The format of the blocks' matrices, and the dtype of their products."""

    store: Callable[[Tensor], Tensor | Packed]
    compute_dtype: torch.dtype = torch.float32


def _as_is(weight: Tensor) -> Tensor:
    return weight


def _per_tensor(weight: Tensor) -> Packed:
    scale = weight.abs().max() / FP8_MAX
    return Packed("fp8", (weight / scale).to(E4M3), tuple(weight.shape), scale)


def _cast(dtype: torch.dtype) -> Callable[[Tensor], Packed]:
    return lambda weight: Packed("fp8", weight.to(dtype), tuple(weight.shape))


def _gguf(kind: str) -> Callable[[Tensor], Packed]:
    return lambda weight: to_blocks(weight, kind)


FP32 = Mode(_as_is)
GGUF = ("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "Q3_K", "Q2_K")
MODES: dict[str, Mode] = {
    "fp16": Mode(_as_is, torch.float16),
    "bf16": Mode(_as_is, torch.bfloat16),
    "fp8 made at load (a scale per row)": Mode(pack_fp8),
    "fp8 e4m3, a scale per tensor": Mode(_per_tensor),
    "fp8 e4m3, plain": Mode(_cast(E4M3)),
    "fp8 e5m2, plain": Mode(_cast(E5M2)),
    **{f"GGUF {kind}": Mode(_gguf(kind)) for kind in GGUF},
}


def main() -> None:
    columns = {
        "two blocks of 14B": two_blocks(WIDE),
        "wan-mini": whole_model(wan_mini.FOLDER),
        "random, 40 blocks of width 48": whole_model(TINY),
    }
    exact = {name: velocity(FP32) for name, velocity in columns.items()}
    print(f"| stored as | {' | '.join(columns)} |")
    print("| --- |" + " ---: |" * len(columns))
    for name, mode in MODES.items():
        cells = [format_error(velocity, mode, exact[column]) for column, velocity in columns.items()]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print(f"\n- {describe_machine()}")
    print(f"- at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB of memory")


def format_error(velocity: Callable[[Mode], Tensor], mode: Mode, exact: Tensor) -> str:
    try:
        return f"{100 * relative_error(velocity(mode), exact):.2g} %"
    except ValueError:  # rows that do not fit GGUF blocks
        return "-"


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Return |result - exact| / |exact|."""
    return float(torch.linalg.vector_norm(result - exact) / torch.linalg.vector_norm(exact))


def whole_model(folder: Path) -> Callable[[Mode], Tensor]:
    """Return a function of a mode: the velocity of a checkpoint at an early and a late step."""
    checkpoint = identify(folder)
    config = checkpoint.transformer_config
    weights = read_transformer_weights(checkpoint)
    x_BCTYX, text_NE = noise(1, config.in_dim, 2, 8, 8), noise(20, config.text_dim)

    @torch.inference_mode()
    def velocity(mode: Mode) -> Tensor:
        with torch.device("meta"):
            model = WanModel(config)
        fill(model, lambda name: weights[name].unpack(torch.float32), mode)
        contexts = [((model.project(text_NE), 1.0),)] * config.num_layers
        return torch.cat([model(x_BCTYX, t, contexts) for t in (900.0, 400.0)])

    return velocity


def two_blocks(config: WanConfig) -> Callable[[Mode], Tensor]:
    """Return a function of a mode: the head's output for random tokens after random blocks.

    One block is in memory at a time.
    """
    with torch.device("meta"):
        head = Head(config)
    fill(head, random_weights(head, 0), FP32)

    @torch.inference_mode()
    def velocity(mode: Mode) -> Tensor:
        mix = ((from_padded_rows(noise(20, config.dim), config.text_len), 1.0),)
        time_BD, time_B6D = 0.3 * noise(1, config.dim), 0.3 * noise(1, 6, config.dim)
        rope_L1P = rope_table(GRID, config.head_dim, time_BD.device)
        x_BLD = noise(1, len(rope_L1P), config.dim)
        for number in range(1, config.num_layers + 1):
            with torch.device("meta"):
                block = Block(config, ComputeOptions())
            fill(block, random_weights(block, number), mode)
            x_BLD = block(x_BLD, time_B6D, rope_L1P, mix)
        v_BLF: Tensor = head(x_BLD, time_BD)
        return v_BLF

    return velocity


def fill(module: nn.Module, weight: Callable[[str], Tensor], mode: Mode) -> None:
    """Load weights one by one into a module on the meta device, as `load_into` does.

    The matrices of blocks pass through the format of the mode.
    """
    made: dict[str, Tensor] = {}
    for name in module.state_dict():
        dtype = torch.float32 if any(part in name for part in FP32_PARAMETERS) else mode.compute_dtype
        stored = mode.store(weight(name)) if MATRIX.fullmatch(name) else weight(name)
        made[name] = stored.unpack(dtype) if isinstance(stored, Packed) else stored.to(dtype)
    module.load_state_dict(made, assign=True)


def random_weights(module: nn.Module, seed: int) -> Callable[[str], Tensor]:
    """Return a function from a name to random weights: norms around 1, all others around 0."""
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    seeds = {name: 100 * seed + index for index, name in enumerate(shapes)}
    ones = {name for name in shapes if "norm" in name and name.endswith("weight")}
    return lambda name: noise(*shapes[name], seed=seeds[name]).mul_(SPREAD).add_(float(name in ones))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


if __name__ == "__main__":
    main()
