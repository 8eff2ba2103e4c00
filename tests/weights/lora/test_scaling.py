"""How strong a LoRA file says that it is, against PEFT's own rule, and what is told about it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import RANK, SHAPES, Tensors, factors, pair
from weight_files import save_tensors

from wancli.errors import CheckpointError
from wancli.weights.lora.file import read_lora_file
from wancli.weights.lora.match import Coverage, select_changes
from wancli.weights.lora.patch import load_lora

THEIRS = {"self_attn.q": "attn1.to_q", "ffn.0": "ffn.net.0.proj"}
MODULES = [f"blocks.{block}.{name}" for block in (0, 1, 2) for name in THEIRS]


def scale_in_peft(config: dict[str, Any], module: str, rank: int) -> float:
    """The scale that PEFT gives a module (LoraModel._create_and_replace): its `get_pattern_key` is quoted."""

    def get_pattern_key(pattern_keys: dict[str, int], key_to_match: str) -> str:
        for key in pattern_keys:
            if re.match(rf"(.*\.)?({key})$", key_to_match):
                return key
        return key_to_match

    patterns = config.get("alpha_pattern", {})
    alpha = patterns.get(get_pattern_key(patterns, module), config["lora_alpha"])
    return float(alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)


def write(path: Path, metadata: dict[str, str], extra: Tensors | None = None) -> Path:
    """A LoRA in diffusers' naming, of rank 4."""
    found: Tensors = {}
    for ours in MODULES:
        _, block, name = ours.split(".", 2)
        down, up = factors(ours)
        key = f"transformer.blocks.{block}.{THEIRS[name]}"
        found |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    return save_tensors(path, found | (extra or {}), metadata)


def scales_of(path: Path) -> dict[str, float]:
    return {
        name.removesuffix(".weight"): delta.scale for name, delta in load_lora(path, SHAPES).deltas.items()
    }


def coverage_of(path: Path) -> Coverage:
    return select_changes(read_lora_file(path), SHAPES)[1]


