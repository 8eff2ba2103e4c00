"""Writers of weight files.

Small files hold tensors. Sparse files have the layout and size of real checkpoints and take no room: a true
header before a hole. Their shapes come from our networks, diffusers and transformers, built without storage.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from gguf import GGUFWriter
from jobs import SPIECE
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from wancli.models.config import WanConfig
from wancli.models.dit import WanModel

Shapes = dict[str, tuple[int, ...]]
Entries = dict[str, tuple[str, tuple[int, ...]]]
BYTES = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "I8": 1}
SIZES = {  # wan-formats: dim, ffn_dim, heads, layers, channels
    "1.3B": WanConfig(1536, 8960, 12, 30),
    "14B": WanConfig(5120, 13824, 40, 40),
    "5B": WanConfig(3072, 14336, 24, 30, in_dim=48, out_dim=48),
}
MATRIX = re.compile(r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])\.weight")
T5_MATRIX = re.compile(r".*(SelfAttention\.[qkvo]|DenseReluDense\.w\w+|attn\.[qkvo]|ffn\.[\w.]+)\.weight")


def _shapes(module: torch.nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@cache
def dit(size: str) -> Shapes:
    """A transformer under its official names."""
    with torch.device("meta"):
        return _shapes(WanModel(SIZES[size]))


@cache
def dit_diffusers(size: str) -> Shapes:
    config = SIZES[size]
    with torch.device("meta"):
        return _shapes(
            WanTransformer3DModel(
                num_attention_heads=config.num_heads,
                attention_head_dim=128,
                in_channels=config.in_dim,
                out_channels=config.out_dim,
                ffn_dim=config.ffn_dim,
                num_layers=config.num_layers,
            )
        )


@cache
def umt5() -> Shapes:
    """UMT5-XXL as transformers names it, `shared.weight` alone standing for the embedding."""
    config = UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    with torch.device("meta"):
        found = _shapes(UMT5EncoderModel(config))
    found.pop("encoder.embed_tokens.weight", None)
    return found


@cache
def umt5_official() -> Shapes:
    """The same as the official t5.py names it."""
    words = {
        "shared.": "token_embedding.",
        "encoder.final_layer_norm.": "norm.",
        "encoder.block.": "blocks.",
        "layer.0.layer_norm.": "norm1.",
        "layer.0.SelfAttention.relative_attention_bias.": "pos_embedding.embedding.",
        "layer.0.SelfAttention.": "attn.",
        "layer.1.layer_norm.": "norm2.",
        "layer.1.DenseReluDense.wi_0.": "ffn.gate.0.",
        "layer.1.DenseReluDense.wi_1.": "ffn.fc1.",
        "layer.1.DenseReluDense.wo.": "ffn.fc2.",
    }
    return {renamed(name, words): shape for name, shape in umt5().items()}


@cache
def vae21_diffusers() -> Shapes:
    with torch.device("meta"):
        return _shapes(AutoencoderKLWan())


@cache
def vae22_diffusers() -> Shapes:
    options: dict[str, Any] = {"is_residual": True, "patch_size": 2, "scale_factor_spatial": 16}
    with torch.device("meta"):
        return _shapes(
            AutoencoderKLWan(
                base_dim=160,
                decoder_base_dim=256,
                z_dim=48,
                in_channels=12,
                out_channels=12,
                latents_mean=[0.0] * 48,
                latents_std=[1.0] * 48,
                **options,
            )
        )


@cache
def vae22() -> Shapes:
    """The Wan 2.2 VAE as the official vae2_2.py names it."""
    words = {
        "post_quant_conv.": "conv2.",
        "quant_conv.": "conv1.",
        "coder.conv_in.": "coder.conv1.",
        "coder.norm_out.": "coder.head.0.",
        "coder.conv_out.": "coder.head.2.",
        "mid_block.attentions.0.": "middle.1.",
        "mid_block.resnets.0.": "middle.0.",
        "mid_block.resnets.1.": "middle.2.",
        "norm1.": "residual.0.",
        "conv_shortcut.": "shortcut.",
        "norm2.": "residual.3.",
    }
    found = {}
    for name, shape in vae22_diffusers().items():
        inner = re.sub(r"(resnets\.\d+)\.conv1\.", r"\1.residual.2.", name)
        inner = re.sub(r"(resnets\.\d+)\.conv2\.", r"\1.residual.6.", inner)
        inner = renamed(inner, words)
        inner = re.sub(r"middle\.(\d)\.conv1\.", r"middle.\1.residual.2.", inner)
        inner = re.sub(r"middle\.(\d)\.conv2\.", r"middle.\1.residual.6.", inner)
        inner = re.sub(r"down_blocks\.(\d)\.resnets\.", r"downsamples.\1.downsamples.", inner)
        inner = re.sub(r"down_blocks\.(\d)\.downsampler\.", r"downsamples.\1.downsamples.2.", inner)
        inner = re.sub(r"up_blocks\.(\d)\.resnets\.", r"upsamples.\1.upsamples.", inner)
        found[re.sub(r"up_blocks\.(\d)\.upsampler\.", r"upsamples.\1.upsamples.3.", inner)] = shape
    return found


def renamed(name: str, words: Mapping[str, str]) -> str:
    for old, new in words.items():
        name = name.replace(old, new)
    return name


def stored(shapes: Shapes, dtype: str, prefix: str = "") -> Entries:
    """Every tensor in one dtype."""
    return {prefix + name: (dtype, shape) for name, shape in shapes.items()}


def cast(
    entries: Entries, dtype: str = "F8_E4M3", matrix: re.Pattern[str] = MATRIX, **scales: Callable[..., Any]
) -> Entries:
    """The matrices in another dtype, each with scales beside it: `name=shape -> (dtype, shape)`."""
    found: Entries = {}
    for name, (was, shape) in entries.items():
        if not (inside := matrix.search(name)) or inside.end() != len(name):
            found[name] = (was, shape)
            continue
        found[name] = (dtype, shape)
        for key, form in scales.items():
            found[name.removesuffix("weight") + key] = form(shape)
    return found


def scalar(_: object) -> tuple[str, tuple[int, ...]]:
    return "F32", ()


def per_row(shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    return "F32", (shape[0], 1)


def write(
    path: Path, entries: Entries, metadata: dict[str, str] | None = None, data: dict[str, bytes] | None = None
) -> Path:
    """A safetensors file of full size whose data is a hole, but for the tensors in `data`."""
    document: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end, starts = 0, {}
    for name, (dtype, shape) in entries.items():
        starts[name], end = end, end + math.prod(shape) * BYTES[dtype]
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(document).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)
    with path.open("r+b") as file:
        for name, content in (data or {}).items():
            file.seek(8 + len(text) + starts[name])
            file.write(content)
    return path


def pth(path: Path, entries: Entries) -> Path:
    """A .pth as torch.save writes it, every tensor a view of one number."""
    dtypes = {
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: torch.zeros(1).to(dtypes[dtype]).expand(shape) for name, (dtype, shape) in entries.items()}
    torch.save(state, path)
    return path


def shards(folder: Path, stem: str, entries: Entries, count: int, *, index: bool = True) -> list[Path]:
    """The tensors in so many files, with the index that transformers and diffusers write."""
    files = [folder / f"{stem}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    names = list(entries)
    held = {file: names[n::count] for n, file in enumerate(files)}
    for file, some in held.items():
        write(file, {name: entries[name] for name in some})
    if index:
        weight_map = {name: file.name for file, some in held.items() for name in some}
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / f"{stem}.safetensors.index.json").write_text(text)
    return files


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Save tensors, whatever their layout in memory, as safetensors."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def write_gguf(path: Path, fill: Callable[[GGUFWriter], object], architecture: str = "wan") -> Path:
    """Write a GGUF file with gguf's own writer."""
    writer = GGUFWriter(path, architecture)
    fill(writer)
    finish_gguf(writer)
    return path


