"""Facts about models, without a render: the cost of each part of a block, and the released Wan models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from wancli.models import parameter_count, variants
from wancli.models.config import Dtype, T5Config, VAE22Config, VAEConfig, WanConfig, compute_dtype
from wancli.models.variants import Variant
from wancli.plan import memory_estimate
from wancli.resources import memory_model
from wancli.weights.checkpoint import Checkpoint
from wancli.weights.component import Component, Kind
from wancli.weights.formats.quant_schemes import Precision
from wancli.weights.recognize import XXL

Config = TypeVar("Config", WanConfig, T5Config, VAEConfig, VAE22Config)
DTYPES: tuple[Dtype, ...] = ("fp32", "bf16", "fp16", "fp8")
RESIDENCIES = get_args(memory_model.Residency)
RELEASED = {
    variant.name: (variant, WanConfig(dim, ffn, dim // 128, layers, in_dim=channels, out_dim=channels))
    for (dim, ffn, layers, channels), variant in variants.RELEASED.items()
}
RELEASED[variants.T2V_A14B.name] = (variants.T2V_A14B, RELEASED[variants.T2V_14B.name][1])


def config_of(kind: type[Config], sizes: Mapping[str, Any]) -> Config:
    """Return the config in a record, without the keys of a later version. Raises ValueError."""
    known = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in sizes.items() if name in known})


def block_parts(wan: WanConfig) -> list[dict[str, Any]]:
    """List the parts of one block: parameters, those among them in matrices, and the cost per forward.

    FLOPs of a part on L video tokens and R text rows are L·token + L²·token2 + L·R·token_text; once per text
    and not per step, `text` for each of its rows. `values` are numbers per video token that the part holds at
    once. Over a block the parameters and the FLOPs add up to those of `memory` and `flops`.
    """
    d, f = wan.dim, wan.ffn_dim
    square = {"weights": d * d + d, "matrices": d * d}
    return [
        _part("modulation, norms", weights=6 * d + 2 * d, values=d),
        _part("self-attention q, k, v", weights=3 * square["weights"] + 2 * d, matrices=3 * d * d,
              token=6 * d * d, values=3 * d),
        _part("self-attention, tokens x tokens", token2=4 * d, values=4 * d),
        _part("self-attention out", **square, token=2 * d * d, values=5 * d),
        _part("cross-attention q", weights=square["weights"] + d, matrices=d * d, token=2 * d * d, values=d),
        _part("cross-attention k, v of the text", weights=2 * square["weights"] + d, matrices=2 * d * d,
              text=4 * d * d),
        _part("cross-attention, tokens x text", token_text=4 * d, values=2 * d),
        _part("cross-attention out", **square, token=2 * d * d, values=2 * d),
        _part("feed-forward", weights=2 * d * f + f + d, matrices=2 * d * f, token=4 * d * f, values=f + d),
    ]  # fmt: skip


def _part(
    name: str,
    *,
    weights: int = 0,
    matrices: int = 0,
    token: int = 0,
    token2: int = 0,
    token_text: int = 0,
    text: int = 0,
    values: int = 0,
) -> dict[str, Any]:
    flops = {"token": token, "token2": token2, "token_text": token_text, "text": text}
    return {"name": name, "weights": weights, "matrices": matrices, "flops": flops, "values": values}


def input_output_parts(wan: WanConfig) -> list[dict[str, Any]]:
    """List the parts before and after the blocks, in the same terms."""
    d = wan.dim
    into, out = 4 * wan.in_dim, 4 * wan.out_dim
    return [
        _part("patch embedding", weights=into * d + d, token=2 * into * d),
        _part("text projection", weights=wan.text_dim * d + d + d * d + d, text=2 * d * (wan.text_dim + d)),
        _part("time embedding", weights=wan.freq_dim * d + d + d * d + d + d * 6 * d + 6 * d),
        _part("head", weights=out * (d + 1) + 2 * d, token=2 * out * d),
    ]


def calculator_coefficients(
    sizes: Mapping[str, Any], networks: Mapping[str, Any], device: str
) -> dict[str, Any]:
    """Return what the page's memory calculator needs of a model: the coefficients of each phase.

    There is an entry for each device, each dtype and each residency. `sizes` and `networks` are those of a
    manifest. Weights in fp8 are always packed.
    """
    wan = config_of(WanConfig, sizes)
    if wan.in_dim not in variants.BY_CHANNELS:
        raise ValueError(f"no model reads {wan.in_dim} channels")
    return {
        "device": device,
        "stride": variants.BY_CHANNELS[wan.out_dim].stride,
        "devices": {name: _device_coefficients(wan, networks, name) for name in ("cpu", "cuda")},
    }


def _device_coefficients(wan: WanConfig, networks: Mapping[str, Any], device: str) -> dict[str, Any]:
    t5, vae = config_of(T5Config, networks["text_encoder"]), _vae(networks["vae"])
    transformer, text = (_stored(networks["stored"][name]) for name in ("transformer", "text_encoder"))
    compute = {dtype: compute_dtype(dtype, device) for dtype in DTYPES}
    encode, sample = memory_estimate.encode_coefficients, memory_estimate.sample_coefficients
    decode = memory_estimate.decode_coefficients(vae, device=device, stored_in_fp32=networks["vae_in_fp32"])
    return {
        "process": memory_model.PROCESS if device == "cpu" else 0,
        "compute_dtype": compute,
        "encode": {
            dtype: {
                residency: asdict(encode(t5, text, device=device, dtype=compute[dtype], residency=residency))
                for residency in RESIDENCIES
            }
            for dtype in DTYPES
        },
        "sample": {
            dtype: {
                residency: asdict(sample(wan, transformer, device=device, dtype=dtype, residency=residency))
                for residency in (RESIDENCIES if dtype != "fp8" else ("packed",))
            }
            for dtype in DTYPES
        },
        "decode": asdict(decode),
    }


def _stored(record: Mapping[str, Any]) -> memory_estimate.StoredMatrices:
    names = ("plain", "matrices", "largest", "scales")
    return memory_estimate.StoredMatrices(**{name: record[name] for name in names})


def _vae(sizes: dict[str, Any]) -> VAEConfig | VAE22Config:
    lists: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in sizes.items()
    }
    return config_of(VAE22Config, lists) if "dec_dim" in lists else config_of(VAEConfig, lists)


def released_checkpoint(name: str) -> tuple[Checkpoint, T5Config, VAEConfig | VAE22Config]:
    """Describe a released model as its authors publish it, without its files: the transformer and the VAE in
    fp32, the text encoder in bf16."""
    variant, wan = RELEASED[name]
    vae = VAE22Config() if wan.in_dim == variants.TI2V_5B.latent_channels else VAEConfig()
    matrices = 8 * wan.dim**2 + 2 * wan.dim * wan.ffn_dim
    inner = XXL.d_kv * XXL.num_heads
    of_text = 4 * XXL.d_model * inner + 3 * XXL.d_model * XXL.d_ff
    transformer = _published_component(
        "transformer", "F32", 4, matrices * wan.num_layers, wan.dim * wan.ffn_dim
    )
    text = _published_component("text encoder", "BF16", 2, of_text * XXL.num_layers, XXL.d_model * XXL.d_ff)
    convolutions = _published_component("vae", "F32", 4, parameter_count.vae_parameters(vae), 0)
    return _checkpoint(variant, wan, transformer, text, convolutions), XXL, vae


def _published_component(kind: Kind, dtype: str, element: int, count: int, largest: int) -> Component:
    group = "convolutions" if kind == "vae" else "block matrices"
    precision = Precision(group, ((dtype, 1),), count * element, largest * element)
    return Component(kind, kind, (), "safetensors", precision=(precision,))


def _checkpoint(
    variant: Variant, wan: WanConfig, transformer: Component, text: Component, vae: Component
) -> Checkpoint:
    root = Path(variant.name)
    return Checkpoint(root, variant, (replace(transformer, config=wan),), text, root, vae, root)


def describe_model(
    checkpoint: Checkpoint, text: T5Config, vae: VAEConfig | VAE22Config, device: str, dtype: str
) -> dict[str, Any]:
    """Describe a model as a manifest does, for a page without renders."""
    return {
        "root": str(checkpoint.root),
        "variant": checkpoint.variant.name,
        "sizes": asdict(checkpoint.transformer_config),
        "networks": memory_estimate.checkpoint_sizes(checkpoint, text, vae),
        "dtype": dtype,
        "residency": "resident",
        "text_encoder": "resident",
        "chunk": None,
        "device": device,
    }
