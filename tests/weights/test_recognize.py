"""What one file is taken for: real layouts in real sizes, as headers alone.

Parameter and tensor counts are the published ones; shapes come from diffusers and transformers.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import weight_files
from weight_files import cast, dit, dit_diffusers, per_row, pth, scalar, stored, umt5, umt5_official, write

from wancli.errors import CheckpointError
from wancli.models.config import T5Config, VAE22Config, VAEConfig
from wancli.weights.component import Component, expert_from_name
from wancli.weights.single_files import recognize_file

COMFY = "model.diffusion_model."


def only(path: Path) -> Component:
    (part,) = recognize_file(path)
    return part


def precision(part: Component) -> dict[str, dict[str, int]]:
    return {entry.group: dict(entry.dtypes) for entry in part.precision}


# ---- transformers ----


@pytest.mark.parametrize(
    ("size", "name", "count", "parameters"),
    [
        ("1.3B", "Wan2.1-T2V-1.3B", 825, 1_418_996_800),
        ("14B", "Wan2.1-T2V-14B", 1095, 14_288_491_584),
        ("5B", "Wan2.2-TI2V-5B", 825, 4_999_787_712),
    ],
)
def test_the_released_transformers_are_known_by_their_sizes(
    tmp_path: Path, size: str, name: str, count: int, parameters: int
) -> None:
    for naming, shapes in (("official", dit(size)), ("diffusers", dit_diffusers(size))):
        path = write(tmp_path / f"{naming}.safetensors", stored(shapes, "F32"))
        assert path.stat().st_size > 4 * parameters  # the file is as large as the real one
        part = only(path)
        assert (part.kind, part.name, part.naming, part.prefix) == ("transformer", name, naming, "")
        assert (part.tensors, part.parameters) == (count, parameters)
        assert part.config == weight_files.SIZES[size]
        assert part.variant is not None
        assert (part.variant.name, part.scheme.name, part.refusal, part.missing) == (name, "plain", "", ())


def test_the_rows_of_the_variants_are_the_official_defaults() -> None:
    from wancli.models.variants import T2V_1_3B, T2V_14B, T2V_A14B, TI2V_5B

    def row(v: Any) -> tuple[Any, ...]:
        return v.width, v.height, v.frames, v.fps, v.steps, v.shift, v.guidance, v.guidance_low, v.boundary

    assert row(T2V_1_3B) == (832, 480, 81, 16, 50, 5.0, 5.0, None, None)
    assert row(T2V_14B) == (1280, 720, 81, 16, 50, 5.0, 5.0, None, None)
    assert row(T2V_A14B) == (1280, 720, 81, 16, 40, 12.0, 4.0, 3.0, 0.875)
    assert row(TI2V_5B) == (1280, 704, 121, 24, 50, 5.0, 5.0, None, None)
    assert [(v.stride, v.latent_channels) for v in (T2V_14B, T2V_A14B, TI2V_5B)] == [
        (16, 16),
        (16, 16),
        (32, 48),
    ]


@pytest.mark.parametrize("prefix", [COMFY, "diffusion_model.", "model.", "net.dit."])
def test_any_prefix_is_found_and_comes_off_the_names(tmp_path: Path, prefix: str) -> None:
    part = only(write(tmp_path / "a.safetensors", stored(dit("1.3B"), "F16", prefix)))
    assert (part.prefix, part.naming, part.parameters) == (prefix, "official", 1_418_996_800)
    assert precision(part) == {
        "block matrices": {"F16": 300},
        "block biases, norms": {"F16": 510},
        "embeddings, head": {"F16": 15},
    }
    assert part.map_key(f"{prefix}blocks.7.ffn.0.bias") == "blocks.7.ffn.0.bias"
    assert part.map_key("elsewhere.weight") is None


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "high"),
        ("wan2.2_t2v_low_noise_14B_fp16.safetensors", "low"),
        ("Wan2_2-T2V-A14B-HIGH_fp8_e4m3fn_scaled_KJ.safetensors", "high"),
        ("Wan2_2-T2V-A14B-LOW_fp8_e5m2_scaled_KJ.safetensors", "low"),
        ("Wan2.2-T2V-A14B-HighNoise-Q8_0.gguf", "high"),
        ("LowNoise/Wan2.2-T2V-A14B-Q4_K_M.gguf", "low"),
        ("high_noise_model/diffusion_pytorch_model-00001-of-00006.safetensors", "high"),
        ("wan22_a14b_low.safetensors", "low"),
        ("wan2.1_t2v_14B_bf16.safetensors", None),
        ("wan2.1_t2v_14B_lowvram.safetensors", None),
        ("Highlights_wan14B.safetensors", None),
        ("slow-low.safetensors", None),
    ],
)
def test_an_expert_is_recognized_by_the_words_that_repackers_use(name: str, expert: str | None) -> None:
    assert expert_from_name(Path("/models") / name) == expert


def test_a_14b_transformer_is_an_expert_only_if_its_name_says_so(tmp_path: Path) -> None:
    entries = stored(dit("14B"), "BF16")
    plain = only(write(tmp_path / "wan14B.safetensors", entries))
    high = only(write(tmp_path / "wan_high_noise.safetensors", entries))
    assert (plain.name, plain.expert) == ("Wan2.1-T2V-14B", None)
    assert (high.name, high.expert) == ("Wan2.2-T2V-A14B", "high")
    assert high.variant is not None
    assert (high.variant.shift, high.variant.boundary) == (12.0, 0.875)
    small = only(write(tmp_path / "ti2v_high_noise.safetensors", stored(dit("5B"), "BF16")))
    assert small.name == "Wan2.2-TI2V-5B"


def test_a_width_that_is_not_a_multiple_of_128_needs_the_number_of_heads(tiny: Path) -> None:
    path = tiny / "diffusion_pytorch_model.safetensors"
    part = only(path)
    assert "48 is not a multiple of 128" in part.refusal
    assert "`heads`" in part.hint
    (said,) = recognize_file(path, {"num_heads": 2})
    assert (said.refusal, dict(said.sizes)["num_heads"]) == ("", 2)


def with_keys(*names: str) -> Callable[[weight_files.Entries], weight_files.Entries]:
    return lambda entries: entries | dict.fromkeys(names, ("F16", (1,)))


def channels(count: int, *names: str) -> Callable[[weight_files.Entries], weight_files.Entries]:
    patch = {"patch_embedding.weight": ("F16", (1536, count, 1, 2, 2))}
    return lambda entries: entries | patch | dict.fromkeys(names, ("F16", (1,)))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (channels(48, "img_emb.proj.0.weight"), "Fun-Control"),
        (channels(48), "Fun-Control"),
        (channels(36, "ref_conv.weight", "img_emb.proj.0.weight"), "Fun-Control"),
        (channels(20), "20 input channels"),
        (with_keys("vace_blocks.0.after_proj.weight", "vace_patch_embedding.weight"), "VACE"),
        (with_keys("control_adapter.conv.weight"), "Fun-Camera"),
        (with_keys("casual_audio_encoder.encoder.final_linear.weight"), r"speech-to-video \(S2V\)"),
        (with_keys("audio_proj.audio_proj_glob_1.layer.bias"), "audio-driven"),
        (with_keys("face_adapter.fuser_blocks.0.k_norm.weight"), "Animate"),
        (with_keys("motion_encoder.enc.fc.0.weight"), "Animate"),
        (with_keys("blocks.0.self_attn.to_gate_compress.weight"), r"sparse-attention \(VSA\)"),
    ],
)
def test_other_models_are_refused_by_name_with_a_hint(
    tmp_path: Path, change: Callable[[weight_files.Entries], weight_files.Entries], what: str
) -> None:
    part = only(write(tmp_path / "a.safetensors", change(stored(dit("1.3B"), "F16"))))
    assert part.kind == "transformer"
    assert re.search(f"{what}.*text-to-video", part.refusal)
    assert "Wan2.1-T2V-1.3B" in part.hint
    assert part.variant is None


# ---- schemes ----


def test_fp8_without_scales_is_a_plain_cast(tmp_path: Path) -> None:
    for dtype in ("F8_E4M3", "F8_E5M2"):
        part = only(write(tmp_path / f"{dtype}.safetensors", cast(stored(dit("14B"), "F32"), dtype)))
        scheme = part.scheme
        assert (scheme.name, scheme.dtypes, scheme.scales, scheme.layers) == ("fp8", (dtype,), "", 400)
        assert precision(part)["block matrices"] == {dtype: 400}
        assert part.parameters == 14_288_491_584


@pytest.mark.parametrize(("numel", "full"), [(2, True), (1, False), (0, False)])
def test_comfys_first_scaled_layout_has_a_marker_and_scalars(tmp_path: Path, numel: int, full: bool) -> None:
    entries = cast(stored(dit("14B"), "F16", COMFY), scale_weight=scalar, scale_input=scalar)
    entries |= {f"{COMFY}scaled_fp8": ("F8_E4M3", (numel,))}
    part = only(write(tmp_path / "wan_fp8_scaled.safetensors", entries))
    scheme = part.scheme
    assert (scheme.name, scheme.scales, scheme.layers) == ("fp8_scaled", "tensor", 400)
    assert scheme.full_precision is full
    assert part.parameters == 14_288_491_584
    assert precision(part)["scales, markers"] == {"F32": 800, "F8_E4M3": 1}


def test_kijais_scaled_files_are_known_with_and_without_the_marker(tmp_path: Path) -> None:
    renamed = cast(stored(dit("14B"), "BF16"), "F8_E5M2", weight_scale=scalar)
    for entries in (renamed, renamed | {"scaled_fp8": ("F8_E5M2", (1,))}):
        scheme = only(write(tmp_path / "a.safetensors", entries)).scheme
        assert (scheme.name, scheme.dtypes, scheme.scales, scheme.layers) == (
            "kijai",
            ("F8_E5M2",),
            "tensor",
            400,
        )


def test_lightx2v_scales_every_row_and_musubi_blocks_of_one(tmp_path: Path) -> None:
    rows = cast(stored(dit("14B"), "BF16"), weight_scale=per_row)
    assert only(write(tmp_path / "a.safetensors", rows)).scheme.name == "lightx2v"
    flat = cast(stored(dit("14B"), "BF16"), weight_scale=lambda shape: ("F32", shape[:1]))
    assert only(write(tmp_path / "b.safetensors", flat)).scheme.scales == "row"
    blocks = cast(
        stored(dit("14B"), "BF16"), scale_weight=lambda shape: ("F32", (shape[0], shape[1] // 64, 1))
    )
    scheme = only(write(tmp_path / "c.safetensors", blocks)).scheme
    assert (scheme.name, scheme.scales) == ("block", "block")


def quantized(
    formats: str, extra: dict[str, Any] | None = None
) -> tuple[weight_files.Entries, dict[str, bytes]]:
    """ComfyUI's new layout: a JSON text beside every matrix."""
    text = json.dumps({"format": formats} | (extra or {})).encode()
    entries = cast(
        stored(dit("1.3B"), "F16", COMFY),
        weight_scale=scalar,
        comfy_quant=lambda _: ("U8", (len(text),)),
    )
    return entries, dict.fromkeys((name for name in entries if name.endswith("comfy_quant")), text)


