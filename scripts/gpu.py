"""`make gpu`: the tests that need a GPU, then one table in Markdown: a forward of 14B at 832x480x81.

Weights are random. Resident weights are made on the device, streamed weights are a checkpoint of 20 blocks
on disk. diffusers runs on the same tensors. TFLOP/s count the arithmetic of the plain network for all,
even if an implementation needs less. Without a GPU the script says so and exits with 0; `--device cpu --tiny`
runs all of it on a small model, as a check of the script.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from scripts.bench.markdown import table
from scripts.make_random_checkpoint import transformer_entries, write_safetensors
from wancli.models.attention import choose_backend
from wancli.models.config import ComputeOptions, WanConfig
from wancli.models.dit import WanModel
from wancli.models.dit_layers import CrossAttention
from wancli.resources import memory_model
from wancli.weights.formats.key_mapping import transformer_from_diffusers
from wancli.weights.formats.packed import Packed
from wancli.weights.formats.read import read_packed
from wancli.weights.fp8_linear import CAPABILITY, replace_with_fp8
from wancli.weights.loader import FP32_PARAMETERS, load_into
from wancli.weights.offload import OffloadedBlocks, matrix_names, place_weights

PROMPT = 60  # tokens
STREAMED_BLOCKS = 20
REPEATS = 3
T2V_14B = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
TINY = WanConfig(dim=96, ffn_dim=160, num_heads=4, num_layers=2, text_dim=32)
COLUMNS = ("what", "blocks", "s", "TFLOP/s", "peak GiB", "predicted GiB", "velocity off by")


@dataclass(frozen=True)
class Bench:
    """The device, the model and the sizes to measure."""

    device: str
    config: WanConfig
    latent: tuple[int, int, int, int]  # C T Y X
    streamed_blocks: int

    @property
    def tokens(self) -> int:
        _, t, y, x = self.latent
        return t * (y // 2) * (x // 2)

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Draw a noisy latent and the rows of a prompt, the same for all models."""
        generator = torch.Generator().manual_seed(1)
        x_BCTYX = torch.randn(1, *self.latent, generator=generator)
        text_NE = torch.randn(PROMPT, self.config.text_dim, generator=generator)
        return x_BCTYX.to(self.device), text_NE.to(self.device)


@dataclass(frozen=True)
class Row:
    """Median seconds of a forward; `peak` in bytes of the device, None on a CPU."""

    what: str
    config: WanConfig
    seconds: float
    peak: int | None
    predicted: int | None
    error: float | None

    def cells(self, tokens: int) -> list[str]:
        sizes = ["-" if n is None else f"{n / 2**30:.2f}" for n in (self.peak, self.predicted)]
        error = "-" if self.error is None else f"{100 * self.error:.2f} %"
        speed = f"{flop(self.config, tokens) / self.seconds / 1e12:.3g}"
        return [self.what, str(self.config.num_layers), f"{self.seconds:.3f}", speed, *sizes, error]


def flop(config: WanConfig, tokens: int) -> float:
    """Count the arithmetic of one plain forward with 512 text rows, without patches and head.

    Per block and token: 12*d^2 for the projections, 4*d*f for the feed-forward, 4*L*d and 4*512*d for the
    attentions; per block 4*512*d^2 for the text's keys and values.
    """
    d, f, rows = config.dim, config.ffn_dim, config.text_len
    block = tokens * (12 * d * d + 4 * d * f + 4 * tokens * d + 4 * rows * d) + 4 * rows * d * d
    return float(config.num_layers) * block


