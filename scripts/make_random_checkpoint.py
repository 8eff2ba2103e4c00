"""Write a text-to-video checkpoint of random weights and full size, in the official layout.

    python scripts/make_random_checkpoint.py out/random-14B --model 14B --text-encoder tiny --vae tiny
    python scripts/make_random_checkpoint.py out/random-fp8 --model 14B --dtype fp8 --blocks 10

For measuring memory and speed without the real weights. Names, shapes and dtypes are those of the published
files, activations stay finite through 40 blocks, and the videos are noise. Tensors are drawn and written in
pieces, so that a model of any size needs less than 1 GiB. The same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from wancli.models import t5
from wancli.models.config import T5Config, VAEConfig, WanConfig
from wancli.models.dit import WanModel
from wancli.models.vae import WanVAE
from wancli.weights.formats.key_mapping import UMT5_BLOCK_TO_TRANSFORMERS, umt5_to_transformers

MODELS = {
    "14B": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
    "1.3B": WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
}
UMT5_XXL = T5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
FIXTURE = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "wan21-tiny"
TOKENIZER, TINY_VAE = "google/umt5-xxl/spiece.model", "Wan2.1_VAE.pth"
FIXTURE_PIECES = 384  # of its tokenizer

PIECE = 2**24  # elements written at a time
SHARD = 5 * 2**30  # bytes
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}
FP8_MAX, SIGMAS = 448.0, 6.0  # the scale maps six standard deviations to the largest fp8


@dataclass(frozen=True)
class Entry:
    """A tensor to write: its mean and standard deviation; `dtype` is a name of safetensors."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    std: float
    mean: float = 0.0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def pieces(self) -> Iterator[Tensor]:
        """Draw the elements in order. The seed is the name, so every call yields the same."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        dtype, left = DTYPES[self.dtype], math.prod(self.shape)
        most = torch.finfo(dtype).max  # beyond it fp8 is NaN
        while left:
            values = torch.randn(min(left, PIECE), generator=generator)
            yield values.mul_(self.std).add_(self.mean).clamp_(-most, most).to(dtype)
            left -= len(values)


def transformer_entries(config: WanConfig, dtype: str) -> list[Entry]:
    """List the tensors of a transformer in fp32, bf16, or ComfyUI's fp8_scaled.

    In fp8_scaled the matrices of the blocks are fp8, each with a `scale_weight`.
    """
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in WanModel(config).state_dict().items()}
    entries = []
    for name, shape in shapes.items():
        if dtype == "fp8" and name.startswith("blocks.") and len(shape) == 2:
            scale = _std(shape) * SIGMAS / FP8_MAX
            entries.append(Entry(name, shape, "F8_E4M3", _std(shape) / scale))
            entries.append(Entry(name.replace(".weight", ".scale_weight"), (), "F32", 0.0, scale))
        else:
            entries.append(_float_entry(name, shape, "F32" if dtype == "fp32" else "BF16"))
    if dtype == "fp8":
        entries.append(Entry("scaled_fp8", (2,), "F8_E4M3", 0.0))  # two elements: multiply in full precision
    return entries


def umt5_entries(config: T5Config) -> list[Entry]:
    """List the tensors of UMT5 under the official names, in bf16."""
    shapes = {name: tuple(tensor.shape) for name, tensor in t5.build_encoder(config).state_dict().items()}
    names = ["token_embedding.weight", "norm.weight"]
    names += [
        f"blocks.{i}.{part}.weight" for i in range(config.num_layers) for part in UMT5_BLOCK_TO_TRANSFORMERS
    ]
    entries = []
    for name in names:
        entry = _float_entry(name, shapes[umt5_to_transformers(name)], "BF16")
        # T5 does not scale scores by the width of a head: its queries are that much smaller.
        std = entry.std / math.sqrt(config.d_kv) if ".attn.q." in name else entry.std
        entries.append(Entry(name, entry.shape, "BF16", 1.0 if "embedding" in name else std, entry.mean))
    return entries


def vae_entries() -> list[Entry]:
    with torch.device("meta"):
        state = WanVAE(VAEConfig()).state_dict()
    return [_float_entry(name, tuple(tensor.shape), "F32") for name, tensor in state.items()]


def _float_entry(name: str, shape: tuple[int, ...], dtype: str) -> Entry:
    if "norm" in name or name.endswith("gamma"):
        return Entry(name, shape, dtype, 0.0, 0.0 if name.endswith("bias") else 1.0)
    if name.endswith("modulation"):
        return Entry(name, shape, dtype, 1 / math.sqrt(shape[-1]))
    return Entry(name, shape, dtype, 0.02 if name.endswith("bias") else _std(shape))


def _std(shape: tuple[int, ...]) -> float:
    """Return the standard deviation that keeps the variance of the inputs."""
    return 1 / math.sqrt(math.prod(shape[1:]))


def write_safetensors(path: Path, entries: Sequence[Entry]) -> None:
    """Write a file as https://github.com/huggingface/safetensors#format describes."""
    header, end = {}, 0
    for entry in entries:
        offsets = [end, end := end + entry.nbytes]
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            for piece in entry.pieces():
                file.write(piece.view(torch.uint8).numpy().data)


