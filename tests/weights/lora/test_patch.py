"""LoRA files of every style, against diffusers' converters and against the papers' formulas in fp64."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adapters import (
    DEPTH,
    DIM,
    FFN,
    RANK,
    SHAPES,
    Tensors,
    changed,
    factors,
    flat,
    merged,
    pair,
    use,
    weights,
)
from diffusers import WanTransformer3DModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_musubi_wan_lora_to_diffusers,
    _convert_non_diffusers_wan_lora_to_diffusers,
)
from oracles import relative_error
from safetensors.torch import load_file
from torch import Tensor
from weight_files import save_tensors

from wancli.errors import CheckpointError
from wancli.models.config import WanConfig
from wancli.models.dit import WanModel
from wancli.weights.checkpoint import identify
from wancli.weights.formats.key_mapping import transformer_from_diffusers
from wancli.weights.loader import iterate_transformer_tensors, load_into
from wancli.weights.lora.file import read_lora_file
from wancli.weights.lora.patch import Lora, Loras, Patches, add_deltas, load_lora

ALPHA = 6.0

# Official and diffusers names of the matrices of a block, by hand.
MATRICES = {
    **{f"self_attn.{p}": f"attn1.to_{p}" for p in "qkv"},
    "self_attn.o": "attn1.to_out.0",
    **{f"cross_attn.{p}": f"attn2.to_{p}" for p in "qkv"},
    "cross_attn.o": "attn2.to_out.0",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
Write = Callable[[str, str], str]  # (official, diffusers) name of a module -> the module as a file writes it

# Style -> how it writes a module, how its keys end (down, up), whether it has an alpha.
AB = (".lora_A.weight", ".lora_B.weight")
NAMED = (".lora_A.default.weight", ".lora_B.default.weight")
DOWN_UP = (".lora_down.weight", ".lora_up.weight")
STYLES: dict[str, tuple[Write, tuple[str, str], bool]] = {
    "ComfyUI": (lambda o, d: f"diffusion_model.{o}", AB, False),
    "ComfyUI, alpha": (lambda o, d: f"diffusion_model.{o}", AB, True),
    "ComfyUI, whole model": (lambda o, d: f"model.diffusion_model.{o}", AB, False),
    "LightX2V": (lambda o, d: f"diffusion_model.{o}", DOWN_UP, True),
    "diffusers": (lambda o, d: f"transformer.{d}", AB, False),
    "diffusers, old": (lambda o, d: f"transformer.{d}", (".lora.down.weight", ".lora.up.weight"), False),
    "diffusers, older": (lambda o, d: f"transformer.{d}", ("_lora.down.weight", "_lora.up.weight"), False),
    "diffusers, text": (
        lambda o, d: f"transformer.{d}",
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
        False,
    ),
    "PEFT": (lambda o, d: f"base_model.model.{o}", AB, False),
    "PEFT, named": (lambda o, d: f"base_model.model.{d}", NAMED, False),
    "bare": (lambda o, d: o, NAMED, False),
    "bare, no weight": (lambda o, d: o, (".lora_A", ".lora_B"), False),
    "DiffSynth": (lambda o, d: f"pipe.dit.{o}", NAMED, False),
    "kohya / musubi": (lambda o, d: f"lora_unet_{flat(o)}", DOWN_UP, True),
    "kohya / musubi, diffusers names": (lambda o, d: f"lora_transformer_{flat(d)}", DOWN_UP, True),
    "Wan-Fun": (lambda o, d: f"lora_unet__{flat(o)}", DOWN_UP, True),
    "LyCORIS / ai-toolkit": (lambda o, d: f"lycoris_{flat(d)}", DOWN_UP, True),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


def modules(blocks: range = range(DEPTH)) -> Iterator[tuple[str, str]]:
    for block in blocks:
        for ours, theirs in MATRICES.items():
            yield f"blocks.{block}.{ours}", f"blocks.{block}.{theirs}"


def exact(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.double().numpy()


def assert_close(tensor: Tensor, expected: np.ndarray[Any, Any]) -> None:
    np.testing.assert_allclose(exact(tensor), expected, rtol=1e-5, atol=1e-5)


# ---- one effect, many styles ----


@pytest.mark.parametrize("style", STYLES)
def test_every_style_of_file_changes_the_same_weights(style: str, tmp_path: Path) -> None:
    write, (down_end, up_end), has_alpha = STYLES[style]
    found: Tensors = {}
    before = weights()
    expected = {}
    for ours, theirs in modules():
        down, up = factors(ours)
        found |= {f"{write(ours, theirs)}{down_end}": down, f"{write(ours, theirs)}{up_end}": up}
        if has_alpha:
            found[f"{write(ours, theirs)}.alpha"] = torch.tensor(ALPHA)
        scale = 0.7 * (ALPHA / RANK if has_alpha else 1)
        expected[f"{ours}.weight"] = exact(before[f"{ours}.weight"]) + scale * (exact(up) @ exact(down))
    path = save_tensors(tmp_path / "a.safetensors", found)
    after = merged(path, before, 0.7)
    assert changed(after, before) == expected.keys()
    for name, weight in expected.items():
        assert_close(after[name], weight)
    lora = load_lora(path, SHAPES)
    assert lora.coverage.style == style.partition(",")[0]
    assert (lora.coverage.targets, lora.coverage.unused, lora.coverage.skipped) == (30, 0, 0)
    assert (lora.coverage.ranks, lora.coverage.blocks) == ((RANK,), (0, 1, 2))
    assert lora.scales == (ALPHA / RANK if has_alpha else 1.0,)


@pytest.fixture
def twins() -> tuple[WanModel, WanTransformer3DModel]:
    """The same small model, ours and diffusers'."""
    theirs = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, text_dim=32, freq_dim=64, ffn_dim=FFN, num_layers=DEPTH
    )
    with torch.device("meta"):
        ours = WanModel(WanConfig(DIM, FFN, 2, DEPTH, text_dim=32, freq_dim=64))
    load_into(
        ours,
        ((name, tensor.clone()) for name, tensor in theirs.state_dict().items()),
        rename=transformer_from_diffusers,
        dtype=torch.float32,
        device="cpu",
        keep_fp32=lambda _: True,
        where="here",
    )
    return ours, theirs