def random_model(bench: Bench, *, fp8: bool = False) -> WanModel:
    """Build a transformer of random weights on the device, as `load_transformer` does."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = WanModel(bench.config, ComputeOptions(fp8_matmul=fp8))
    matrices = frozenset(matrix_names(model.blocks, "blocks")) if fp8 else frozenset()
    tensors: dict[str, Tensor] = {}
    for name, meta in model.state_dict().items():
        dtype = torch.float32 if any(part in name for part in FP32_PARAMETERS) else torch.bfloat16
        tensor = meta.to(dtype) if name in matrices else _draw(name, meta, bench.device).to(dtype)
        tensors[name] = tensor
    model.load_state_dict(tensors, assign=True)
    if fp8:
        source = {name: _draw_fp8(tensors[name], bench.device) for name in matrices}
        replace_with_fp8(model.blocks, "blocks", source, bench.device)
    return model.eval()


def _draw(name: str, meta: Tensor, device: str) -> Tensor:
    if "norm" in name:
        return torch.full(meta.shape, float(name.endswith("weight")), device=device)
    return torch.randn(meta.shape, device=device).mul_(_std(meta))


def _draw_fp8(meta: Tensor, device: str) -> Packed:
    """Draw a matrix in e4m3 whose largest value is six standard deviations."""
    codes = torch.randn(meta.shape, device=device, dtype=torch.bfloat16).mul_(448 / 6).clamp_(-448, 448)
    shape = (meta.shape[0], meta.shape[1])
    return Packed("fp8", codes.to(torch.float8_e4m3fn), shape, torch.tensor(_std(meta) * 6 / 448))


def _std(meta: Tensor) -> float:
    """Return the standard deviation that keeps the variance of the inputs."""
    return 0.02 if meta.dim() == 1 else float(meta[0].numel()) ** -0.5


def streamed_model(bench: Bench, config: WanConfig, dtype: str, folder: Path) -> WanModel:
    """Build a transformer whose blocks stay in a file of random weights, bf16 or fp8."""
    path = folder / f"{dtype}.safetensors"
    write_safetensors(path, transformer_entries(config, dtype))
    weights = read_packed([path], rename=str)
    with torch.device("meta"):
        model = WanModel(config)
    matrices = matrix_names(model.blocks, "blocks")
    load_into(
        model,
        weights.items(),
        rename=str,
        dtype=torch.bfloat16,
        device=bench.device,
        keep_fp32=lambda name: any(part in name for part in FP32_PARAMETERS),
        where=str(path),
        keep_on_meta=frozenset(matrices),
    )
    source = place_weights({name: weights[name] for name in matrices}, "streamed", bench.device)
    model.blocks = OffloadedBlocks(model.blocks, "blocks", source, bench.device)
    return model.eval()


def diffusers_model(ours: WanModel) -> Any:
    """Build diffusers' transformer on our tensors; those that it does not keep in fp32 are cast to bf16."""
    config = ours.config
    with torch.device("meta"):
        theirs: Any = WanTransformer3DModel(  # type: ignore[no-untyped-call]
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
        )
    state = ours.state_dict()
    cast = {}
    for name in theirs.state_dict():
        tensor = state[transformer_from_diffusers(name)]
        keep = any(part in name.split(".") for part in theirs._keep_in_fp32_modules)
        cast[name] = tensor if keep else tensor.to(torch.bfloat16)
    theirs.load_state_dict(cast, assign=True)
    rope = type(theirs.rope)(config.head_dim, (1, 2, 2), 1024)  # its tables are buffers, not in the state
    theirs.rope = rope.to(ours.head.modulation.device)
    return theirs.eval()


def compile_blocks(bench: Bench, blocks: nn.ModuleList) -> None:
    """Compile blocks in place, all of them to one program; on a CPU only to a graph.

    The function that fills the cache of keys and values is not compiled: the entries of the cache would be
    guards, and each block would get its own program.
    """
    outside = torch.compiler.disable(CrossAttention.keys_values)  # type: ignore[no-untyped-call]
    CrossAttention.keys_values = outside  # type: ignore[method-assign]
    for block in blocks:
        block.compile(backend="inductor" if bench.device == "cuda" else "eager")


def measure(bench: Bench, forward: Callable[[], Tensor]) -> tuple[Tensor, float, int | None]:
    """Return the last velocity, median seconds and the device's peak, after a warm-up."""
    forward()
    gc.collect()
    cuda = bench.device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(REPEATS):
        _synchronize(cuda)
        start = time.perf_counter()
        velocity = forward()
        _synchronize(cuda)
        seconds.append(time.perf_counter() - start)
    return velocity, statistics.median(seconds), torch.cuda.max_memory_allocated() if cuda else None