def test_comfys_new_layout_is_read_from_its_texts(tmp_path: Path) -> None:
    entries, data = quantized("float8_e4m3fn", {"full_precision_matrix_mult": True})
    scheme = only(write(tmp_path / "a.safetensors", entries, data=data)).scheme
    assert (scheme.name, scheme.scales, scheme.layers) == ("comfy_quant", "tensor", 300)
    assert scheme.full_precision


@pytest.mark.parametrize("prefix", ["", COMFY])
def test_comfys_new_layout_is_read_from_the_metadata(tmp_path: Path, prefix: str) -> None:
    entries = cast(stored(dit("1.3B"), "F16", COMFY), weight_scale=scalar)
    layers = {
        prefix + name.removeprefix(COMFY).removesuffix(".weight_scale"): {"format": "float8_e4m3fn"}
        for name in entries
        if name.endswith("weight_scale")
    }
    said = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    scheme = only(write(tmp_path / "a.safetensors", entries, said)).scheme
    assert (scheme.name, scheme.layers, scheme.full_precision, scheme.refusal) == (
        "comfy_quant",
        300,
        False,
        "",
    )


@pytest.mark.parametrize("format", ["nvfp4", "mxfp8", "int8_tensorwise", "awq_w4a16", "convrot_w4a4"])
def test_a_format_of_comfy_that_wancli_does_not_load_is_refused_by_name(tmp_path: Path, format: str) -> None:
    entries, data = quantized(format)
    part = only(write(tmp_path / "a.safetensors", entries, data=data))
    assert f"ComfyUI's {format}, which wancli does not load" in part.refusal
    assert "GGUF" in part.hint


