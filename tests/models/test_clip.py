"""The vision tower against the official numbers and transformers."""

from __future__ import annotations

import torch
from image_cases import CLIP, numbers
from oracles import relative_error
from transformers import CLIPVisionConfig, CLIPVisionModel

from wancli.models.clip import CLIPVision
from wancli.models.config import CLIPConfig

TINY = CLIPConfig(dim=160, num_heads=2, num_layers=3, mlp_dim=320)


def build(dtype: torch.dtype = torch.float32) -> CLIPVision:
    saved = torch.load(CLIP, weights_only=True)
    network = CLIPVision(TINY).to(dtype)
    network.load_state_dict({name: saved[f"visual.{name}"] for name in network.state_dict()})
    return network.eval()


def test_the_rows_are_those_of_the_official_code() -> None:
    reference = numbers("wan21-i2v-tiny")
    rows_PNE = build()(reference["clip.input.input"])
    assert relative_error(rows_PNE, reference["clip.input.features"]) < 1e-5


def test_pictures_together_have_the_rows_that_they_have_alone() -> None:
    network, pixels = build(), torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([network(pixels[i : i + 1]) for i in range(2)])
    assert relative_error(network(pixels), alone) < 1e-6


def test_half_precision_returns_fp32_near_it() -> None:
    reference = numbers("wan21-i2v-tiny")
    rows_PNE = build(torch.float16)(reference["clip.input.input"])
    assert rows_PNE.dtype == torch.float32
    assert relative_error(rows_PNE, reference["clip.input.features"]) < 5e-3


def test_the_rows_are_the_hidden_states_before_the_last_block_of_transformers() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 3, "intermediate_size": 80}
    theirs = CLIPVisionModel(
        CLIPVisionConfig(**sizes, patch_size=14, image_size=56, hidden_act="gelu")
    ).eval()
    ours = CLIPVision(CLIPConfig(48, 3, 3, 80, image=56)).eval()
    words = {
        "embeddings.": "",
        "class_embedding": "cls_embedding",
        "position_embedding.weight": "pos_embedding",
        "pre_layrnorm": "pre_norm",
        "encoder.layers": "transformer",
        "layer_norm": "norm",
        "self_attn.out_proj": "attn.proj",
        "fc1": "0",
        "fc2": "2",
    }
    renamed = {}
    for name, tensor in theirs.state_dict().items():
        short = name.removeprefix("vision_model.")
        for old, new in words.items():
            short = short.replace(old, new)
        renamed[short] = tensor
    for layer in range(2):
        for kind in ("weight", "bias"):
            parts = [renamed[f"transformer.{layer}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
            renamed[f"transformer.{layer}.attn.to_qkv.{kind}"] = torch.cat(parts)
    ours.load_state_dict({n: renamed[n].view(t.shape) for n, t in ours.state_dict().items()})
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = theirs(pixels, output_hidden_states=True).hidden_states[-2]
    assert relative_error(ours(pixels), expected) < 1e-5