@pytest.mark.parametrize(
    "pattern",
    [
        {"^blocks.0.ffn.net.0.proj": 4, "^blocks.1.ffn.net.0.proj": 2},
        {r"blocks\.\d+\.ffn\.net\.0\.proj": 4},
        {r"blocks\.[01]\.attn1\.to_(q|k|v)": 1},
        {"ffn.net.0.proj": 4},
        {"1.ffn.net.0.proj": 4},
        {".*to_q": 3, "blocks.0.attn1.to_q": 5},
        {"to_q|proj": 6},
    ],
    ids=str,
)
@pytest.mark.parametrize("stabilised", [False, True])
def test_patterns_are_matched_as_peft_matches_them(
    tmp_path: Path, pattern: dict[str, int], stabilised: bool
) -> None:
    config = {"r": 4, "lora_alpha": 16, "alpha_pattern": pattern, "use_rslora": stabilised}
    path = write(tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    expected = {}
    for ours in MODULES:
        _, block, name = ours.split(".", 2)
        expected[ours] = scale_in_peft(config, f"blocks.{block}.{THEIRS[name]}", RANK)
    assert scales_of(path) == pytest.approx(expected)
    assert coverage_of(path).scales == tuple(sorted(set(expected.values())))
    assert coverage_of(path).notes == ()


@pytest.mark.parametrize("key", ["alpha_pattern", "rank_pattern"])
def test_a_pattern_that_matches_no_module_is_told(tmp_path: Path, key: str) -> None:
    config = {"r": 4, "lora_alpha": 4, key: {"^blocks.9.attn1.to_q": 2, "to_q": 4}}
    path = write(tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    assert coverage_of(path).notes == (
        "its pattern '^blocks.9.attn1.to_q' matches no module, so the scale is that of the others",
    )


@pytest.mark.parametrize("pattern", ["(", "(a+)+x", "a*a*a*a*a*x"])
def test_a_pattern_that_is_no_expression_or_takes_forever_is_refused(tmp_path: Path, pattern: str) -> None:
    config = {"r": 4, "lora_alpha": 4, "alpha_pattern": {pattern: 2}}
    path = write(tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(CheckpointError, match="alpha_pattern: "):
        read_lora_file(path)


@pytest.mark.parametrize(
    "metadata",
    [
        {"alpha": "2", "rank": "4"},
        {"lora_alpha": "2.0", "r": "4"},
        {"network_alpha": "2"},
        {"lora_config": json.dumps({"r": 4, "lora_alpha": 2, "init_lora_weights": True})},
        {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2})},
    ],
    ids=lambda metadata: next(iter(metadata)),
)
def test_an_alpha_in_the_metadata_alone_is_applied(tmp_path: Path, metadata: dict[str, str]) -> None:
    path = write(tmp_path / "a.safetensors", metadata)
    assert set(scales_of(path).values()) == {0.5}
    assert read_lora_file(path).scaled
    assert coverage_of(path).notes == ()


def test_alphas_beside_the_matrices_win_over_the_metadata(tmp_path: Path) -> None:
    alpha = {"transformer.blocks.0.attn1.to_q.alpha": torch.tensor(12.0)}
    scales = scales_of(write(tmp_path / "a.safetensors", {"alpha": "2"}, alpha))
    assert scales.pop("blocks.0.self_attn.q") == 3
    assert set(scales.values()) == {0.5}


@pytest.mark.parametrize(
    ("metadata", "scale", "note"),
    [
        ({"ss_network_alpha": "16"}, 1, r"ss_network_alpha = '16' .* converters bake that"),
        (
            {"alpha": "cosine"},
            1,
            r"alpha = 'cosine', which is not a number from 0 up; its scale is taken as 1",
        ),
        ({"alpha": "2", "lora_alpha": "8"}, 2, r"lora_alpha = '8', alpha = '2'; lora_alpha is taken"),
    ],
)
def test_what_the_metadata_says_in_vain_is_told(
    tmp_path: Path, metadata: dict[str, str], scale: float, note: str
) -> None:
    path = write(tmp_path / "a.safetensors", metadata)
    assert set(scales_of(path).values()) == {scale}
    (told,) = coverage_of(path).notes
    assert re.search(note, told)


def test_only_scales_that_the_first_versions_did_not_read_are_new(tmp_path: Path) -> None:
    plain = {"r": 4, "lora_alpha": 2, "alpha_pattern": {"to_q": 4}}
    expression = {"r": 4, "lora_alpha": 2, "alpha_pattern": {"^blocks.0.attn1.to_q": 4}}
    for metadata, rescaled in (
        ({}, False),
        ({"lora_adapter_metadata": json.dumps(plain)}, False),
        ({"lora_adapter_metadata": json.dumps(expression)}, True),
        ({"alpha": "2"}, True),
    ):
        assert read_lora_file(write(tmp_path / "a.safetensors", metadata)).rescaled is rescaled


def test_a_configuration_of_dora_is_refused(tmp_path: Path) -> None:
    config = {"r": 4, "lora_alpha": 4, "use_dora": True}
    path = write(tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(CheckpointError, match="says use_dora; wancli does not apply DoRA"):
        read_lora_file(path)


@pytest.mark.parametrize(
    ("said", "what"),
    [
        *(({"init_lora_weights": start}, "PEFT changed first") for start in ("pissa", "pissa_niter_16")),
        *(({"init_lora_weights": start}, "PEFT changed first") for start in ("olora", "corda", "loftq")),
        ({"peft_type": "ADALORA"}, "peft_type = 'ADALORA'"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    ],
    ids=str,
)
def test_a_method_whose_matrices_are_not_what_is_added_is_refused(
    tmp_path: Path, said: dict[str, Any], what: str
) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4} | said
    path = write(tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(CheckpointError, match=what):
        read_lora_file(path)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_a_start_that_leaves_the_weights_of_the_model_is_applied(tmp_path: Path, start: object) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "init_lora_weights": start}
    path = write(tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    assert coverage_of(path).scales == (2.0,)


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.head.head.weight",
        "base_model.model.head.head.modules_to_save.default.weight",
        "base_model.model.blocks.0.ffn.0.base_layer.weight",
        "diffusion_model.blocks.2.norm3.bias",
        "transformer.blocks.1.attn1.to_out.0.weight",
        "diffusion_model.blocks.0.modulation",
        "transformer.scale_shift_table",
    ],
)
def test_a_weight_that_is_replaced_is_refused(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "a.safetensors", {}, {key: torch.ones(4)})
    with pytest.raises(CheckpointError, match=f"{re.escape(key)} replaces a weight of the model"):
        read_lora_file(path)


def test_a_model_is_no_lora(tmp_path: Path) -> None:
    path = save_tensors(tmp_path / "a.safetensors", {name: torch.ones(1) for name in SHAPES})
    with pytest.raises(CheckpointError, match="this is a model and no LoRA"):
        read_lora_file(path)


def test_matrices_that_the_header_calls_quantized_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"_quantization_metadata": "{}"})
    with pytest.raises(CheckpointError, match="_quantization_metadata says that its matrices are quantized"):
        read_lora_file(path)


# ---- keys beside a layer that the file changes ----


