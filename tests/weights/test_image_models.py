"""Checkpoints that make videos from pictures: every dialect loads the bits of the official one."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from gguf import GGMLQuantizationType
from image_cases import CLIP, FIXTURES, all_cases, assemble, numbers
from jobs import run_wancli, tiny_job, write_job
from oracles import relative_error
from safetensors.torch import load_file
from torch import Tensor
from weight_files import save_tensors, write_gguf

from wancli.errors import CheckpointError
from wancli.models import variants
from wancli.models.clip import CLIPVision
from wancli.models.config import CLIPConfig, WanConfig
from wancli.models.dit import WanModel
from wancli.models.parameter_count import clip_parameters, wan_parameters
from wancli.weights.checkpoint import clip_config, identify, with_variant
from wancli.weights.formats.infer_config import transformer_shapes
from wancli.weights.formats.key_mapping import transformer_from_diffusers
from wancli.weights.loader import load_clip, load_transformer, load_vae
from wancli.weights.lora.patch import load_lora
from wancli.weights.single_files import SingleFiles, find_siblings, recognize_file
from wancli.weights.variant_choice import choose_by_name, variants_with_pictures

DIT = "diffusion_pytorch_model.safetensors"
I2V = FIXTURES / "wan21-i2v-tiny"
FLF2V = FIXTURES / "wan21-flf2v-tiny"
A14B = FIXTURES / "wan22-i2v-tiny"
PICTURE = FIXTURES / "pictures" / "input.png"
SIZES = {"hidden_size": 160, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 320}


def same(model: torch.nn.Module, expected: Mapping[str, Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)


# ---- official folders ----


@pytest.mark.parametrize(
    ("name", "variant", "clip"),
    [
        ("wan21-i2v-tiny", "Wan2.1-I2V-480P", True),
        ("wan21-flf2v-tiny", "Wan2.1-FLF2V-720P", True),
        ("wan22-i2v-tiny", "Wan2.2-I2V", False),
        ("wan22-ti2v-tiny", "Wan 2.2 TI2V", False),
    ],
)
def test_official_folders_load(name: str, variant: str, clip: bool, tmp_path: Path) -> None:
    found = identify(assemble(name, tmp_path / "model"))
    assert found.variant.name == variant
    assert (found.image_encoder is not None) == clip == (found.transformer_config.image_dim == 160)
    for part in found.experts:
        model = load_transformer(found, expert=part.expert or "only")
        assert same(model, load_file(part.files[0]))
    load_vae(found, "cpu")
    if clip:
        assert clip_config(found) == CLIPConfig(160, 2, 3, 320)


def test_the_image_encoder_gives_the_official_rows(tmp_path: Path) -> None:
    clip = load_clip(identify(assemble("wan21-i2v-tiny", tmp_path / "model")), "cpu")
    reference = numbers("wan21-i2v-tiny")
    assert relative_error(clip(reference["clip.input.input"]), reference["clip.input.features"]) < 1e-5


def test_an_image_encoder_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = assemble("wan21-i2v-tiny", tmp_path / "model")
    (folder / CLIP.name).unlink()
    with pytest.raises(CheckpointError, match="the image encoder is missing: CLIP ViT-H") as caught:
        identify(folder)
    assert CLIP.name in caught.value.hint


def test_one_expert_of_i2v_a14b_needs_the_other(tmp_path: Path) -> None:
    folder = assemble("wan22-i2v-tiny", tmp_path / "model")
    for part in (DIT, "config.json"):
        shutil.copy(A14B / "high_noise_model" / part, folder / part)
    (folder / "high_noise_model").unlink()
    (folder / "low_noise_model").unlink()
    with pytest.raises(CheckpointError, match=r"an expert of Wan2\.2-I2V, which needs the other one"):
        identify(folder)


def test_experts_that_read_clip_are_refused(tmp_path: Path) -> None:
    folder = assemble("wan22-i2v-tiny", tmp_path / "model")
    for name in ("high_noise_model", "low_noise_model"):
        (folder / name).unlink()
        (folder / name).mkdir()
        for part in (DIT, "config.json"):
            shutil.copy(I2V / part, folder / name / part)
    with pytest.raises(CheckpointError, match="not an expert"):
        identify(folder)


# ---- other dialects of the transformer ----


def to_diffusers(tensors: Mapping[str, Tensor], rows: int | None) -> dict[str, Tensor]:
    """Under the names of diffusers' own network."""
    with torch.device("meta"):
        network = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=36,
            out_channels=16,
            text_dim=64,
            freq_dim=64,
            ffn_dim=64,
            num_layers=40,
            image_dim=160,
            added_kv_proj_dim=32,
            pos_embed_seq_len=rows,
        )
    names = {transformer_from_diffusers(name): name for name in network.state_dict()}
    assert names.keys() == tensors.keys()
    return {names[name]: tensor for name, tensor in tensors.items()}