def replaced(**tails: tuple[str, Callable[[tuple[int, ...]], tuple[int, ...]]]) -> weight_files.Entries:
    """The matrices stored under other last words."""
    found: weight_files.Entries = {}
    for name, (dtype, shape) in stored(dit("1.3B"), "BF16").items():
        if not weight_files.MATRIX.fullmatch(name):
            found[name] = (dtype, shape)
            continue
        for tail, (kind, form) in tails.items():
            found[name.removesuffix("weight") + tail.replace("__", ".")] = (kind, form(shape))
    return found


def same(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape


def half(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[0], shape[1] // 2


def row(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], 1)


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        (lambda: replaced(weight___data=("I8", same), weight___scale=("BF16", row)), "quanto"),
        (lambda: replaced(qweight=("I8", half), qzeros=("I8", half), scales=("F16", row)), "AWQ or GPTQ"),
        (lambda: replaced(qweight=("I8", half), wscales=("BF16", row)), "SVDQuant"),
        (lambda: replaced(weight=("U8", half), weight__absmax=("F32", row)), "bitsandbytes"),
        (
            lambda: replaced(weight=("U8", half), weight_scale=("F8_E4M3", row), weight_scale_2=("F32", row)),
            "NVFP4",
        ),
        (lambda: replaced(weight=("F8_E4M3", same), weight_scale=("U8", row)), "MXFP8"),
        (lambda: replaced(weight=("I8", same), weight_scale=("F32", row)), "int8"),
        (lambda: replaced(weight=("U8", half)), "U8 weights"),
    ],
)
def test_other_quantizations_are_refused_by_name(
    tmp_path: Path, entries: Callable[[], weight_files.Entries], what: str
) -> None:
    part = only(write(tmp_path / "a.safetensors", entries()))
    assert part.kind == "transformer"
    assert f"quantized as {what}" in part.refusal
    assert "fp8 or GGUF" in part.hint


