"""What `inspect` tells of a LoRA file, in every style that is going round."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from weight_files import Entries, write

from wancli.weights.component import Component
from wancli.weights.lora.describe import LoraInfo
from wancli.weights.single_files import recognize_file

D = 5120


def only(path: Path) -> Component:
    (part,) = recognize_file(path)
    return part


def lora(path: Path) -> LoraInfo:
    found = only(path).lora
    assert found is not None
    return found


def pair(layer: str, down: str, up: str, rank: int = 32, d: int = D) -> Entries:
    return {f"{layer}{down}": ("BF16", (rank, d)), f"{layer}{up}": ("BF16", (d, rank))}


def layers(template: str, names: list[str], down: str, up: str, rank: int = 32, blocks: int = 40) -> Entries:
    """The same layers of every block."""
    found: Entries = {}
    for block in range(blocks):
        for name in names:
            found |= pair(template.format(block, name), down, up, rank)
    return found


DOTTED, FLAT = ["self_attn.q", "cross_attn.o", "ffn.0"], ["self_attn_q", "cross_attn_o", "ffn_0"]
THEIRS, FLAT_THEIRS = (
    ["attn1.to_q", "attn2.to_out.0", "ffn.net.0.proj"],
    ["attn1_to_q", "attn2_to_out_0", "ffn_net_0_proj"],
)
AB = (".lora_A.weight", ".lora_B.weight")
AB_DEFAULT = (".lora_A.default.weight", ".lora_B.default.weight")
DOWN_UP = (".lora_down.weight", ".lora_up.weight")


@pytest.mark.parametrize(
    ("template", "names", "ends", "style"),
    [
        ("diffusion_model.blocks.{}.{}", DOTTED, AB, "ComfyUI"),
        ("diffusion_model.blocks.{}.{}", DOTTED, DOWN_UP, "LightX2V"),
        ("transformer.blocks.{}.{}", THEIRS, AB, "diffusers"),
        ("base_model.model.blocks.{}.{}", DOTTED, AB, "PEFT"),
        ("base_model.model.blocks.{}.{}", DOTTED, AB_DEFAULT, "PEFT"),
        ("blocks.{}.{}", DOTTED, AB_DEFAULT, "bare"),
        ("blocks.{}.{}", DOTTED, (".lora_A", ".lora_B"), "bare"),
        ("blocks.{}.{}", DOTTED, ("_lora.down.weight", "_lora.up.weight"), "bare"),
        ("blocks.{}.{}", THEIRS, (".lora.down.weight", ".lora.up.weight"), "bare"),
        ("blocks.{}.{}", THEIRS, (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"), "bare"),
        ("pipe.dit.blocks.{}.{}", DOTTED, AB, "DiffSynth"),
        ("lora_unet_blocks_{}_{}", FLAT, DOWN_UP, "kohya / musubi"),
        ("lora_unet__blocks_{}_{}", FLAT, DOWN_UP, "Wan-Fun"),
        ("lycoris_blocks_{}_{}", FLAT_THEIRS, DOWN_UP, "LyCORIS / ai-toolkit"),
    ],
)  # fmt: skip
def test_every_style_names_the_same_layers(
    tmp_path: Path, template: str, names: list[str], ends: tuple[str, str], style: str
) -> None:
    path = write(tmp_path / "a.safetensors", layers(template, names, *ends))
    found = lora(path)
    assert (found.style, found.methods, found.targets, found.blocks) == (style, ("LoRA",), 120, 40)
    assert dict(found.layers) == {"self_attn.q": 40, "cross_attn.o": 40, "ffn.0": 40}
    assert (found.ranks, found.alphas, found.width, found.image_layers) == ((32,), (), D, 0)
    part = only(path)
    assert (part.kind, part.name, part.refusal) == ("lora", "LoRA for Wan 14B", "")


def test_ranks_and_alphas_are_read_from_the_file(tmp_path: Path) -> None:
    entries = layers("lora_unet_blocks_{}_{}", FLAT[:1], *DOWN_UP, rank=16, blocks=2)
    entries |= layers("lora_unet_blocks_{}_{}", FLAT[1:2], *DOWN_UP, rank=64, blocks=2)
    alphas = {
        "lora_unet_blocks_0_self_attn_q.alpha": ("F32", struct.pack("<f", 8.0)),
        "lora_unet_blocks_1_self_attn_q.alpha": ("F16", struct.pack("<e", 8.0)),
        "lora_unet_blocks_0_cross_attn_o.alpha": ("BF16", struct.pack("<f", 32.0)[2:]),
    }
    entries |= {name: (dtype, ()) for name, (dtype, _) in alphas.items()}
    data = {name: raw for name, (_, raw) in alphas.items()}
    found = lora(write(tmp_path / "a.safetensors", entries, data=data))
    assert (found.ranks, found.alphas, found.targets) == ((16, 64), (8.0, 32.0), 4)


def test_the_alpha_of_peft_is_read_from_the_metadata(tmp_path: Path) -> None:
    entries = layers("transformer.blocks.{}.{}", THEIRS, *AB)
    said = {"lora_adapter_metadata": json.dumps({"transformer.r": 32, "transformer.lora_alpha": 64})}
    assert lora(write(tmp_path / "a.safetensors", entries, said)).alphas == (64.0,)


def test_differences_that_lightx2v_extracts_are_counted(tmp_path: Path) -> None:
    entries = layers("diffusion_model.blocks.{}.{}", ["self_attn.q"], *DOWN_UP, blocks=2)
    for block in range(2):
        at = f"diffusion_model.blocks.{block}."
        entries |= {f"{at}norm3.diff": ("BF16", (D,)), f"{at}self_attn.q.diff_b": ("BF16", (D,))}
        entries |= {f"{at}diff_m": ("BF16", (1, 6, D))}
    entries |= {"diffusion_model.head.diff_m": ("BF16", (1, 2, D))}
    found = lora(write(tmp_path / "a.safetensors", entries))
    assert (found.style, found.methods) == ("LightX2V, extracted", ("LoRA", "full differences"))
    assert dict(found.layers) == {"head.modulation": 1, "modulation": 2, "norm3": 2, "self_attn.q": 2}


def test_loha_lokr_and_dora_are_named(tmp_path: Path) -> None:
    layer = "lycoris_blocks_0_attn1_to_q"
    loha: Entries = {
        f"{layer}.{key}": ("F16", shape)
        for key, shape in {
            "hada_w1_a": (D, 8), "hada_w1_b": (8, D), "hada_w2_a": (D, 8), "hada_w2_b": (8, D),
        }.items()
    }  # fmt: skip
    found = lora(write(tmp_path / "a.safetensors", loha))
    assert (found.methods, found.ranks, found.width, found.targets) == (("LoHa",), (8,), D, 1)
    lokr: Entries = {
        f"{layer}.lokr_w1": ("F16", (16, 16)),
        f"{layer}.lokr_w2_a": ("F16", (320, 4)),
        f"{layer}.lokr_w2_b": ("F16", (4, 320)),
    }
    found = lora(write(tmp_path / "b.safetensors", lokr))
    assert (found.methods, found.ranks, found.targets) == (("LoKr",), (4,), 1)
    dora = pair("diffusion_model.blocks.0.self_attn.q", *AB)
    dora |= {"diffusion_model.blocks.0.self_attn.q.dora_scale": ("F32", (D, 1))}
    part = only(write(tmp_path / "c.safetensors", dora))
    assert part.lora is not None
    assert (part.lora.methods, part.lora.targets) == (("LoRA", "DoRA"), 1)
    assert part.refusal == (
        "diffusion_model.blocks.0.self_attn.q.dora_scale belongs to DoRA, which wancli does not apply"
    )


@pytest.mark.parametrize(
    ("d", "name"), [(1536, "LoRA for Wan2.1 1.3B"), (3072, "LoRA for Wan2.2 5B"), (48, "LoRA")]
)
def test_the_width_says_which_model_it_was_made_for(tmp_path: Path, d: int, name: str) -> None:
    path = write(tmp_path / "a.safetensors", pair("diffusion_model.blocks.0.self_attn.q", *AB, d=d))
    assert only(path).name == name


def test_a_lora_for_images_says_how_many_layers_a_t2v_model_lacks(tmp_path: Path) -> None:
    entries = layers(
        "diffusion_model.blocks.{}.{}", ["self_attn.q", "cross_attn.k_img", "cross_attn.v_img"], *AB
    )
    entries |= pair("diffusion_model.img_emb.proj.1", *AB)
    assert lora(write(tmp_path / "a.safetensors", entries)).image_layers == 81


def test_an_expert_s_lora_says_which_by_its_name(tmp_path: Path) -> None:
    entries = layers("diffusion_model.blocks.{}.{}", DOTTED, *DOWN_UP)
    assert only(write(tmp_path / "high_noise_model.safetensors", entries)).expert == "high"
    assert only(write(tmp_path / "Wan22_Lightning_LOW.safetensors", entries)).expert == "low"


@pytest.mark.parametrize(
    "layer", ["lora_unet_double_blocks_0_img_attn_qkv", "transformer.transformer_blocks.0.attn.to_q"]
)
def test_a_lora_for_another_family_is_refused_with_its_first_tensor(tmp_path: Path, layer: str) -> None:
    part = only(write(tmp_path / "flux.safetensors", pair(layer, *DOWN_UP, d=3072)))
    assert (part.kind, part.refusal) == ("lora", "none of its targets is a layer of Wan")
    assert layer in part.hint


def test_the_config_beside_a_file_of_peft_gives_its_scale(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", pair("base_model.model.blocks.0.self_attn.q", *AB))
    assert lora(path).config == ""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 32, "lora_alpha": 64}))
    assert lora(path).config == "adapter_config.json"


def test_the_keys_of_a_text_encoder_are_counted_and_quoted(tmp_path: Path) -> None:
    entries = pair("diffusion_model.blocks.0.self_attn.q", *AB)
    entries |= pair("lora_te1_encoder_block_0_layer_0_SelfAttention_q", *DOWN_UP)
    found = lora(write(tmp_path / "a.safetensors", entries))
    assert (found.targets, found.unknown, found.refusal) == (1, 2, "")
    assert found.examples[0].startswith("lora_te1_encoder_block_0")


def test_half_a_change_is_shown_with_what_is_wrong(tmp_path: Path) -> None:
    entries: Entries = {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": ("BF16", (32, D))}
    assert only(write(tmp_path / "a.safetensors", entries)).refusal.endswith("has no up to go with it")


def test_a_factor_without_axes_is_shown_with_what_is_wrong(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"blocks.0.self_attn.q.lora_A.weight": ("F32", ())})
    assert (lora(path).ranks, lora(path).targets) == ((), 1)
    assert "no up to go with it" in lora(path).refusal