def write_sharded(folder: Path, entries: Sequence[Entry], most: int) -> None:
    """Write one file, or shards of at most `most` bytes and their index.

    The widest dtypes come first, so that every tensor is aligned.
    """
    shards: list[list[Entry]] = [[]]
    for entry in sorted(entries, key=lambda entry: -DTYPES[entry.dtype].itemsize):
        if shards[-1] and sum(e.nbytes for e in shards[-1]) + entry.nbytes > most:
            shards.append([])
        shards[-1].append(entry)
    stem = "diffusion_pytorch_model"
    if len(shards) == 1:
        write_safetensors(folder / f"{stem}.safetensors", shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, shard)
        weight_map |= {entry.name: name for entry in shard}
    total = sum(entry.nbytes for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_checkpoint(
    folder: Path, config: WanConfig, *, dtype: str, text_encoder: str, vae: str, most: int = SHARD
) -> None:
    """Write a whole folder. `dtype` is fp32, bf16 or fp8, `text_encoder` xxl or tiny, `vae` full or tiny."""
    folder.mkdir(parents=True)
    (folder / TOKENIZER).parent.mkdir(parents=True)
    shutil.copy(FIXTURE / TOKENIZER, folder / TOKENIZER)
    if vae == "tiny":
        shutil.copy(FIXTURE / TINY_VAE, folder)
    else:
        write_safetensors(folder / "Wan2.1_VAE.safetensors", vae_entries())
    encoder = UMT5_XXL
    if text_encoder == "tiny":
        encoder = T5Config(FIXTURE_PIECES, config.text_dim, d_kv=64, d_ff=256, num_layers=1, num_heads=2)
    write_safetensors(folder / "models_t5_umt5-xxl-enc-bf16.safetensors", umt5_entries(encoder))
    content = {"_class_name": "WanModel", "model_type": "t2v", **vars(config)}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    # ComfyUI's fp8 models are one file each.
    write_sharded(folder, transformer_entries(config, dtype), sys.maxsize if dtype == "fp8" else most)


def parse_model(text: str) -> WanConfig:
    """Parse a model's name, or four numbers. Raises ArgumentTypeError."""
    if text in MODELS:
        return MODELS[text]
    try:
        dim, ffn_dim, heads, layers = map(int, text.split(","))
        return WanConfig(dim, ffn_dim, heads, layers)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"neither {' nor '.join(MODELS)} nor four numbers") from error


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="Write a checkpoint of random weights.")
    parser.add_argument("folder", type=Path, help="must not exist")
    parser.add_argument(
        "--model", type=parse_model, default="1.3B", help="14B, 1.3B, or DIM,FFN,HEADS,LAYERS"
    )
    parser.add_argument("--blocks", type=int, help="a depth other than the model's")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp8"), default="bf16")
    parser.add_argument("--text-encoder", choices=("xxl", "tiny"), default="tiny")
    parser.add_argument("--vae", choices=("full", "tiny"), default="tiny")
    args = parser.parse_args(argv)
    config = vars(args.model) | ({"num_layers": args.blocks} if args.blocks else {})
    write_checkpoint(
        args.folder, WanConfig(**config), dtype=args.dtype, text_encoder=args.text_encoder, vae=args.vae
    )
    size = sum(path.stat().st_size for path in args.folder.rglob("*") if path.is_file())
    print(f"{args.folder}: {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main(sys.argv[1:])