# ---- text encoders ----

XXL = T5Config(256384, 4096, 64, 10240, 24, 64)


def test_the_text_encoder_of_every_repacker_is_umt5_xxl(tmp_path: Path) -> None:
    spiece = {"spiece_model": ("U8", (4_548_313,))}
    linear = {"matrix": weight_files.T5_MATRIX}
    scaled = cast(stored(umt5(), "F16"), scale_weight=scalar, **linear)
    cases = {
        "models_t5_umt5-xxl-enc-bf16.pth": (stored(umt5_official(), "BF16"), "official", "plain"),
        "umt5-xxl-enc-bf16.safetensors": (stored(umt5_official(), "BF16"), "official", "plain"),
        "umt5-xxl-enc-fp8_e4m3fn.safetensors": (
            cast(stored(umt5_official(), "BF16"), **linear),
            "official",
            "fp8",
        ),
        "umt5_xxl_fp16.safetensors": (stored(umt5(), "F16") | spiece, "transformers", "plain"),
        "umt5_xxl_fp8_e4m3fn_scaled.safetensors": (
            scaled | spiece | {"scaled_fp8": ("F8_E4M3", (0,))},
            "transformers",
            "fp8_scaled",
        ),
        "models_t5_umt5-xxl-enc-fp8.pth": (
            cast(stored(umt5_official(), "BF16"), weight_scale=per_row, **linear),
            "official",
            "lightx2v",
        ),
    }
    for name, (entries, naming, scheme) in cases.items():
        part = only((pth if name.endswith(".pth") else write)(tmp_path / name, entries))
        assert (part.kind, part.name, part.naming, part.scheme.name) == (
            "text encoder",
            "UMT5-XXL",
            naming,
            scheme,
        )
        assert (part.config, part.parameters, part.missing) == (XXL, 5_680_910_336, ())
        assert part.tokenizer is ("spiece_model" in entries)
        assert precision(part)["token embedding"] == {"F16" if naming == "transformers" else "BF16": 1}
    assert len(umt5_official()) == 242