def outside(end: tuple[str, str]) -> Tensors:
    """Factors of what lies outside the blocks, as extracted LoRAs have them."""
    found: Tensors = {}
    for name in ("text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"):
        down, up = factors(name)
        found |= {f"diffusion_model.{name}{end[0]}": down, f"diffusion_model.{name}{end[1]}": up}
    for name in ("time_projection.1", "head.head"):
        down, up = factors(name)
        found |= {
            f"diffusion_model.{name}{end[0]}": down,
            f"diffusion_model.{name}{end[1]}": up,
            f"diffusion_model.{name}.diff_b": torch.randn(len(up)),
        }
    return found


def add_to_reference(reference: WanTransformer3DModel, changes: Tensors) -> None:
    """Add pairs of matrices, and biases, to the weights of a model of diffusers."""
    for key, down in changes.items():
        module, _, end = key.removeprefix("transformer.").rpartition(".lora_")
        if end == "A.weight":
            reference.get_parameter(f"{module}.weight").add_(changes[key.replace("lora_A", "lora_B")] @ down)
        elif end == "B.bias":
            reference.get_parameter(f"{module}.bias").add_(down)


@pytest.mark.parametrize("style", ["ComfyUI", "LightX2V", "kohya / musubi"])
def test_a_lora_gives_the_velocity_that_diffusers_converters_give(
    style: str, twins: tuple[WanModel, WanTransformer3DModel], tmp_path: Path
) -> None:
    write, (down_end, up_end), has_alpha = STYLES[style]
    found: Tensors = {}
    for ours, theirs in modules():
        down, up = factors(ours)
        found |= {
            f"{write(ours, theirs)}{down_end}": 0.1 * down,
            f"{write(ours, theirs)}{up_end}": 0.1 * up,
        }
        if has_alpha:
            found[f"{write(ours, theirs)}.alpha"] = torch.tensor(ALPHA)
        if style != "kohya / musubi":
            found[f"{write(ours, theirs)}.diff_b"] = 0.1 * torch.randn(len(up))
    if style != "kohya / musubi":
        found |= {key: 0.1 * tensor for key, tensor in outside((down_end, up_end)).items()}
    convert = (
        _convert_musubi_wan_lora_to_diffusers
        if style == "kohya / musubi"
        else _convert_non_diffusers_wan_lora_to_diffusers
    )
    path = save_tensors(tmp_path / "a.safetensors", found)
    model, reference = twins
    x, t, text = torch.randn(1, 16, 2, 4, 6), torch.tensor([321.0]), torch.randn(5, 32)
    with torch.inference_mode():
        plain = reference(x, t, F.pad(text, (0, 0, 0, 507))[None]).sample
        converted = convert({key: tensor.clone() for key, tensor in found.items()})
        add_to_reference(reference, converted)
        expected = reference(x, t, F.pad(text, (0, 0, 0, 507))[None]).sample
        lora = load_lora(path, SHAPES)
        Patches(dict(model.named_parameters()), lambda _: []).apply_step(Loras([use(lora)], [lora]), 0)
        velocity = model(x, t, [((model.project(text), 1.0),)] * DEPTH)
    assert torch.linalg.vector_norm(expected - plain) > 0.05 * torch.linalg.vector_norm(plain)
    assert torch.linalg.vector_norm(velocity - expected) < 1e-5 * torch.linalg.vector_norm(expected)
    assert lora.coverage.unused == 0