def _synchronize(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def wancli_row(
    bench: Bench, what: str, model: WanModel, expected: Tensor | None, predicted: int
) -> tuple[Row, Tensor]:
    x_BCTYX, text_NE = bench.inputs()
    mixes = [((model.project(text_NE), 1.0),)] * model.config.num_layers
    velocity, seconds, peak = measure(bench, lambda: model(x_BCTYX, 500.0, mixes))
    return Row(what, model.config, seconds, peak, predicted, _relative_error(velocity, expected)), velocity


def diffusers_row(bench: Bench, what: str, ours: WanModel, theirs: Any, expected: Tensor) -> Row:
    x_BCTYX, text_NE = bench.inputs()
    text_BNE = F.pad(text_NE, (0, 0, 0, ours.config.text_len - PROMPT))[None].to(torch.bfloat16)
    t, x_BCTYX = torch.tensor([500.0], device=bench.device), x_BCTYX.to(torch.bfloat16)
    velocity, seconds, peak = measure(bench, lambda: theirs(x_BCTYX, t, text_BNE).sample)
    return Row(what, ours.config, seconds, peak, None, _relative_error(velocity.float(), expected))


def _relative_error(velocity: Tensor, expected: Tensor | None) -> float | None:
    if expected is None:
        return None
    return float(torch.linalg.vector_norm(velocity - expected) / torch.linalg.vector_norm(expected))


def predict_peak(bench: Bench, config: WanConfig, *, resident: int = 0, blocks: int | None = None) -> int:
    coefficients = memory_model.sample_coefficients(config, element_bytes=2, blocks_in_memory=blocks)
    return resident + coefficients.phase(bench.latent, text_rows=PROMPT + 1).total


@torch.no_grad()
def rows(bench: Bench, folder: Path) -> Iterator[Row]:
    """Measure bf16 and diffusers, then fp8, then streamed weights; resident models also compiled."""
    config = bench.config
    model = random_model(bench)
    row, exact = wancli_row(bench, "bf16", model, None, predict_peak(bench, config))
    yield row
    theirs = diffusers_model(model)
    yield diffusers_row(bench, "diffusers, bf16", model, theirs, exact)
    compile_blocks(bench, model.blocks)
    yield wancli_row(bench, "bf16, compiled", model, exact, predict_peak(bench, config))[0]
    compile_blocks(bench, theirs.blocks)
    yield diffusers_row(bench, "diffusers, bf16, compiled", model, theirs, exact)
    del model, theirs, exact
    if bench.device == "cpu" or torch.cuda.get_device_capability() >= CAPABILITY:
        model = random_model(bench, fp8=True)
        need = predict_peak(bench, config, resident=memory_model.fp8_bytes(config), blocks=0)
        row, exact = wancli_row(bench, "fp8 products", model, None, need)
        yield row
        compile_blocks(bench, model.blocks)
        yield wancli_row(bench, "fp8 products, compiled", model, exact, need)[0]
        del model, exact
    fewer = replace(config, num_layers=bench.streamed_blocks)
    yield wancli_row(
        bench, "bf16", random_model(replace(bench, config=fewer)), None, predict_peak(bench, fewer)
    )[0]
    for dtype in ("bf16", "fp8"):
        model = streamed_model(bench, fewer, dtype, folder)
        yield wancli_row(bench, f"{dtype}, streamed", model, None, predict_peak(bench, fewer, blocks=2))[0]
        del model


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Test and measure on a GPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model, as a check of the script")
    parser.add_argument("--no-tests", action="store_true", help="the table only")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("make gpu: NO GPU HERE: torch sees no CUDA device. Nothing was tested, nothing measured.")
        return 0
    failed = 0
    if args.device == "cuda" and not args.no_tests:
        failed = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu"], check=False).returncode
    bench = Bench(args.device, T2V_14B, (16, 21, 60, 104), STREAMED_BLOCKS)
    if args.tiny:
        bench = Bench(args.device, TINY, (16, 2, 8, 8), 2)
    with tempfile.TemporaryDirectory() as folder:
        cells = [row.cells(bench.tokens) for row in rows(bench, Path(folder))]
    print(table(COLUMNS, cells))
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    backend = choose_backend(args.device, torch.bfloat16, bench.config.head_dim)
    print(f"\n{datetime.date.today()}, {name}, torch {torch.__version__}, {bench.tokens:,} tokens, {backend}")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
