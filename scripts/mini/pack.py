"""From training states to a checkpoint folder in the official layout, proved by rendering with it."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from scripts.mini import text
from scripts.mini.recipe import Recipe
from scripts.mini.training import Tensors, load
from wancli.cli import run
from wancli.errors import CheckpointError
from wancli.models.config import WanConfig
from wancli.storage import atomic
from wancli.weights.checkpoint import Checkpoint, identify, text_encoder_config, vae_config
from wancli.weights.loader import load_transformer, load_vae

MOST_BYTES = 16 * 2**20
PROMPT = "A red circle drifts to the left across dark stripes."


def pack(folder: Path, into: Path, recipe: Recipe) -> Path:
    """Writes the averaged weights as fp16 under the official names. Raises CheckpointError if the result
    is larger than 16 MiB or wancli cannot read and render with it."""
    trained = load(folder / "finetune.pt")
    encoder = text.build(recipe.t5(trained["vocabulary"]), 0, torch.device("cpu"))
    text.load_text(encoder, trained["average"]["text"])
    config = recipe.wan(recipe.grown)
    contents = {
        "config.json": (json.dumps(official_config(config), indent=2) + "\n").encode(),
        "diffusion_pytorch_model.safetensors": halved(trained["average"]["model"]),
        "models_t5_umt5-xxl-enc-bf16.safetensors": halved(text.official(encoder)),
        "Wan2.1_VAE.safetensors": halved(load(folder / "vae.pt")["average"]),
        "google/umt5-xxl/spiece.model": (folder / "spiece.model").read_bytes(),
    }
    size = sum(len(data) for data in contents.values())
    print(
        f"pack: {size / 1e6:.1f} MB",
        *(f"{len(data):>10,} {name}" for name, data in contents.items()),
        sep="\n",
    )
    if size > MOST_BYTES:
        raise CheckpointError(f"{size:,} bytes are more than {MOST_BYTES:,}", where=str(into))
    for name, data in contents.items():
        atomic.replace(into / name, data)
    checkpoint = identify(into)
    if checkpoint.transformer_config != config or vae_config(checkpoint) != recipe.vae():
        raise CheckpointError(
            f"read back as {checkpoint.transformer_config}, {vae_config(checkpoint)}", where=str(into)
        )
    prove(checkpoint)
    print(f"pack: {into} renders")
    return into


def official_config(config: WanConfig) -> dict[str, object]:
    return {
        "_class_name": "WanModel",
        "dim": config.dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_dim,
        "model_type": "t2v",
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_dim": config.out_dim,
        "text_dim": config.text_dim,
        "text_len": config.text_len,
    }


def halved(tensors: Tensors) -> bytes:
    """A safetensors file in fp16. Raises CheckpointError for what fp16 cannot hold."""
    half: dict[str, Tensor] = {name: tensor.detach().half().contiguous() for name, tensor in tensors.items()}
    if bad := [name for name, tensor in half.items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"{bad[0]} does not fit fp16")
    return save(half)


def prove(checkpoint: Checkpoint) -> None:
    """Every part loads, and the command renders a clip with them."""
    load_transformer(checkpoint)
    load_vae(checkpoint, "cpu")
    text_encoder_config(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "model": str(checkpoint.root.resolve()),
            "output": "clip.mp4",
            "prompt": PROMPT,
            "negative": "",
            "size": "64x64",
            "frames": 5,
            "sampler": {"steps": 2, "shift": 3, "guidance": 3},
        }
        path = Path(folder) / "job.yaml"
        path.write_text(json.dumps(job))
        with contextlib.redirect_stdout(io.StringIO()):
            code = run(["render", str(path), "--cache-dir", f"{folder}/cache", "--quiet"])
        if code or not (Path(folder) / "clip.mp4").exists():
            raise CheckpointError(f"wancli render exits with {code}", where=str(checkpoint.root))