def test_fused_projections_give_the_velocity_of_diffusers_fused_model(
    twins: tuple[WanModel, WanTransformer3DModel], tmp_path: Path
) -> None:
    model, reference = twins
    for block in reference.blocks:
        block.attn1.fuse_projections()
        block.attn2.fuse_projections()
    found: Tensors = {}
    for block in range(DEPTH):
        for name, count in (("attn1.to_qkv", 3), ("attn2.to_kv", 2)):
            module = f"blocks.{block}.{name}"
            down, up, bias = torch.randn(RANK, DIM), torch.randn(count * DIM, RANK), torch.randn(count * DIM)
            parts = {"lora_A.weight": 0.1 * down, "lora_B.weight": 0.1 * up, "lora_B.bias": 0.1 * bias}
            found |= {f"transformer.{module}.{end}": tensor for end, tensor in parts.items()}
    lora = load_lora(save_tensors(tmp_path / "a.safetensors", found), SHAPES)
    x, t, text = torch.randn(1, 16, 2, 4, 6), torch.tensor([321.0]), torch.randn(5, 32)
    with torch.inference_mode():
        plain = reference(x, t, F.pad(text, (0, 0, 0, 507))[None]).sample
        add_to_reference(reference, found)
        expected = reference(x, t, F.pad(text, (0, 0, 0, 507))[None]).sample
        Patches(dict(model.named_parameters()), lambda _: []).apply_step(Loras([use(lora)], [lora]), 0)
        velocity = model(x, t, [((model.project(text), 1.0),)] * DEPTH)
    assert relative_error(expected, plain) > 0.05
    assert relative_error(velocity, expected) < 1e-5
    assert (lora.coverage.targets, lora.coverage.unused) == (2 * 5 * DEPTH, 0)


@pytest.mark.parametrize("kind", ["low-rank", "full", "loha"])
def test_the_rows_of_a_fused_matrix_are_those_of_its_projections(kind: str, tmp_path: Path) -> None:
    name, scale = "lora_unet_blocks_1_attn1_to_qkv", 1.0
    a1, b1, a2, b2 = (torch.randn(s) for s in ((3 * DIM, 2), (2, DIM), (3 * DIM, 2), (2, DIM)))
    if kind == "low-rank":
        found = {"lora_up.weight": a1, "lora_down.weight": b1, "alpha": torch.tensor(3.0)}
        change, scale = exact(a1) @ exact(b1), 3.0 / 2
    elif kind == "loha":
        found = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
        change = (exact(a1) @ exact(b1)) * (exact(a2) @ exact(b2))
    else:
        found = {"diff": a1 @ b1}
        change = exact(a1 @ b1)
    before = weights()
    path = save_tensors(tmp_path / "a.safetensors", {f"{name}.{end}": t for end, t in found.items()})
    after = merged(path, before)
    names = [f"blocks.1.self_attn.{projection}.weight" for projection in "qkv"]
    assert changed(after, before) == {*names}
    for parameter, rows in zip(names, np.split(change, 3)):
        assert_close(after[parameter], exact(before[parameter]) + scale * rows)