def finish_gguf(writer: GGUFWriter) -> None:
    """Write the header and the tensors, and close the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read_fields(message: bytes) -> list[tuple[int, bytes]]:
    """The length-delimited fields of a protocol buffer; others are skipped."""
    found, at = [], 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == 2:
            length = varint()
            found.append((key >> 3, message[at : at + length]))
            at += length
        elif key & 7 == 5:
            at += 4
        else:
            varint()
    return found


def add_t5_tokenizer(writer: GGUFWriter) -> None:
    """Add the T5 tokenizer as convert_hf_to_gguf does, with the padding entries at its end."""
    model = SentencePieceProcessor(model_file=str(SPIECE))
    count = model.vocab_size()
    types = [
        2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
        for i in range(count)
    ]
    normalizer = dict(_read_fields(SPIECE.read_bytes()))[3]
    writer.add_tokenizer_model("t5")
    writer.add_token_list([*(model.id_to_piece(i) for i in range(count)), "[PAD374]", "[PAD375]"])
    writer.add_token_scores([*(model.get_score(i) for i in range(count)), -10000.0, -10000.0])
    writer.add_token_types([*types, 5, 5])
    writer.add_add_space_prefix(True)
    writer.add_remove_extra_whitespaces(True)
    writer.add_precompiled_charsmap(dict(_read_fields(normalizer))[2])