def test_a_plain_t5_is_not_taken_for_umt5(tmp_path: Path) -> None:
    shapes = {
        name: shape
        for name, shape in umt5().items()
        if "relative_attention_bias" not in name or name.startswith("encoder.block.0.")
    }
    part = only(write(tmp_path / "t5xxl_fp16.safetensors", stored(shapes, "F16")))
    assert (part.kind, part.name) == ("text encoder", "T5 v1.1")
    assert "Flux" in part.refusal
    assert "umt5" in part.hint


# ---- VAEs ----


@pytest.mark.parametrize(
    ("name", "shapes", "prefix", "naming"),
    [
        ("Wan2.1_VAE.pth", "official", "", "official"),
        ("wan_2.1_vae.safetensors", "official", "", "official"),
        ("Wan2_1_VAE_bf16.safetensors", "official", "model.", "official"),
        ("diffusion_pytorch_model.safetensors", "diffusers", "", "diffusers"),
    ],
)
def test_the_vae_of_wan_21_is_known_in_every_layout(
    tmp_path: Path, name: str, shapes: str, prefix: str, naming: str
) -> None:
    from wancli.models.vae import WanVAE

    with torch.device("meta"):
        official = {key: tuple(tensor.shape) for key, tensor in WanVAE(VAEConfig()).state_dict().items()}
    entries = stored(official if shapes == "official" else weight_files.vae21_diffusers(), "F32", prefix)
    part = only((pth if name.endswith(".pth") else write)(tmp_path / name, entries))
    assert (part.kind, part.name, part.naming, part.prefix) == ("vae", "Wan 2.1 VAE", naming, prefix)
    assert (part.config, part.parameters, part.tensors) == (VAEConfig(), 126_892_531, 194)


def test_the_vae_of_wan_22_has_48_channels_and_two_widths(tmp_path: Path) -> None:
    sizes = VAE22Config(dim=160, dec_dim=256, z_dim=48)
    for part in (
        only(pth(tmp_path / "Wan2.2_VAE.pth", stored(weight_files.vae22(), "F32"))),
        only(write(tmp_path / "wan2.2_vae.safetensors", stored(weight_files.vae22(), "F16"))),
        only(write(tmp_path / "diffusers.safetensors", stored(weight_files.vae22_diffusers(), "F32"))),
    ):
        assert (part.kind, part.name, part.config) == ("vae", "Wan 2.2 VAE", sizes)
        assert (part.parameters, part.tensors) == (704_688_668, 196)


def test_stand_ins_for_the_vae_are_refused_by_name(tmp_path: Path) -> None:
    from wancli.models.vae import WanVAE

    with torch.device("meta"):
        light = {k: tuple(v.shape) for k, v in WanVAE(VAEConfig(dim=24)).state_dict().items()}
    part = only(write(tmp_path / "lightvaew2_1.safetensors", stored(light, "BF16")))
    assert (part.name, "a quarter" in part.refusal) == ("LightVAE", True)
    tae: weight_files.Shapes = {"encoder.0.weight": (64, 3, 3, 3), "decoder.1.weight": (256, 16, 3, 3)}
    part = only(write(tmp_path / "taew2_1.safetensors", stored(tae, "F16")))
    assert (part.kind, part.name, "tiny autoencoder" in part.refusal) == ("other", "TAE", True)