def test_a_fused_matrix_that_cannot_be_split_is_refused(tmp_path: Path) -> None:
    def problem(found: Tensors) -> str:
        with pytest.raises(CheckpointError) as caught:
            load_lora(save_tensors(tmp_path / "a.safetensors", found), SHAPES)
        return str(caught.value)

    qkv, q = "transformer.blocks.0.attn1.to_qkv", "transformer.blocks.0.attn1.to_q"
    assert "and has 145 rows" in problem(pair(qkv, 3 * DIM + 1, DIM))
    assert "which is [48, 48] in this model" in problem(pair(qkv, 3 * FFN, DIM))
    kron = {f"{qkv}.lokr_w1": torch.randn(36, 4), f"{qkv}.lokr_w2": torch.randn(4, 12)}
    assert "is a Kronecker product" in problem(kron)
    twice = problem(pair(qkv, 3 * DIM, DIM) | pair(q, DIM, DIM))
    assert "both change blocks.0.self_attn.q.weight" in twice
    quantized = pair(qkv, 3 * DIM, DIM) | {f"{qkv}.weight_scale": torch.ones(1)}
    assert "says what the matrices beside it mean" in problem(quantized)


def test_plain_differences_reach_weights_biases_norms_and_modulations(tmp_path: Path) -> None:
    targets = {
        "blocks.1.self_attn.norm_q.diff": "blocks.1.self_attn.norm_q.weight",
        "blocks.1.cross_attn.norm_k.diff": "blocks.1.cross_attn.norm_k.weight",
        "blocks.1.norm3.diff": "blocks.1.norm3.weight",
        "blocks.1.norm3.diff_b": "blocks.1.norm3.bias",
        "blocks.1.ffn.0.diff_b": "blocks.1.ffn.0.bias",
        "blocks.1.diff_m": "blocks.1.modulation",
        "blocks.2.modulation.diff": "blocks.2.modulation",
        "head.diff_m": "head.modulation",
        "head.head.diff": "head.head.weight",
        "patch_embedding.diff": "patch_embedding.weight",
        "patch_embedding.diff_b": "patch_embedding.bias",
        "text_embedding.0.diff": "text_embedding.0.weight",
    }
    before = weights()
    found = {f"diffusion_model.{key}": torch.randn(SHAPES[name]) for key, name in targets.items()}
    after = merged(save_tensors(tmp_path / "a.safetensors", found), before, -0.5)
    assert changed(after, before) == set(targets.values())
    for key, name in targets.items():
        assert_close(after[name], exact(before[name]) - 0.5 * exact(found[f"diffusion_model.{key}"]))


def test_lycoris_norms_and_diffusers_names_of_layers_outside_the_blocks(tmp_path: Path) -> None:
    targets = {
        "lycoris_blocks_0_norm2.w_norm": "blocks.0.norm3.weight",
        "lycoris_blocks_0_norm2.b_norm": "blocks.0.norm3.bias",
        "transformer.scale_shift_table.diff": "head.modulation",
        "transformer.proj_out.diff_b": "head.head.bias",
        "transformer.condition_embedder.time_proj.diff": "time_projection.1.weight",
    }
    before = weights()
    found = {key: torch.randn(SHAPES[name]) for key, name in targets.items()}
    after = merged(save_tensors(tmp_path / "a.safetensors", found), before)
    assert changed(after, before) == set(targets.values())
    for key, name in targets.items():
        assert_close(after[name], exact(before[name]) + exact(found[key]))


def test_a_convolution_is_changed_as_the_matrix_it_is(tmp_path: Path) -> None:
    down, up = torch.randn(RANK, 16, 1, 2, 2), torch.randn(DIM, RANK, 1, 1, 1)
    keys = (
        "diffusion_model.patch_embedding.lora_down.weight",
        "diffusion_model.patch_embedding.lora_up.weight",
    )
    before = weights()
    after = merged(save_tensors(tmp_path / "a.safetensors", dict(zip(keys, (down, up)))), before)
    expected = exact(before["patch_embedding.weight"]) + np.einsum(
        "or,rcxyz->ocxyz", exact(up)[:, :, 0, 0, 0], exact(down)
    )
    assert_close(after["patch_embedding.weight"], expected)