def diffusers_folder(root: Path, source: Path) -> Path:
    tensors = load_file(source / DIT)
    rows = 514 if "img_emb.emb_pos" in tensors else None
    for name in ("transformer", "tokenizer", "text_encoder", "vae", "image_encoder"):
        (root / name).mkdir(parents=True)
    index = {"_class_name": "WanImageToVideoPipeline", "image_encoder": ["transformers", "CLIPVisionModel"]}
    (root / "model_index.json").write_text(json.dumps(index))
    save_tensors(root / "transformer" / DIT, to_diffusers(tensors, rows))
    config = {"num_attention_heads": 2, "in_channels": 36, "image_dim": 160, "pos_embed_seq_len": rows}
    (root / "transformer" / "config.json").write_text(json.dumps(config))
    shared = FIXTURES / "wan21-tiny"
    shutil.copy(shared / "google/umt5-xxl/spiece.model", root / "tokenizer")
    for name, file in (
        ("text_encoder/model", "models_t5_umt5-xxl-enc-bf16"),
        ("vae/" + DIT[:-12], "Wan2.1_VAE"),
    ):
        save_tensors(root / f"{name}.safetensors", torch.load(shared / f"{file}.pth", weights_only=True))
    save_tensors(root / "image_encoder" / "model.safetensors", clip_of_transformers())
    return root


@pytest.mark.parametrize("source", [I2V, FLF2V], ids=["i2v", "flf2v"])
def test_a_diffusers_folder_has_the_official_bits(source: Path, tmp_path: Path) -> None:
    found = identify(diffusers_folder(tmp_path / "model", source))
    assert same(load_transformer(found), load_file(source / DIT))
    assert same(load_clip(found, "cpu"), official_clip())


def single_file(path: Path, source: Path, **files: Path) -> SingleFiles:
    shared = FIXTURES / "wan21-tiny"
    named: dict[str, Path] = {
        "transformer": path,
        "text_encoder": shared / "models_t5_umt5-xxl-enc-bf16.pth",
        "tokenizer": shared / "google/umt5-xxl/spiece.model",
        "vae": shared / "Wan2.1_VAE.pth",
        "image_encoder": CLIP,
    }
    return SingleFiles(**(named | files), heads=2)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""], ids=["comfyui", "kijai"])
@pytest.mark.parametrize("source", [I2V, FLF2V], ids=["i2v", "flf2v"])
def test_single_files_have_the_official_bits(source: Path, prefix: str, tmp_path: Path) -> None:
    tensors = load_file(source / DIT)
    path = save_tensors(tmp_path / "wan2.1_i2v_720p.safetensors", {prefix + k: v for k, v in tensors.items()})
    assert same(load_transformer(identify(single_file(path, source))), tensors)


@pytest.mark.parametrize("source", [I2V, FLF2V], ids=["i2v", "flf2v"])
def test_gguf_has_the_official_bits(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / DIT)

    def fill(writer) -> None:  # type: ignore[no-untyped-def]
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.numpy())

    path = write_gguf(tmp_path / "wan2.1-i2v-14b-480p-F32.gguf", fill)
    assert same(load_transformer(identify(single_file(path, source))), tensors)


def is_matrix(name: str) -> bool:
    return name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name


def test_quantized_matrices_of_the_image_branch_are_unpacked(tmp_path: Path) -> None:
    tensors = load_file(I2V / DIT)
    fp8 = {k: v.to(torch.float8_e4m3fn) if is_matrix(k) else v for k, v in tensors.items()}
    path = save_tensors(tmp_path / "wan_fp8_e4m3fn.safetensors", fp8)
    assert same(load_transformer(identify(single_file(path, I2V))), {k: v.float() for k, v in fp8.items()})

    from gguf.quants import dequantize, quantize

    packed = {k: quantize(v.numpy(), GGMLQuantizationType.Q8_0) for k, v in tensors.items() if is_matrix(k)}

    def fill(writer) -> None:  # type: ignore[no-untyped-def]
        for name, tensor in tensors.items():
            if name in packed:
                writer.add_tensor(name, packed[name], raw_dtype=GGMLQuantizationType.Q8_0)
            else:
                writer.add_tensor(name, tensor.numpy())

    path = write_gguf(tmp_path / "wan-Q8_0.gguf", fill)
    unpacked = {k: torch.from_numpy(dequantize(v, GGMLQuantizationType.Q8_0)) for k, v in packed.items()}
    assert same(load_transformer(identify(single_file(path, I2V))), tensors | unpacked)


