"""What a LoRA file changes and whether it fits, from its header, and every refusal."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from adapters import DIM, FFN, SHAPES, Tensors, changed, factors, flat, merged, pair, weights
from diffusers import WanTransformer3DModel
from weight_files import save_tensors

from wancli.errors import CheckpointError
from wancli.models.config import WanConfig
from wancli.models.dit import WanModel
from wancli.weights.checkpoint import identify
from wancli.weights.formats.infer_config import transformer_shapes
from wancli.weights.formats.safetensors_header import read_tensors
from wancli.weights.lora.file import read_lora_file
from wancli.weights.lora.key_mapping import official_module
from wancli.weights.lora.match import select_changes
from wancli.weights.lora.patch import load_lora

# ---- names ----


def test_every_module_of_the_model_is_found_under_both_its_names() -> None:
    with torch.device("meta"):
        ours = WanModel(WanConfig(DIM, FFN, 2, 12, text_dim=32, freq_dim=64))
        theirs = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            ffn_dim=FFN,
            num_layers=12,
            image_dim=8,
            added_kv_proj_dim=DIM,
        )
    wanted = {name.removesuffix(".weight").removesuffix(".bias") for name in ours.state_dict()}
    for name in wanted:
        assert official_module(name) == official_module(flat(name)) == name
    written = {name.removesuffix(".weight").removesuffix(".bias") for name in theirs.state_dict()}
    found = {name: official_module(flat(name)) for name in written}
    assert len(set(found.values())) == len(written)
    image = {name for name in written if "image_embedder" in name or "add_" in name or "added" in name}
    assert {found[name] for name in written - image} == wanted
    assert {name.split(".", 2)[-1] for name in (found[name] or "" for name in image) if "cross" in name} == {
        "cross_attn.k_img",
        "cross_attn.v_img",
        "cross_attn.norm_k_img",
    }


def test_no_other_name_is_taken_for_a_module() -> None:
    for name in (
        "blocks.0",
        "blocks.0.self_attn",
        "blocks.x.ffn.0",
        "vace_blocks.0.ffn.0",
        "shared",
        "heads",
        "",
    ):
        assert official_module(name) is None


def test_the_sizes_of_a_model_tell_every_parameter_and_its_shape(tiny: Path) -> None:
    tensors = read_tensors(tiny / "diffusion_pytorch_model.safetensors")
    expected = {name: info.shape for name, info in tensors.items()}
    assert transformer_shapes(identify(tiny).transformer_config) == expected


# ---- what fits a model ----


def shapes(width: int, depth: int, in_dim: int = 16) -> dict[str, tuple[int, ...]]:
    return transformer_shapes(WanConfig(width, 4 * width, width // 128, depth, in_dim=in_dim))


def test_a_lora_of_another_model_is_refused_with_both_shapes_and_both_models(tmp_path: Path) -> None:
    path = save_tensors(
        tmp_path / "big.safetensors", pair("diffusion_model.blocks.0.self_attn.q", 5120, 5120)
    )
    with pytest.raises(CheckpointError) as caught:
        select_changes(read_lora_file(path), shapes(1536, 1))
    assert str(caught.value) == (
        f"{path}: diffusion_model.blocks.0.self_attn.q.lora_B.weight makes a change of [5120, 5120] to "
        "blocks.0.self_attn.q.weight, which is [1536, 1536] in this model"
    )
    assert caught.value.hint == "This LoRA was made for Wan 14B, and this is Wan2.1 1.3B."


def test_a_block_past_the_last_is_of_another_model(tmp_path: Path) -> None:
    path = save_tensors(tmp_path / "a.safetensors", pair("blocks.30.ffn.0", FFN, DIM))
    with pytest.raises(
        CheckpointError, match=r"blocks.30.ffn.0.weight, which is not in this model, whose last block is 2"
    ):
        select_changes(read_lora_file(path), SHAPES)


def test_what_only_image_models_have_is_skipped_and_counted(tmp_path: Path) -> None:
    found = {
        **pair("diffusion_model.blocks.0.cross_attn.k", DIM, DIM),
        **pair("diffusion_model.blocks.0.cross_attn.k_img", DIM, DIM),
        **pair("diffusion_model.blocks.0.cross_attn.v_img", DIM, DIM),
        "diffusion_model.blocks.0.cross_attn.v_img.diff_b": torch.zeros(DIM),
        "diffusion_model.blocks.0.cross_attn.norm_k_img.diff": torch.zeros(DIM),
        **pair("diffusion_model.img_emb.proj.1", 8, 8),
        "diffusion_model.patch_embedding.diff": torch.zeros(DIM, 36, 1, 2, 2),
    }
    before = weights()
    path = save_tensors(tmp_path / "a.safetensors", found)
    assert changed(merged(path, before), before) == {"blocks.0.cross_attn.k.weight"}
    coverage = load_lora(path, SHAPES).coverage
    assert (coverage.targets, coverage.skipped, coverage.unused) == (1, 6, 0)
    matrices = {key: tensor for key, tensor in found.items() if ".cross_attn." in key and ".lora_" in key}
    written = {
        key.replace("diffusion_model.", "")
        .replace(".", "_", 3)
        .replace("blocks_", "lora_unet__blocks_"): tensor
        for key, tensor in matrices.items()
    }
    underscores = save_tensors(tmp_path / "b.safetensors", written)
    coverage = load_lora(underscores, SHAPES).coverage
    assert (coverage.style, coverage.targets, coverage.skipped) == ("Wan-Fun", 1, 2)


@pytest.mark.parametrize("shape", [(DIM, 48, 1, 2, 2), (2 * DIM, 36, 1, 2, 2)])
def test_a_lora_for_other_inputs_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    found = {"patch_embedding.diff": torch.zeros(shape), **pair("blocks.0.ffn.0", FFN, DIM)}
    path = save_tensors(tmp_path / "a.safetensors", found)
    message = f"{list(shape)} to patch_embedding.weight, which is [48, 16, 1, 2, 2]"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        select_changes(read_lora_file(path), SHAPES)


def test_keys_that_name_nothing_are_counted_and_nothing_at_all_is_an_error(tmp_path: Path) -> None:
    foreign = {
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0),
        **pair("diffusion_model.double_blocks.0.img_attn.qkv", DIM, DIM),
        "diffusion_model.blocks.0.self_attn.norm_q.diff_b": torch.zeros(DIM),  # that norm has no bias
        "diffusion_model.blocks.1.ffn.0.alpha": torch.tensor(1.0),
    }
    down, up = factors("blocks.0.ffn.0")
    own = {
        "diffusion_model.blocks.0.ffn.0.lora_A.weight": down,
        "diffusion_model.blocks.0.ffn.0.lora_B.weight": up,
    }
    coverage = load_lora(save_tensors(tmp_path / "a.safetensors", foreign | own), SHAPES).coverage
    assert (coverage.targets, coverage.unused, len(coverage.examples)) == (1, 5, 3)
    with pytest.raises(CheckpointError, match="changes nothing in this model; none of its 5 keys"):
        load_lora(save_tensors(tmp_path / "b.safetensors", foreign), SHAPES)
    with pytest.raises(CheckpointError, match="none of its 0 keys"):
        load_lora(save_tensors(tmp_path / "c.safetensors", {}), SHAPES)


# ---- damage ----

Q = "diffusion_model.blocks.0.self_attn.q"
WRONG: dict[str, tuple[Tensors, str]] = {
    "half": ({f"{Q}.lora_A.weight": torch.zeros(2, DIM)}, "has no up to go with it"),
    "other half": ({f"{Q}.lora_up.weight": torch.zeros(DIM, 2)}, "has no down to go with it"),
    "ranks": (
        {f"{Q}.lora_A.weight": torch.zeros(2, DIM), f"{Q}.lora_B.weight": torch.zeros(DIM, 3)},
        r"do not multiply: \[48, 3\] @ \[2, 48\]",
    ),
    "no rank": (
        {f"{Q}.lora_A.weight": torch.zeros(0, DIM), f"{Q}.lora_B.weight": torch.zeros(DIM, 0)},
        "do not multiply",
    ),
    "vector": (
        {f"{Q}.lora_A.weight": torch.zeros(DIM), f"{Q}.lora_B.weight": torch.zeros(DIM, 1)},
        "is not a matrix",
    ),
    "loha": (
        {
            f"{Q}.hada_w1_a": torch.zeros(4, 2),
            f"{Q}.hada_w1_b": torch.zeros(2, 4),
            f"{Q}.hada_w2_a": torch.zeros(2, 2),
            f"{Q}.hada_w2_b": torch.zeros(2, 4),
        },
        r"\[4, 4\] element by element \[2, 4\]",
    ),
    "lokr": (
        {
            f"{Q}.lokr_w1": torch.zeros(4, 4),
            f"{Q}.lokr_w1_a": torch.zeros(4, 2),
            f"{Q}.lokr_w2": torch.zeros(2, 2),
        },
        "lokr_w1 appears both whole and as a product",
    ),
    "two ways": (
        pair(Q, DIM, DIM) | {f"{Q}.diff": torch.zeros(DIM, DIM)},
        "blocks.0.self_attn.q is changed in two ways, by full and low-rank",
    ),
    "two names": (
        pair(Q, DIM, DIM) | pair("transformer.blocks.0.attn1.to_q", DIM, DIM),
        "are the same under two names",
    ),
    "integers": (
        {
            f"{Q}.lora_A.weight": torch.zeros(2, DIM, dtype=torch.int8),
            f"{Q}.lora_B.weight": torch.zeros(DIM, 2),
        },
        "lora_A.weight is stored as I8",
    ),
    "alphas": (pair(Q, DIM, DIM) | {f"{Q}.alpha": torch.zeros(2)}, r"alpha is not one number but \[2\]"),
    "DoRA": (pair(Q, DIM, DIM) | {f"{Q}.dora_scale": torch.ones(DIM, 1)}, "belongs to DoRA, which"),
    "DoRA of PEFT": (
        pair(Q, DIM, DIM) | {f"{Q}.lora_magnitude_vector.default.weight": torch.ones(DIM)},
        "belongs to DoRA, which",
    ),
    "Tucker": (pair(Q, DIM, DIM) | {f"{Q}.lora_mid.weight": torch.ones(2, 2)}, "a Tucker decomposition"),
    "OFT": ({f"{Q}.oft_blocks": torch.ones(2, 2, 2)}, "belongs to OFT"),
    "GLoRA": ({f"{Q}.a1.weight": torch.ones(2, 2)}, "belongs to GLoRA"),
    "control": ({f"{Q}.reshape_weight": torch.ones(2)}, "changes the model's shape"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_applied_is_refused_with_file_and_key(what: str, tmp_path: Path) -> None:
    tensors, message = WRONG[what]
    path = save_tensors(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_lora_file(path)
    assert caught.value.where == str(path)
    assert "blocks.0.self_attn.q" in caught.value.message or "attn1.to_q" in caught.value.message


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("end", ["lora_A.weight", "lora_B.weight", "alpha"])
def test_nan_and_inf_are_refused_with_their_key(end: str, value: float, tmp_path: Path) -> None:
    key = f"{Q}.{end}"
    tensors = pair(Q, DIM, DIM) | {f"{Q}.alpha": torch.tensor(1.0)}
    tensors[key].view(-1)[0] = value
    with pytest.raises(CheckpointError) as caught:
        load_lora(save_tensors(tmp_path / "bad.safetensors", tensors), SHAPES)
    assert caught.value.message == f"{key} holds NaN or Inf"


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = save_tensors(tmp_path / "a.safetensors", pair(Q, DIM, DIM))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_lora_file(path)