# ---- LoHa, LoKr ----


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_loha_is_the_product_of_two_products_element_by_element(alpha: float | None, tmp_path: Path) -> None:
    a1, b1, a2, b2 = torch.randn(FFN, 3), torch.randn(3, DIM), torch.randn(FFN, 3), torch.randn(3, DIM)
    name = "lycoris_blocks_1_ffn_net_0_proj"
    found = dict(zip((f"{name}.hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b")), (a1, b1, a2, b2)))
    if alpha:
        found[f"{name}.alpha"] = torch.tensor(alpha)
    before = weights()
    after = merged(save_tensors(tmp_path / "a.safetensors", found), before, 0.5)
    change = np.einsum("or,ri,os,si->oi", exact(a1), exact(b1), exact(a2), exact(b2))
    scale = 0.5 * (alpha / 3 if alpha else 1)
    assert changed(after, before) == {"blocks.1.ffn.0.weight"}
    assert_close(after["blocks.1.ffn.0.weight"], exact(before["blocks.1.ffn.0.weight"]) + scale * change)


@pytest.mark.parametrize(
    ("parts", "scale"),
    [
        ({"w1": (8, 4), "w2": (12, 12)}, 1.0),  # both whole: LyCORIS sets alpha to the rank
        ({"w1": (8, 4), "w2_a": (12, 3), "w2_b": (3, 12)}, 6 / 3),
        ({"w1_a": (8, 2), "w1_b": (2, 4), "w2": (12, 12)}, 6 / 2),
        ({"w1_a": (8, 2), "w1_b": (2, 4), "w2_a": (12, 3), "w2_b": (3, 12)}, 6 / 3),
    ],
)
def test_lokr_is_a_kronecker_product(parts: dict[str, tuple[int, int]], scale: float, tmp_path: Path) -> None:
    name = "lora_unet_blocks_1_ffn_0"
    found = {f"{name}.lokr_{part}": torch.randn(shape) for part, shape in parts.items()}
    one, two = (
        exact(found[f"{name}.lokr_{w}"])
        if w in parts
        else exact(found[f"{name}.lokr_{w}_a"]) @ exact(found[f"{name}.lokr_{w}_b"])
        for w in ("w1", "w2")
    )
    kron = np.einsum("ab,cd->acbd", one, two).reshape(FFN, DIM)
    before = weights()
    path = save_tensors(tmp_path / "a.safetensors", found | {f"{name}.alpha": torch.tensor(6.0)})
    after = merged(path, before)
    assert_close(after["blocks.1.ffn.0.weight"], exact(before["blocks.1.ffn.0.weight"]) + scale * kron)
    assert load_lora(path, SHAPES).coverage.unused == 0


# ---- scales ----


def peft_file(
    folder: Path, prefix: str = "base_model.model.", metadata: dict[str, str] | None = None
) -> Path:
    found: Tensors = {}
    for ours in ("blocks.0.ffn.0", "blocks.1.ffn.0"):
        down, up = factors(ours)
        found |= {f"{prefix}{ours}.lora_A.weight": down, f"{prefix}{ours}.lora_B.weight": up}
    return save_tensors(folder / "adapter_model.safetensors", found, metadata)


CONFIGS: list[tuple[dict[str, Any], list[float]]] = [
    ({"r": 4, "lora_alpha": 8}, [2.0, 2.0]),
    ({"r": 4, "lora_alpha": 8, "use_rslora": True}, [4.0, 4.0]),
    ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"blocks.1.ffn.0": 2}}, [2.0, 0.5]),
    ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"1.ffn.0": 2}, "use_rslora": True}, [4.0, 1.0]),
]