# ---- dialects of the image encoder ----


def official_clip() -> dict[str, Tensor]:
    """What the network holds of the official file: not its last block, and no text."""
    saved = torch.load(CLIP, weights_only=True)
    own = {
        name.removeprefix("visual."): tensor.float() for name, tensor in saved.items() if "visual." in name
    }
    return {k: v for k, v in own.items() if not k.startswith(("transformer.2.", "post_norm", "head"))}


def clip_of_transformers(*, whole: bool = False) -> dict[str, Tensor]:
    """The official file under the names of transformers' network, which has q, k and v apart."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(**SIZES, patch_size=14, image_size=224, hidden_act="gelu", projection_dim=32)
    with torch.device("meta"):
        network = CLIPVisionModelWithProjection(config)
    saved = {k.removeprefix("visual."): v for k, v in torch.load(CLIP, weights_only=True).items()}
    words = {
        "vision_model.": "",
        "embeddings.class_embedding": "cls_embedding",
        "embeddings.patch_embedding": "patch_embedding",
        "embeddings.position_embedding.weight": "pos_embedding",
        "pre_layrnorm": "pre_norm",
        "post_layernorm": "post_norm",
        "encoder.layers": "transformer",
        "layer_norm": "norm",
        "self_attn.out_proj": "attn.proj",
        "fc1": "0",
        "fc2": "2",
        "visual_projection.weight": "head",
    }
    found = {}
    for name, shape in ((name, tensor.shape) for name, tensor in network.state_dict().items()):
        official = name
        for old, new in words.items():
            official = official.replace(old, new)
        part = next((p for p in "qkv" if f"self_attn.{p}_proj" in official), None)
        if part:
            merged = saved[official.replace(f"self_attn.{part}_proj", "attn.to_qkv")]
            found[name] = merged.chunk(3)["qkv".index(part)].clone()
        else:
            found[name] = saved[official].T if official == "head" else saved[official].view(shape)
    if whole:  # as older files of transformers, and with the text tower
        found["vision_model.embeddings.position_ids"] = torch.arange(257)[None]
        found["text_model.encoder.layers.0.self_attn.q_proj.weight"] = torch.zeros(8, 8)
        found["logit_scale"] = torch.zeros(())
    return found


@pytest.mark.parametrize(
    "write_file",
    [
        lambda path: save_tensors(path, torch.load(CLIP, weights_only=True)),
        lambda path: save_tensors(
            path,
            {k: v for k, v in torch.load(CLIP, weights_only=True).items() if k.startswith("visual.")},
        ),
        lambda path: save_tensors(
            path,
            {
                k.removeprefix("visual."): v
                for k, v in torch.load(CLIP, weights_only=True).items()
                if k.startswith("visual.")
            },
        ),
        lambda path: save_tensors(path, clip_of_transformers()),
        lambda path: save_tensors(path, clip_of_transformers(whole=True)),
    ],
    ids=["whole", "visual", "bare", "transformers", "transformers-whole"],
)
def test_image_encoders_have_the_official_bits(write_file: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write_file(tmp_path / "clip_vision_h.safetensors")
    (part,) = recognize_file(path)
    assert (part.kind, part.name, part.refusal) == ("image encoder", "CLIP ViT-H", "")
    files = single_file(I2V / DIT, I2V, image_encoder=path)
    assert same(load_clip(identify(files), "cpu"), official_clip())


def test_comfyuis_folders_are_searched_for_the_image_encoder(tmp_path: Path) -> None:
    root, shared = tmp_path / "ComfyUI", FIXTURES / "wan21-tiny"
    for folder in ("diffusion_models", "text_encoders", "vae", "clip_vision"):
        (root / folder).mkdir(parents=True)
    shutil.copy(I2V / DIT, root / "diffusion_models" / "wan2.1_i2v_480p.safetensors")
    shutil.copy(shared / "models_t5_umt5-xxl-enc-bf16.pth", root / "text_encoders")
    shutil.copy(shared / "google/umt5-xxl/spiece.model", root)
    shutil.copy(shared / "Wan2.1_VAE.pth", root / "vae")
    save_tensors(root / "clip_vision" / "clip_vision_h.safetensors", clip_of_transformers())
    found = find_siblings(root / "diffusion_models" / "wan2.1_i2v_480p.safetensors")
    assert found.image_encoder == root / "clip_vision" / "clip_vision_h.safetensors"


def test_another_clip_is_refused(tmp_path: Path) -> None:
    tensors = clip_of_transformers()
    wide = {k: torch.zeros(128, *v.shape[1:]) if "patch" in k else v for k, v in tensors.items()}
    (part,) = recognize_file(save_tensors(tmp_path / "clip_l.safetensors", wide))
    assert "of another kind than ViT-H/14" in part.refusal


# ---- LoRAs ----


@pytest.mark.parametrize("names", ["official", "diffusers"])
def test_loras_change_the_image_branch(names: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    modules = {
        "official": ["blocks.3.cross_attn.k_img", "blocks.3.cross_attn.v_img", "img_emb.proj.1"],
        "diffusers": [
            "blocks.3.attn2.add_k_proj",
            "blocks.3.attn2.add_v_proj",
            "condition_embedder.image_embedder.ff.net.0.proj",
        ],
    }
    base = load_file(I2V / DIT)
    tensors, expected = {}, {}
    for module, official in zip(modules[names], modules["official"]):
        weight = base[f"{official}.weight"]
        down, up = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
        prefix = "diffusion_model." if names == "official" else "transformer."
        tensors |= {f"{prefix}{module}.lora_A.weight": down, f"{prefix}{module}.lora_B.weight": up}
        expected[f"{official}.weight"] = weight + 0.5 * (up @ down)
    path = save_tensors(tmp_path / "lora.safetensors", tensors)
    found = identify(single_file(I2V / DIT, I2V))
    lora = load_lora(path, transformer_shapes(found.transformer_config))
    assert (lora.coverage.targets, lora.coverage.skipped) == (3, 0)
    deltas = {delta_name: delta.dense() for delta_name, delta in lora.deltas.items()}
    for name, weight in expected.items():
        assert relative_error(base[name] + 0.5 * deltas[name], weight) < 1e-6


# ---- variants ----


@pytest.mark.parametrize(
    ("path", "name", "reason"),
    [
        ("Wan2.1-I2V-14B-720P/" + DIT, "Wan2.1-I2V-14B-720P", "the name 'Wan2.1-I2V-14B-720P' says so"),
        ("m/wan2.1_i2v_480p_14B_fp16.safetensors", "Wan2.1-I2V-14B-480P", "says so"),
        ("Wan2_1-I2V-14B-720P_fp8_e4m3fn.safetensors", "Wan2.1-I2V-14B-720P", "says so"),
        ("Wan2.1-Fun-V1.1-14B-InP/" + DIT, "Wan2.1-Fun-14B-InP", "says so"),
        ("Wan2.1-I2V-14B-720P-Diffusers/transformer/" + DIT, "Wan2.1-I2V-14B-720P", "says so"),
        ("model.safetensors", "Wan2.1-I2V-14B-480P", "by default: its tensors may be those of"),
    ],
)
def test_names_tell_variants_whose_tensors_are_alike(path: str, name: str, reason: str) -> None:
    variant, why = choose_by_name(variants.I2V_21, Path("/models") / path)
    assert variant.name == name
    assert reason in why


def test_the_experts_of_fun_inp_are_told_by_their_names() -> None:
    for path, name in (
        ("Wan2.2-Fun-A14B-InP/high_noise_model/" + DIT, "Wan2.2-Fun-A14B-InP"),
        ("wan2.2_fun_inpaint_high_noise_14B_fp8_scaled.safetensors", "Wan2.2-Fun-A14B-InP"),
        ("wan2.2_i2v_high_noise_14B_fp16.safetensors", "Wan2.2-I2V-A14B"),
        ("funny_inputs/wan2.2_i2v_high_noise_14B_fp16.safetensors", "Wan2.2-I2V-A14B"),
        ("refund_input/" + DIT, "Wan2.2-I2V-A14B"),
    ):
        assert choose_by_name(variants.I2V_22, Path("/models") / path)[0].name == name


def test_tensors_tell_the_other_variants() -> None:
    wide = {"dim": 5120, "in_dim": 36, "out_dim": 16}
    assert variants_with_pictures(wide) == variants.I2V_22
    assert variants_with_pictures(wide | {"image_dim": 1280}) == variants.I2V_21
    assert variants_with_pictures(wide | {"image_dim": 1280, "image_rows": 514}) == (variants.FLF2V,)
    assert variants_with_pictures(wide | {"dim": 1536, "image_dim": 1280}) == (variants.FUN_INP_1_3B,)


def test_a_job_may_say_the_variant(tmp_path: Path) -> None:
    found = identify(assemble("wan21-i2v-tiny", tmp_path / "model"))
    assert found.variant_reason.startswith("by default")
    chosen = with_variant(found, "wan2.1-i2v-720p")
    assert (chosen.variant.width, chosen.variant.shift, chosen.variant_reason) == (
        1280,
        5.0,
        "the job says so",
    )
    folder = SingleFiles(transformer=found.root, variant="Wan2.1-I2V-720P")
    assert identify(folder) == replace(chosen, source=folder)


def test_a_wrong_variant_is_an_error_of_the_job_that_lists_the_right_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = assemble("wan21-i2v-tiny", tmp_path / "model")
    job = tiny_job(folder, image=str(PICTURE), matrix={"seed": [1, 2]}, output="{id}.mp4")
    path = write_job(tmp_path, job | {"model": {"transformer": str(folder), "variant": "T2V"}})
    said = run_wancli(capsys, "plan", path)
    assert said.code == 2
    message, hint = said.err.splitlines()
    assert message.endswith(": model.variant: the tensors of model are not those of 'T2V'")
    assert hint.strip() == "Write Wan2.1-I2V-480P or Wan2.1-I2V-720P or Wan2.1-Fun-InP."
    said = run_wancli(capsys, "plan", path, "--set", "model.variant=Wan2.1-I2V-720P")
    assert (said.code, "variant: Wan2.1-I2V-720P, the job says so" in said.out) == (0, True)


def test_inspect_says_what_told_the_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = assemble("wan21-i2v-tiny", tmp_path / "Wan2.1-I2V-14B-720P")
    lines = [" ".join(line.split()) for line in run_wancli(capsys, "inspect", folder).out.splitlines()]
    assert "variant Wan2.1-I2V-720P, the name 'Wan2.1-I2V-14B-720P' says so" in lines
    assert "image encoder: CLIP ViT-H" in lines


def test_the_defaults_of_image_to_video_are_the_official_ones() -> None:
    def row(v: variants.Variant) -> tuple[object, ...]:
        return v.steps, v.shift, v.shift_480p, v.guidance, v.guidance_low, v.boundary, v.frames, v.fps

    assert row(variants.I2V_720P) == (40, 5.0, 3.0, 5.0, None, None, 81, 16)
    assert row(variants.I2V_480P) == (40, 5.0, 3.0, 5.0, None, None, 81, 16)
    assert row(variants.FLF2V) == (50, 16.0, None, 5.0, None, None, 81, 16)
    assert row(variants.I2V_A14B) == (40, 5.0, None, 3.5, 3.5, 0.9, 81, 16)
    plain = variants.NEGATIVE_PROMPT
    assert variants.I2V_480P.negative == "镜头晃动，" + plain
    assert variants.FLF2V.negative == "镜头切换，镜头晃动，" + plain
    assert variants.I2V_A14B.negative == variants.TI2V_5B.negative == plain


# ---- sizes of the released networks ----


@pytest.mark.parametrize(
    ("rows", "image_dim", "parameters"),
    [(None, 1280, 16_394_878_784), (514, 1280, 16_395_536_704), (None, None, 14_288_901_184)],
    ids=["I2V-14B", "FLF2V-14B", "I2V-A14B"],
)
def test_parameters_are_those_of_the_released_models(
    rows: int | None, image_dim: int | None, parameters: int
) -> None:
    config = WanConfig(5120, 13824, 40, 40, 36, 16, image_dim=image_dim, image_rows=rows)
    assert wan_parameters(config) == parameters
    assert sum(map(math.prod, transformer_shapes(config).values())) == parameters
    with torch.device("meta"):
        network = WanModel(config)
    assert {k: tuple(v.shape) for k, v in network.state_dict().items()} == transformer_shapes(config)


def test_the_parameters_of_clip_are_counted() -> None:
    with torch.device("meta"):
        network = CLIPVision(CLIPConfig())
    assert clip_parameters(CLIPConfig()) == sum(p.numel() for p in network.parameters())


def test_every_set_has_cases() -> None:
    assert len(all_cases()) == 22