# ---- beside them ----


def test_additions_and_image_encoders_are_named(tmp_path: Path) -> None:
    module: weight_files.Shapes = {
        "vace_patch_embedding.weight": (5120, 96, 1, 2, 2),
        "vace_blocks.0.ffn.0.bias": (1,),
    }
    assert only(write(tmp_path / "a.safetensors", stored(module, "F16"))).name == "VACE module"
    clip: weight_files.Shapes = {"visual.cls_embedding": (1, 1, 1280)}
    part = only(write(tmp_path / "b.safetensors", stored(clip, "F16")))
    assert "CLIP image encoder, a part of one or of another kind" in part.refusal


def test_an_unknown_file_has_no_components(tmp_path: Path) -> None:
    assert recognize_file(write(tmp_path / "a.safetensors", {"conv.weight": ("F32", (2,))})) == ()


def test_a_whole_checkpoint_is_three_networks_in_one_file(tmp_path: Path) -> None:
    text = "text_encoders.umt5xxl.transformer."
    entries = (
        stored(dit("1.3B"), "F16", COMFY)
        | stored(umt5(), "F16", text)
        | stored(weight_files.vae21_diffusers(), "F16", "vae.")
    )
    parts = {part.kind: part for part in recognize_file(write(tmp_path / "whole.safetensors", entries))}
    assert {kind: part.prefix for kind, part in parts.items()} == {
        "transformer": COMFY,
        "text encoder": text,
        "vae": "vae.",
    }
    assert parts["transformer"].tensors == 825
    assert parts["vae"].map_key(f"{COMFY}head.modulation") is None


def test_a_block_that_lacks_what_the_others_have_is_named(tmp_path: Path) -> None:
    entries = stored(dit("1.3B"), "F16")
    for name in [name for name in entries if name.startswith("blocks.17.")]:
        del entries[name]
    del entries["blocks.3.self_attn.norm_q.weight"]
    part = only(write(tmp_path / "a.safetensors", entries))
    assert part.missing == ("blocks.3.self_attn.norm_q.weight", "blocks.17.*")


def test_a_shard_stands_for_its_whole_set_and_an_absent_one_is_named(tmp_path: Path) -> None:
    entries = stored(dit("14B"), "F32")
    files = weight_files.shards(tmp_path, "diffusion_pytorch_model", entries, 6, index=False)
    part = only(files[3])
    assert (part.files, part.parameters, part.tensors) == (tuple(files), 14_288_491_584, 1095)
    files[1].unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00006.safetensors: no such file"):
        recognize_file(files[0])


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 28577104432\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>Sign in", "web page"),
        (b"\xef\xbb\xbf\n<!doctype html>\n<html>", "web page"),
        (b"Entry not found", "a text, not the weights: it begins with 'Entry not found'"),
        (b'<?xml version="1.0"?>\n<Error>AccessDenied', "a text, not the weights"),
        (b"\x80\x02}q\x00.", "bare pickle"),
    ],
)
def test_a_file_that_only_looks_like_weights_is_named_for_what_it_is(
    tmp_path: Path, content: bytes, what: str
) -> None:
    path = tmp_path / "wan.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=what) as caught:
        recognize_file(path)
    assert caught.value.hint


def test_the_container_is_detected_by_content_and_not_by_name(tmp_path: Path) -> None:
    state = {name: torch.zeros(1).expand(shape) for name, shape in dit("1.3B").items()}
    torch.save(state, tmp_path / "wan.safetensors")
    assert only(tmp_path / "wan.safetensors").container == "pth"


def test_a_header_that_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", stored(dit("1.3B"), "F16"))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 2)
    with pytest.raises(CheckpointError, match="truncated or damaged: its tensors fill"):
        recognize_file(path)
    path.write_bytes(struct.pack("<Q", 50_000) + b"{}")
    with pytest.raises(CheckpointError, match="its header claims 50,000 bytes"):
        recognize_file(path)