@pytest.mark.parametrize(("config", "scales"), CONFIGS)
def test_peft_says_the_scale_beside_the_file_and_diffusers_in_it(
    config: dict[str, Any], scales: list[float], tmp_path: Path
) -> None:
    path = peft_file(tmp_path)
    assert load_lora(path, SHAPES).scales == (1.0,)
    assert not read_lora_file(path).scaled
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    lora = load_lora(path, SHAPES)
    assert [lora.deltas[f"blocks.{n}.ffn.0.weight"].scale for n in (0, 1)] == scales
    assert read_lora_file(path).config == tmp_path / "adapter_config.json"
    inside = {f"transformer.{key}": value for key, value in config.items()}
    (tmp_path / "in").mkdir()
    path = peft_file(tmp_path / "in", "transformer.", {"lora_adapter_metadata": json.dumps(inside)})
    lora = load_lora(path, SHAPES)
    assert [lora.deltas[f"blocks.{n}.ffn.0.weight"].scale for n in (0, 1)] == scales
    assert read_lora_file(path).config is None


def test_the_config_of_peft_is_not_asked_about_other_files(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    assert load_lora(peft_file(tmp_path, "diffusion_model."), SHAPES).scales == (1.0,)


def test_the_bias_of_peft_is_scaled_as_its_matrices_are(tmp_path: Path) -> None:
    ours, key = "blocks.0.ffn.0", "transformer.blocks.0.ffn.net.0.proj"
    down, up = factors(ours)
    bias = torch.randn(FFN)
    found = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up, f"{key}.lora_B.bias": bias}
    before = weights()
    for extra, scale in (({}, 1.0), ({f"{key}.alpha": torch.tensor(ALPHA)}, ALPHA / RANK)):
        after = merged(save_tensors(tmp_path / "a.safetensors", found | extra), before)
        assert_close(after[f"{ours}.bias"], exact(before[f"{ours}.bias"]) + scale * exact(bias))


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        '{"r": 4, "lora_alpha": "x"}',
        '{"r": 0, "lora_alpha": 4}',
        "{",
        '{"lora_alpha": NaN, "r": 1}',
    ],
)
def test_a_config_without_a_usable_alpha_is_an_error(text: str, tmp_path: Path) -> None:
    path = peft_file(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"adapter_config.json: says no usable lora_alpha and r"):
        read_lora_file(path)


# ---- arithmetic ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_two_loras_are_added_in_fp32_and_rounded_once(
    dtype: torch.dtype, stored: torch.dtype, tmp_path: Path
) -> None:
    name = "blocks.0.ffn.0"
    start = torch.randn(FFN, DIM).to(dtype)
    total = exact(start.float())
    terms = []
    for strength in (0.3, -0.11):
        down, up = (tensor.to(stored) for tensor in factors(name))
        keys = (f"{name}.lora_A.weight", f"{name}.lora_B.weight")
        lora = load_lora(
            save_tensors(tmp_path / f"{strength}.safetensors", dict(zip(keys, (down, up)))), SHAPES
        )
        terms.append((lora.deltas[f"{name}.weight"], strength))
        total += strength * (exact(up.float()) @ exact(down.float()))
    weight = start.clone()
    add_deltas(weight, terms)
    assert weight.dtype == dtype
    expected = torch.from_numpy(total).float().to(dtype).float()
    # fp32 rounds otherwise than fp64 now and then: by one step of the dtype at most, and rarely.
    step = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float8_e4m3fn: 2**-3}
    assert torch.allclose(weight.float(), expected, rtol=step[dtype], atol=1e-5)
    assert (weight.float() != expected).float().mean() < 0.01 or dtype == torch.float32