@pytest.mark.parametrize(
    ("end", "what"),
    [
        ("magnitude", "belongs to DoRA"),
        ("dora_scale", "belongs to DoRA"),
        ("lora_magnitude_vector.default.weight", "belongs to DoRA"),
        ("lora_A.scale_weight", "says what the matrices beside it mean"),
        ("lora_B.weight_scale", "says what the matrices beside it mean"),
        ("lora_B.comfy_quant", "says what the matrices beside it mean"),
        ("gate", "says what the matrices beside it mean"),
        ("lora_C.weight", "says what the matrices beside it mean"),
    ],
)
@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_", ""])
def test_a_key_beside_a_changed_layer_is_refused_by_name(
    tmp_path: Path, prefix: str, end: str, what: str
) -> None:
    layer = f"{prefix}{'blocks_0_ffn_0' if prefix == 'lora_unet_' else 'blocks.0.ffn.0'}"
    rows, columns = SHAPES["blocks.0.ffn.0.weight"]
    found = pair(layer, rows, columns) | {f"{layer}.{end}": torch.ones(1)}
    with pytest.raises(CheckpointError, match=re.escape(f"{layer}.{end} {what}")):
        read_lora_file(save_tensors(tmp_path / "a.safetensors", found))


def test_a_marker_of_scaled_fp8_is_refused(tmp_path: Path) -> None:
    rows, columns = SHAPES["blocks.0.ffn.0.weight"]
    found = pair("blocks.0.ffn.0", rows, columns) | {"scaled_fp8": torch.ones(0)}
    with pytest.raises(CheckpointError, match="scaled_fp8 says what") as caught:
        read_lora_file(save_tensors(tmp_path / "a.safetensors", found))
    assert "with scales" in caught.value.hint


def test_a_bias_that_the_model_lacks_beside_a_weight_that_it_has_is_refused(tmp_path: Path) -> None:
    norm = "diffusion_model.blocks.0.self_attn.norm_q"
    shape = SHAPES["blocks.0.self_attn.norm_q.weight"]
    found = {f"{norm}.diff": torch.ones(shape), f"{norm}.diff_b": torch.ones(shape)}
    with pytest.raises(CheckpointError, match=r"norm_q.diff_b changes blocks.0.self_attn.norm_q.bias"):
        coverage_of(save_tensors(tmp_path / "a.safetensors", found))


# ---- prefixes ----


@pytest.mark.parametrize(
    "layer",
    [
        "model.diffusion_model.{}",
        "module.{}",
        "net.dit.{}",
        "transformer_2.{}",
        "_orig_mod.{}",
        "diffusion_model._orig_mod.{}",
        "lora_unet_model_diffusion_model_{}",
        "lora_dit_{}",
    ],
)
def test_keys_behind_any_prefix_are_read(tmp_path: Path, layer: str) -> None:
    found: Tensors = {}
    for ours in ("blocks.1.ffn.0", "text_embedding.0"):
        written = layer.format(ours.replace(".", "_") if layer.startswith("lora_") else ours)
        down, up = factors(ours)
        found |= {f"{written}.lora_down.weight": down, f"{written}.lora_up.weight": up}
    lora = load_lora(save_tensors(tmp_path / "a.safetensors", found), SHAPES)
    assert lora.deltas.keys() == {"blocks.1.ffn.0.weight", "text_embedding.0.weight"}
    assert lora.coverage.unused == 0


@pytest.mark.parametrize(
    "key",
    [
        "diffusion_model.blocks.1._orig_mod.ffn.0",
        "_fsdp_wrapped_module.blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module.ffn.0",
        "lora_unet_blocks_1__checkpoint_wrapped_module_ffn_0",
    ],
)
def test_a_wrapped_block_is_the_block(tmp_path: Path, key: str) -> None:
    down, up = factors("blocks.1.ffn.0")
    path = save_tensors(
        tmp_path / "a.safetensors", {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    )
    assert load_lora(path, SHAPES).deltas.keys() == {"blocks.1.ffn.0.weight"}


@pytest.mark.parametrize(
    "prefix",
    ["vace_blocks.0.", "text_encoders.umt5.blocks.0.", "controlnet.blocks.0.", "lora_unet_vace_blocks_0_"],
)
def test_blocks_of_other_networks_are_none_of_the_transformer(tmp_path: Path, prefix: str) -> None:
    layer = prefix + ("ffn_0" if prefix.endswith("_") else "ffn.0")
    path = save_tensors(tmp_path / "a.safetensors", pair(layer, *SHAPES["blocks.0.ffn.0.weight"]))
    with pytest.raises(CheckpointError, match="changes nothing in this model"):
        coverage_of(path)
