"""Infers the sizes of a network from the shapes of its tensors, and names models that wancli cannot render.

Shapes are given under their official names unless a function says otherwise. config.json must agree with the
tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from wancli.errors import CheckpointError
from wancli.models.config import CLIPConfig, T5Config, VAE22Config, VAEConfig, WanConfig
from wancli.models.variants import RELEASED

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

USUAL_HEAD_DIM = 128
MAX_LISTED = 10  # tensors named in one message; the rest are counted
RENDERS = "wancli renders text-to-video and image-to-video"
SUPPORTED_HINT = (
    "use Wan2.1-T2V-1.3B, or T2V-14B, I2V-14B, FLF2V-14B or Fun-InP of Wan 2.1, or T2V-A14B, I2V-A14B "
    "or TI2V-5B of Wan 2.2"
)
CLIP_HEAD_DIM = 80
# What config.json may say and no tensor shows: whole attention, patches of 2x2.
FIXED = {"patch_size": [1, 2, 2], "window_size": [-1, -1]}

# Part of a tensor name -> the model that has it; the first hit names the checkpoint.
OTHER_MODELS = {
    "vace_": "VACE",
    "audio_injector": "speech-to-video (S2V)",
    "casual_audio_encoder": "speech-to-video (S2V)",
    "audio_proj": "audio-driven (HuMo, MultiTalk)",
    "audio_cross_attn": "audio-driven (HuMo, MultiTalk)",
    "motion_encoder": "Animate",
    "face_adapter": "Animate",
    "pose_patch_embedding": "Animate",
    "control_adapter": "Fun-Camera",
    "ref_conv": "Fun-Control",
    "to_gate_compress": "sparse-attention (VSA)",
    "fps_embedding": "SkyReels-V2",
}
IMAGE_CHANNELS = 36  # of the input of I2V, FLF2V and Fun-InP: 16 noise, 4 mask, 16 picture
CHANNELS = ((16, 16), (IMAGE_CHANNELS, 16), (48, 48))  # (in_dim, out_dim) of the models that wancli renders


def wrong_model_error(what: str, where: str) -> CheckpointError:
    """Return the error for a checkpoint that is sound but of another kind."""
    return CheckpointError(f"this is a {what} checkpoint; {RENDERS}", where=where, hint=SUPPORTED_HINT)


def name_unsupported_transformer(names: Iterable[str], in_dim: int, out_dim: int) -> str:
    """Name the kind of a Wan transformer that wancli does not render; empty if it does."""
    all_names = " ".join(names)
    known = next((model for part, model in OTHER_MODELS.items() if part in all_names), "")
    if known or (in_dim, out_dim) in CHANNELS:
        return known
    return "Fun-Control" if in_dim == 48 else f"Wan variant with {in_dim} input channels,"


def infer_transformer_sizes(shapes: Shapes, where: str) -> dict[str, int]:
    """Infer the sizes of a Wan transformer, under their names in config.json.

    Raises CheckpointError naming the tensor that is missing or has an odd shape.
    """
    try:
        dim, in_dim, *patch = shapes["patch_embedding.weight"]
        if tuple(patch) != (1, 2, 2):
            raise ValueError("patch_embedding.weight")
        blocks = {int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")}
        image: dict[str, int] = {}
        if "img_emb.proj.0.weight" in shapes:
            image["image_dim"] = shapes["img_emb.proj.0.weight"][0]
        if "img_emb.emb_pos" in shapes:
            image["image_rows"] = shapes["img_emb.emb_pos"][1]
        return {
            "dim": dim,
            "ffn_dim": shapes["blocks.0.ffn.0.bias"][0],
            "num_layers": max(blocks) + 1,
            "in_dim": in_dim,
            "out_dim": shapes["head.head.weight"][0] // 4,
            "text_dim": shapes["text_embedding.0.weight"][1],
            "freq_dim": shapes["time_embedding.0.weight"][1],
            **image,
        }
    except (KeyError, IndexError, ValueError) as error:
        raise _wrong_network_error("Wan transformer", error, where) from error


def infer_transformer_config(
    sizes: Mapping[str, int], config_json: Mapping[str, object], where: str
) -> WanConfig:
    """Return the sizes of a transformer. `config_json` has official names, or is empty.

    Raises CheckpointError if config.json disagrees with the tensors, and if it has no head count and the
    width is not a multiple of 128.
    """
    config_json = {key: value for key, value in config_json.items() if value is not None}
    for key, value in sizes.items():
        if config_json.get(key, value) != value:
            raise CheckpointError(
                f"config.json says {key} = {config_json[key]}, the tensors say {value}",
                where=where,
                hint="config.json and the weights are from different models; download both again",
            )
    dim, head_dim = sizes["dim"], config_json.get("attention_head_dim", USUAL_HEAD_DIM)
    usual_heads = dim / head_dim if isinstance(head_dim, int) and head_dim > 0 else dim / USUAL_HEAD_DIM
    heads = config_json.get("num_heads", usual_heads)
    eps, text_len = config_json.get("eps", WanConfig.eps), config_json.get("text_len", WanConfig.text_len)
    if isinstance(heads, bool) or not isinstance(heads, int | float) or not 1 <= heads < math.inf:
        raise CheckpointError(
            f"num_heads is {heads!r}, and it is a whole number from 1 up",
            where=where,
            hint="correct num_heads in config.json, or `heads` in the job's `model`",
        )
    if heads != int(heads):
        raise CheckpointError(
            f"the number of heads is unknown: the width {sizes['dim']} is not a multiple of {USUAL_HEAD_DIM}",
            where=where,
            hint="put num_heads into the folder's config.json, or say `heads` in the job's `model`",
        )
    is_released = (dim, sizes["ffn_dim"], sizes["num_layers"]) in {key[:3] for key in RELEASED}
    only_head_dim = USUAL_HEAD_DIM if is_released else config_json.get("attention_head_dim")
    if only_head_dim is not None and dim / heads != only_head_dim:
        raise CheckpointError(
            f"{int(heads)} heads do not make up the width {dim}: each has {only_head_dim} numbers",
            where=where,
            hint="correct num_heads in config.json, or `heads` in the job's `model`",
        )
    if not isinstance(eps, float) or not 0 < eps < 1 or text_len != WanConfig.text_len:
        raise CheckpointError(
            f"config.json says eps = {eps}, text_len = {text_len}; Wan has 1e-06 and 512",
            where=where,
        )
    for key, only in FIXED.items():
        if config_json.get(key, only) != only:
            raise CheckpointError(
                f"config.json says {key} = {config_json[key]}; wancli computes {only}, as all models of Wan",
                where=where,
            )
    try:
        return WanConfig(**sizes, num_heads=int(heads), eps=eps)
    except ValueError as error:
        raise CheckpointError(str(error), where=where) from error


def find_mismatches(expected: Shapes, actual: Shapes) -> tuple[str, ...]:
    """List tensors that are missing, unexpected or of another shape; empty if all fit the network."""
    problems = [f"missing {name}" for name in expected.keys() - actual.keys()]
    problems += [f"unexpected {name}" for name in actual.keys() - expected.keys()]
    problems += [
        f"{name} is {list(actual[name])}, expected {list(expected[name])}"
        for name in actual.keys() & expected.keys()
        if tuple(actual[name]) != tuple(expected[name])
    ]
    return tuple(sorted(problems))


def mismatch_error(problems: Sequence[str], where: str) -> CheckpointError:
    """Return the error for tensors that do not fit their network."""
    more = [f"and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
    return CheckpointError(
        "the tensors do not fit the model: " + "; ".join([*problems[:MAX_LISTED], *more]),
        where=where,
        hint="the file belongs to another model or is damaged; compare it with config.json",
    )


def transformer_shapes(config: WanConfig) -> dict[str, tuple[int, ...]]:
    """Return every parameter of a transformer and its shape, however a file stores it."""
    dim, ffn = config.dim, config.ffn_dim
    linears = {
        "text_embedding.0": (dim, config.text_dim),
        "text_embedding.2": (dim, dim),
        "time_embedding.0": (dim, config.freq_dim),
        "time_embedding.2": (dim, dim),
        "time_projection.1": (6 * dim, dim),
        "head.head": (4 * config.out_dim, dim),
        "patch_embedding": (dim, config.in_dim, 1, 2, 2),
    }
    others: dict[str, tuple[int, ...]] = {"head.modulation": (1, 2, dim)}
    for block in (f"blocks.{index}" for index in range(config.num_layers)):
        for attn in (f"{block}.self_attn", f"{block}.cross_attn"):
            linears |= {f"{attn}.{p}": (dim, dim) for p in "qkvo"}
            others |= {f"{attn}.norm_{p}.weight": (dim,) for p in "qk"}
        linears |= {f"{block}.ffn.0": (ffn, dim), f"{block}.ffn.2": (dim, ffn)}
        others |= {f"{block}.norm3.{p}": (dim,) for p in ("weight", "bias")}
        others[f"{block}.modulation"] = (1, 6, dim)
        if config.image_dim is not None:
            linears |= {f"{block}.cross_attn.{p}_img": (dim, dim) for p in "kv"}
            others[f"{block}.cross_attn.norm_k_img.weight"] = (dim,)
    if (image_dim := config.image_dim) is not None:
        linears |= {"img_emb.proj.1": (image_dim, image_dim), "img_emb.proj.3": (dim, image_dim)}
        norms = (("img_emb.proj.0", image_dim), ("img_emb.proj.4", dim))
        others |= {f"{norm}.{p}": (width,) for norm, width in norms for p in ("weight", "bias")}
        if config.image_rows is not None:
            others["img_emb.emb_pos"] = (1, config.image_rows, image_dim)
    weights = {f"{name}.weight": shape for name, shape in linears.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in linears.items()} | others


def t5_shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    """Return every parameter of a UMT5 encoder and its shape, under the names of transformers."""
    d, inner = config.d_model, config.num_heads * config.d_kv
    result: dict[str, tuple[int, ...]] = {
        "shared.weight": (config.vocab_size, d),
        "encoder.final_layer_norm.weight": (d,),
    }
    for layer in (f"encoder.block.{index}.layer" for index in range(config.num_layers)):
        attention, feed_forward = f"{layer}.0.SelfAttention", f"{layer}.1.DenseReluDense"
        result |= {f"{attention}.{p}.weight": (inner, d) for p in "qkv"}
        result[f"{attention}.o.weight"] = (d, inner)
        result[f"{attention}.relative_attention_bias.weight"] = (config.num_buckets, config.num_heads)
        result |= {f"{feed_forward}.wi_{p}.weight": (config.d_ff, d) for p in "01"}
        result[f"{feed_forward}.wo.weight"] = (d, config.d_ff)
        result |= {f"{layer}.{n}.layer_norm.weight": (d,) for n in "01"}
    return result


def infer_clip_config(shapes: Shapes, where: str) -> CLIPConfig:
    """Infer the sizes of CLIP's vision tower. Raises CheckpointError for another one than ViT-H/14."""
    try:
        dim, _, patch, _ = shapes["patch_embedding.weight"]
        layers = {int(name.split(".")[1]) for name in shapes if name.startswith("transformer.")}
        side = math.isqrt(shapes["pos_embedding"][-2] - 1)
        mlp_dim = shapes["transformer.0.mlp.0.weight"][0]
        if dim % CLIP_HEAD_DIM or side * side + 1 != shapes["pos_embedding"][-2]:
            raise ValueError("pos_embedding")
        return CLIPConfig(dim, dim // CLIP_HEAD_DIM, max(layers) + 1, mlp_dim, patch, side * patch)
    except (KeyError, IndexError, ValueError) as error:
        raise _wrong_network_error("CLIP ViT-H vision tower", error, where) from error


def infer_vae_config(shapes: Shapes, where: str) -> VAEConfig | VAE22Config:
    """Infer the sizes of a VAE; that of Wan 2.2 has its layers in stages. Raises CheckpointError."""
    if "decoder.upsamples.0.upsamples.0.residual.2.weight" in shapes:
        return infer_vae22_config(shapes, where)
    return infer_vae21_config(shapes, where)


def infer_vae21_config(shapes: Shapes, where: str) -> VAEConfig:
    """Infer the sizes of a Wan 2.1 VAE. Raises CheckpointError for another VAE."""
    try:
        if len(shapes["decoder.head.0.gamma"]) != 4 or shapes["decoder.head.2.weight"][0] != 3:
            raise ValueError("decoder.head")
        dim = shapes["encoder.conv1.weight"][0]
        # Each stage of the encoder but the last: two residual blocks and a downsampler.
        count = 1 + sum(name.startswith("encoder.") and name.endswith("resample.1.weight") for name in shapes)
        first = [f"encoder.downsamples.{3 * stage}.residual.2.weight" for stage in range(count)]
        halves_time = [f"encoder.downsamples.{3 * stage + 2}.time_conv.weight" for stage in range(count - 1)]
        return VAEConfig(
            dim=dim,
            z_dim=shapes["conv2.weight"][0],
            dim_mult=tuple(shapes[name][0] // dim for name in first),
            temporal_downsample=tuple(name in shapes for name in halves_time),
        )
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise _wrong_network_error("Wan 2.1 VAE", error, where) from error


def infer_vae22_config(shapes: Shapes, where: str) -> VAE22Config:
    """Infer the sizes of a Wan 2.2 VAE, that of TI2V-5B. Raises CheckpointError for another VAE."""
    try:
        dim, channels = shapes["encoder.conv1.weight"][:2]
        if channels != 12 or shapes["decoder.head.2.weight"][0] != 12:
            raise ValueError("encoder.conv1.weight")
        # Each stage of the encoder but the last: two residual blocks and a downsampler.
        count = 1 + sum(name.startswith("encoder.") and name.endswith("resample.1.weight") for name in shapes)
        stages = [f"encoder.downsamples.{stage}.downsamples" for stage in range(count)]
        widths = [shapes[f"{stage}.0.residual.2.weight"][0] for stage in stages]
        dec_dim, z_dim = shapes["decoder.head.0.gamma"][0], shapes["conv2.weight"][0]
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise _wrong_network_error("Wan 2.2 VAE", error, where) from error
    halves_time = tuple(f"{stage}.2.time_conv.weight" in shapes for stage in stages[:-1])
    try:
        return VAE22Config(
            dim, dec_dim, z_dim, tuple(w // dim for w in widths), temporal_downsample=halves_time
        )
    except (ValueError, ZeroDivisionError) as error:
        raise CheckpointError(str(error), where=where) from error


def infer_t5_config(shapes: Shapes, where: str) -> T5Config:
    """Infer the sizes of a UMT5 encoder. Shapes are under their names in transformers.

    Raises CheckpointError if a tensor that determines a size is missing.
    """
    first = "encoder.block.0.layer.0.SelfAttention."
    try:
        vocab_size, d_model = shapes["shared.weight"]
        inner, _ = shapes[first + "q.weight"]
        num_buckets, num_heads = shapes[first + "relative_attention_bias.weight"]
        d_ff, _ = shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"]
        last_block = max(int(name.split(".")[2]) for name in shapes if name.startswith("encoder.block."))
        d_kv = inner // num_heads
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"not a UMT5 encoder: {error} is missing or mis-shaped", where=where) from None
    return T5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=d_kv,
        d_ff=d_ff,
        num_layers=last_block + 1,
        num_heads=num_heads,
        num_buckets=num_buckets,
    )


def _wrong_network_error(network: str, error: Exception, where: str) -> CheckpointError:
    return CheckpointError(f"no {network}: {error} is missing or has an odd shape", where=where)