def test_a_dense_difference_equals_the_added_one(tmp_path: Path) -> None:
    found: Tensors = {
        "blocks.0.ffn.0.lora_A.weight": torch.randn(2, DIM),
        "blocks.0.ffn.0.lora_B.weight": torch.randn(FFN, 2),
        "blocks.0.ffn.0.diff_b": torch.randn(FFN),
        "blocks.1.ffn.0.lokr_w1": torch.randn(2, 2),
        "blocks.1.ffn.0.lokr_w2": torch.randn(FFN // 2, DIM // 2),
        "patch_embedding.hada_w1_a": torch.randn(DIM, 2),
        "patch_embedding.hada_w1_b": torch.randn(2, 64),
        "patch_embedding.hada_w2_a": torch.randn(DIM, 3),
        "patch_embedding.hada_w2_b": torch.randn(3, 64),
        "blocks.2.diff_m": torch.randn(1, 6, DIM),
    }
    lora = load_lora(save_tensors(tmp_path / "a.safetensors", found), SHAPES)
    assert len(lora.deltas) == 5
    for name, delta in lora.deltas.items():
        weight = torch.zeros(SHAPES[name])
        add_deltas(weight, [(delta, -2.0)])
        assert torch.allclose(delta.dense(), weight / -2, rtol=1e-5, atol=1e-5)
        assert delta.dense(torch.bfloat16).dtype == torch.bfloat16


def test_a_difference_is_not_added_to_another_shape(tmp_path: Path) -> None:
    lora = load_lora(save_tensors(tmp_path / "a.safetensors", pair("blocks.0.self_attn.q", DIM, DIM)), SHAPES)
    weight = torch.zeros(DIM * DIM)
    with pytest.raises(ValueError, match=r"a difference of \[48, 48\] to a weight of \[2304\]"):
        add_deltas(weight, [(lora.deltas["blocks.0.self_attn.q.weight"], 1.0)])
    assert not weight.any()


# ---- when and where ----


def test_strengths_follow_steps_blocks_and_experts(tmp_path: Path) -> None:
    lora = load_lora(save_tensors(tmp_path / "a.safetensors", pair("blocks.0.self_attn.q", DIM, DIM)), SHAPES)
    uses = [
        use(lora, 0.5),
        use(lora, 0.6, blocks=(0, 2)),
        use(lora, 0.7, steps=(1, 2)),
        use(lora, 0.8, expert="high"),
    ]
    strengths = [
        tuple(use.strength_at(step, block, expert) for use in uses)
        for step, block, expert in ((0, 0, "only"), (1, 1, "high"), (3, None, "low"))
    ]
    assert strengths == [(0.5, 0.6, 0, 0), (0.5, 0, 0.7, 0.8), (0.5, 0, 0, 0)]


def test_a_parameter_gets_what_its_block_and_step_get(tmp_path: Path) -> None:
    found = {
        **pair("blocks.0.ffn.0", FFN, DIM),
        **pair("blocks.1.ffn.0", FFN, DIM),
        "head.head.diff_b": torch.ones(64),
    }
    lora = load_lora(save_tensors(tmp_path / "a.safetensors", found), SHAPES)
    loras = Loras([use(lora, 0.5, blocks=(1,)), use(lora, 0.25, steps=(2,))], [lora, lora])
    at = {
        (name, step): [strength for _, strength in loras.terms_for(name, step)]
        for name in (
            "blocks.0.ffn.0.weight",
            "blocks.1.ffn.0.weight",
            "blocks.2.ffn.0.weight",
            "head.head.bias",
        )
        for step in (1, 2)
    }
    assert list(at.values()) == [[], [0.25], [0.5], [0.5, 0.25], [], [], [], [0.25]]
    assert loras.terms_for("blocks.1.ffn.0.weight", 1)[0][0] is lora.deltas["blocks.1.ffn.0.weight"]


# ---- into a model and out again ----


@pytest.fixture
def shelf(tmp_path: Path) -> tuple[Tensors, Path, Lora, Lora]:
    """A checkpoint file's weights, the file, and two LoRAs that share a target."""
    base = weights()
    file = save_tensors(tmp_path / "model.safetensors", base)
    first = save_tensors(
        tmp_path / "1.safetensors",
        {**pair("blocks.0.ffn.0", FFN, DIM), **pair("blocks.2.self_attn.q", DIM, DIM)},
    )
    second = save_tensors(
        tmp_path / "2.safetensors",
        {**pair("blocks.0.ffn.0", FFN, DIM), "head.diff_m": torch.ones(1, 2, DIM)},
    )
    return base, file, load_lora(first, SHAPES), load_lora(second, SHAPES)


def patched(base: Tensors, *terms: tuple[Lora, float]) -> Tensors:
    """The weights by a formula of its own: from the file, one dense sum per parameter."""
    return {
        name: tensor
        + sum((s * lora.deltas[name].dense() for lora, s in terms if name in lora.deltas), torch.zeros(()))
        for name, tensor in base.items()
    }


def assert_same(found: Tensors, expected: Tensors, exactly: bool = False) -> None:
    for name, tensor in found.items():
        assert (
            torch.equal(tensor, expected[name])
            if exactly
            else torch.allclose(tensor, expected[name], atol=1e-5)
        ), name


def test_weights_follow_the_set_of_loras_and_come_back_exactly(
    shelf: tuple[Tensors, Path, Lora, Lora],
) -> None:
    base, file, one, two = shelf
    state = load_file(file)
    patches = Patches(state, lambda names: ((n, t) for n, t in load_file(file).items() if n in names))
    assert not patches.apply_step(Loras(), 0)
    assert patches.apply_step(Loras([use(one)], [one]), 0)
    assert_same(state, patched(base, (one, 1.0)))
    assert not patches.apply_step(Loras([use(one)], [one]), 1)
    assert patches.apply_step(Loras([use(two, 0.5), use(one, -1.0)], [two, one]), 0)
    assert_same(state, patched(base, (two, 0.5), (one, -1.0)))
    assert patches.apply_step(Loras([use(two)], [two]), 0)
    assert_same(state, patched(base, (two, 1.0)))
    assert patches.apply_step(Loras([use(two, 0.0)], [two]), 0)
    assert_same(state, base, exactly=True)


def test_weights_follow_the_steps(shelf: tuple[Tensors, Path, Lora, Lora]) -> None:
    base, file, one, two = shelf
    state = load_file(file)
    read: list[set[str]] = []

    def again(names: Any) -> Iterator[tuple[str, Tensor]]:
        read.append(set(names))
        yield from ((n, t) for n, t in load_file(file).items() if n in names)

    patches = Patches(state, again)
    loras = Loras([use(one, steps=(0, 1)), use(two, blocks=(0,), steps=(1,))], [one, two])
    moved = [patches.apply_step(loras, step) for step in range(4)]
    assert moved == [True, True, True, False]
    assert read == [{"blocks.0.ffn.0.weight"}, {"blocks.0.ffn.0.weight", "blocks.2.self_attn.q.weight"}]
    assert_same(state, base, exactly=True)
    patches.apply_step(loras, 1)
    expected = patched(base, (one, 1.0), (two, 1.0))
    assert_same(state, expected | {"head.modulation": base["head.modulation"]})


def test_weights_left_half_way_are_read_again(
    shelf: tuple[Tensors, Path, Lora, Lora], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, file, one, two = shelf
    state = load_file(file)
    patches = Patches(state, lambda names: ((n, t) for n, t in load_file(file).items() if n in names))

    def break_off(self: object, weight: Tensor, strength: float) -> None:
        weight.fill_(7.0)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("wancli.weights.lora.patch.LowRank._add_fp32", break_off)
        with pytest.raises(MemoryError):
            patches.apply_step(Loras([use(one)], [one]), 0)
    assert patches.apply_step(Loras(), 0)
    assert_same(state, base, exactly=True)
    patches.apply_step(Loras([use(two)], [two]), 0)
    assert_same(state, patched(base, (two, 1.0)))


def test_a_checkpoint_that_lost_a_tensor_meanwhile_is_an_error(
    shelf: tuple[Tensors, Path, Lora, Lora],
) -> None:
    _, file, one, _ = shelf
    patches = Patches(load_file(file), lambda names: iter(()))
    patches.apply_step(Loras([use(one)], [one]), 0)
    with pytest.raises(
        CheckpointError, match=r"blocks.0.ffn.0.weight was in the checkpoint and is now missing"
    ):
        patches.apply_step(Loras(), 0)


def test_some_tensors_of_a_checkpoint_can_be_read_again(tiny: Path) -> None:
    wanted = {"blocks.7.ffn.0.weight", "head.modulation", "unknown"}
    found = dict(iterate_transformer_tensors(identify(tiny), wanted))
    whole = load_file(tiny / "diffusion_pytorch_model.safetensors")
    assert found.keys() == wanted - {"unknown"}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in found.items())