# ---- GGUF ----


def write_sparse_gguf(
    path: Path,
    shapes: weight_files.Shapes,
    quant: Callable[[str], str],
    arch: str = "wan",
    words: tuple[str, ...] = (),
) -> Path:
    """A GGUF header written by llama.cpp's own library, before a hole as large as the data."""
    gguf = pytest.importorskip("gguf")
    import numpy as np

    writer, data = gguf.GGUFWriter(path, arch), 0
    if words:
        writer.add_token_list(words)
    for name, shape in shapes.items():
        kind = getattr(gguf.GGMLQuantizationType, quant(name))
        block, size = gguf.GGML_QUANT_SIZES[kind]
        count = int(np.prod(shape)) // block * size
        raw = kind not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
        data += -(-count // 32) * 32
        dims = (*shape[:-1], shape[-1] // block * size) if raw else shape
        writer.add_tensor_info(
            name, dims, np.dtype(np.uint8) if raw else np.dtype(np.float32), count, raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, -(-path.stat().st_size // 32) * 32 + data)
    return path


def mixed(name: str) -> str:
    """City96's Q4_K_M: values and the second feed-forward matrix one step finer."""
    if not weight_files.MATRIX.fullmatch(name):
        return "F32"
    return "Q6_K" if ".v." in name or ".ffn.2." in name else "Q4_K"


def test_a_gguf_transformer_is_known_by_its_tensors_and_types(tmp_path: Path) -> None:
    pytest.importorskip("wancli.weights.formats.gguf_header")
    part = only(write_sparse_gguf(tmp_path / "wan2.1-t2v-14b-Q4_K_M.gguf", dit("14B"), mixed))
    assert (part.name, part.container, part.naming) == ("Wan2.1-T2V-14B", "gguf", "official")
    assert (part.scheme.name, part.scheme.dtypes, part.scheme.layers) == ("gguf", ("Q4_K", "Q6_K"), 400)
    assert precision(part)["block matrices"] == {"Q4_K": 280, "Q6_K": 120}
    assert part.parameters == 14_288_491_584


def test_a_gguf_whose_patch_embedding_was_merged_has_the_same_sizes(tmp_path: Path) -> None:
    pytest.importorskip("wancli.weights.formats.gguf_header")
    shapes = dit("5B") | {"patch_embedding.weight": (147_456, 1, 2, 2)}
    part = only(write_sparse_gguf(tmp_path / "ti2v.gguf", shapes, mixed, "pig"))
    assert (part.name, dict(part.sizes)["in_dim"]) == ("Wan2.2-TI2V-5B", 48)


def test_a_gguf_text_encoder_is_umt5_xxl(tmp_path: Path) -> None:
    pytest.importorskip("wancli.weights.formats.gguf_header")
    words = {
        "shared.": "token_embd.",
        "encoder.final_layer_norm.": "enc.output_norm.",
        "encoder.block.": "enc.blk.",
        "layer.0.layer_norm.": "attn_norm.",
        "layer.0.SelfAttention.relative_attention_bias.": "attn_rel_b.",
        "layer.0.SelfAttention.": "attn_",
        "layer.1.layer_norm.": "ffn_norm.",
        "layer.1.DenseReluDense.wi_0.": "ffn_gate.",
        "layer.1.DenseReluDense.wi_1.": "ffn_up.",
        "layer.1.DenseReluDense.wo.": "ffn_down.",
    }
    shapes = {weight_files.renamed(name, words): shape for name, shape in umt5().items()}

    def quant(name: str) -> str:
        return "F32" if "norm" in name else "Q8_0"

    for tokens in ((), ("<pad>", "</s>")):
        path = write_sparse_gguf(
            tmp_path / f"umt5-Q8_0-{len(tokens)}.gguf", shapes, quant, "t5encoder", tokens
        )
        part = only(path)
        assert (part.kind, part.name, part.naming) == ("text encoder", "UMT5-XXL", "gguf")
        assert (part.config, part.tokenizer) == (XXL, bool(tokens))
