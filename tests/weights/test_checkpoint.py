"""What a folder of weights is taken for, and how it is refused."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import weight_files
from jobs import SPIECE
from safetensors.torch import load_file, save_file
from weight_files import Entries, cast, dit, dit_diffusers, pth, scalar, stored, umt5, umt5_official, write

from wancli.errors import CheckpointError
from wancli.models.config import T5Config, VAE22Config, VAEConfig, WanConfig
from wancli.models.vae import WanVAE
from wancli.models.variants import T2V_14B, T2V_A14B, TI2V_5B
from wancli.text.tokenizer import Tokenizer
from wancli.weights.checkpoint import identify, text_encoder_config, vae_config
from wancli.weights.formats.safetensors_header import read_tensors
from wancli.weights.single_files import SingleFiles

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return shutil.copytree(tiny, tmp_path / "model")


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard(folder: Path) -> list[Path]:
    """Splits the transformer as the official 14B folder is."""
    tensors = load_file(folder / WEIGHTS)
    weight_map = {}
    for i, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        file = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sorted(folder.glob("*-of-00002.safetensors"))


def raw(path: Path, document: object, data: bytes = b"") -> Path:
    """A safetensors file with any header."""
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_an_official_folder_is_known_by_its_files_and_sizes(tiny: Path):
    found = identify(tiny)
    assert found.transformer_config == WanConfig(48, 96, 2, 40, text_dim=64, freq_dim=64)
    assert (found.experts[0].naming, found.text_encoder.naming, found.vae.naming) == ("official",) * 3
    assert found.transformer_files == (tiny / WEIGHTS,)
    assert found.vae_files == (tiny / "Wan2.1_VAE.pth",)
    assert found.text_encoder_files == (tiny / "models_t5_umt5-xxl-enc-bf16.pth",)
    assert found.tokenizer == tiny / "google/umt5-xxl/spiece.model"


def test_shards_are_found_through_their_index(folder: Path):
    shards = shard(folder)
    found = identify(folder)
    assert found.transformer_files == tuple(shards)
    assert found.transformer_config.num_layers == 40


def test_a_missing_shard_is_named(folder: Path):
    shard(folder)[1].unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002.*: no such file") as caught:
        identify(folder)
    assert "again" in caught.value.hint


def test_a_truncated_shard_is_named(folder: Path):
    path = shard(folder)[0]
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"00001-of-00002.*truncated or damaged"):
        identify(folder)


def test_a_tensor_that_its_shard_lacks_is_named(folder: Path):
    edit(shard(folder)[0], lambda tensors: tensors.pop("blocks.0.cross_attn.k.bias"))
    with pytest.raises(CheckpointError, match=r"blocks.0.cross_attn.k.bias is not in .*00001-of-00002"):
        identify(folder)


def test_an_index_that_leaves_its_folder_is_refused(folder: Path):
    shard(folder)
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"head.modulation": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="no index of shards in this folder"):
        identify(folder)


@pytest.mark.parametrize(
    "part",
    [WEIGHTS, "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/spiece.model"],
)
def test_a_missing_part_is_named(folder: Path, part: str):
    (folder / part).unlink()
    with pytest.raises(CheckpointError, match=f"{part}.* is missing"):
        identify(folder)


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        identify(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("key", "value"), [("dim", 64), ("num_layers", 30), ("ffn_dim", 97), ("freq_dim", 256)]
)
def test_a_config_that_disagrees_with_the_tensors_is_refused_naming_both(folder: Path, key: str, value: int):
    edit_json(folder / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match=f"config.json says {key} = {value}, the tensors say"):
        identify(folder)


@pytest.mark.parametrize(
    ("heads", "message"), [(7, "does not split into 7 heads"), ("two", "num_heads is 'two'")]
)
def test_a_head_count_that_cannot_be_is_refused(folder: Path, heads: object, message: str):
    edit_json(folder / "config.json", num_heads=heads)
    with pytest.raises(CheckpointError, match=message):
        identify(folder)


def test_without_config_json_an_odd_width_asks_for_the_heads(folder: Path):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="48 is not a multiple of 128") as caught:
        identify(folder)
    assert "num_heads" in caught.value.hint


def test_a_damaged_config_is_named(folder: Path):
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: not valid JSON"):
        identify(folder)


@pytest.mark.parametrize(
    ("name", "shape", "what"),
    [
        ("vace_patch_embedding.weight", (1,), "VACE"),
        ("control_adapter.conv.weight", (1,), "Fun-Camera"),
        ("patch_embedding.weight", (48, 20, 1, 2, 2), "Wan variant with 20 input channels"),
    ],
)
def test_other_models_are_refused_by_name(folder: Path, name: str, shape: tuple[int, ...], what: str):
    edit(folder / WEIGHTS, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    with pytest.raises(CheckpointError, match=f"{what}.*text-to-video"):
        identify(folder)


def test_a_folder_of_experts_without_them_says_what_is_missing(folder: Path):
    (folder / "high_noise_model").mkdir()
    with pytest.raises(CheckpointError, match=r"high_noise_model/.*A14B.* and low_noise_model/.*is missing"):
        identify(folder)


def test_weights_that_are_no_transformer_are_refused(folder: Path):
    save_file({"conv.weight": torch.zeros(2)}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"no Wan transformer: 'patch_embedding.weight' is missing"):
        identify(folder)


def test_one_matrix_in_fp8_makes_a_scheme_and_int8_is_refused(folder: Path):
    def stored_as(dtype: torch.dtype) -> None:
        edit(
            folder / WEIGHTS,
            lambda t: t.update({name: t[name].to(dtype) for name in ["blocks.3.ffn.0.weight"]}),
        )

    stored_as(torch.float8_e4m3fn)
    scheme = identify(folder).experts[0].scheme
    assert (scheme.name, scheme.dtypes, scheme.layers) == ("fp8", ("F8_E4M3",), 1)
    stored_as(torch.int8)
    with pytest.raises(CheckpointError, match="quantized as int8") as caught:
        identify(folder)
    assert "fp8" in caught.value.hint


def one(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("document", "data"),
    [
        (b"{", b""),
        (b"\xff\xff", b""),
        (b"[]", b""),
        (b"[" * 100_000, b""),
        ({"a": one("F32", [2], 0, 8)}, b"1234"),
        ({"a": one("F32", [2], 0, 8)}, b"123456789"),
        ({"a": one("F32", [2], 0, 4)}, b"1234"),
        ({"a": one("F32", [1], 4, 8)}, b"12345678"),
        ({"a": one("F32", [1], 0, 4), "b": one("F32", [1], 2, 6)}, b"123456"),
        ({"a": one("F32", [1], 0, 4), "b": one("F32", [1], 6, 10)}, b"1234567890"),
        ({"a": one("F32", [-1], 0, 4)}, b"1234"),
        ({"a": one("F32", [10**18], 0, 4)}, b"1234"),
        ({"a": one("F32", [True], 0, 4)}, b"1234"),
        ({"a": one("X9", [1], 0, 4)}, b"1234"),
        ({"a": {"dtype": "F32", "shape": [1]}}, b"1234"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
         b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"),
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused(tmp_path: Path, document: object, data: bytes):
    path = raw(tmp_path / "lying.safetensors", document, data)
    with pytest.raises(CheckpointError, match=r"lying.safetensors: truncated or damaged") as caught:
        read_tensors(path)
    assert "again" in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"\x01", b"\xff" * 8, struct.pack("<Q", 10**9) + b"{}"])
def test_a_header_length_that_lies_is_refused_without_reading_it(tmp_path: Path, content: bytes):
    path = tmp_path / "lying.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or damaged: its header claims"):
        read_tensors(path)


def test_headers_agree_with_safetensors(tiny: Path):
    found = read_tensors(tiny / WEIGHTS)
    tensors = load_file(tiny / WEIGHTS)
    assert {name: info.shape for name, info in found.items()} == {
        k: tuple(v.shape) for k, v in tensors.items()
    }
    assert {info.dtype for info in found.values()} == {"F32"}


def test_a_folder_is_identified_without_torch(tiny: Path):
    code = (
        "import sys; from pathlib import Path; from wancli.weights import checkpoint; "
        f"checkpoint.identify(Path({str(tiny)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- the folders and files of real checkpoints ----

T5_FILE, VAE21, VAE22 = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "Wan2.2_VAE.pth"


def vae21() -> Entries:
    with torch.device("meta"):
        return stored({k: tuple(v.shape) for k, v in WanVAE(VAEConfig()).state_dict().items()}, "F32")


def official(root: Path, vae: str = VAE21) -> Path:
    """The parts of an official folder that are not the transformer."""
    pth(root / T5_FILE, stored(umt5_official(), "BF16"))
    pth(root / vae, vae21() if vae == VAE21 else stored(weight_files.vae22(), "F32"))
    (root / "google/umt5-xxl").mkdir(parents=True)
    shutil.copy(SPIECE, root / "google/umt5-xxl")
    return root


def config_json(folder: Path, size: str) -> None:
    config = weight_files.SIZES[size]
    keys = ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "eps", "text_len")
    said = {"_class_name": "WanModel", "model_type": "t2v"} | {key: getattr(config, key) for key in keys}
    (folder / "config.json").write_text(json.dumps(said))


def a14b(root: Path) -> Path:
    """Wan2.2-T2V-A14B as its authors publish it: 57 GB each, in shards."""
    official(root)
    (root / "configuration.json").write_text("{}")
    for expert in ("high_noise_model", "low_noise_model"):
        (root / expert).mkdir()
        weight_files.shards(root / expert, "diffusion_pytorch_model", stored(dit("14B"), "F32"), 6)
        config_json(root / expert, "14B")
    return root


def test_the_official_14b_folder_is_one_model_in_shards(tmp_path: Path) -> None:
    root = official(tmp_path)
    weight_files.shards(root, "diffusion_pytorch_model", stored(dit("14B"), "F32"), 6)
    config_json(root, "14B")
    found = identify(root)
    assert (found.variant, found.transformer_config) == (T2V_14B, weight_files.SIZES["14B"])
    assert len(found.transformer_files) == 6
    assert text_encoder_config(found) == T5Config(256384, 4096, 64, 10240, 24, 64)
    assert vae_config(found) == VAEConfig()


def test_the_official_a14b_folder_has_two_experts(tmp_path: Path) -> None:
    found = identify(a14b(tmp_path / "Wan2.2-T2V-A14B"))
    assert found.variant == T2V_A14B
    assert [part.expert for part in found.experts] == ["high", "low"]
    assert [part.files[0].parent.name for part in found.experts] == ["high_noise_model", "low_noise_model"]
    assert [len(part.files) for part in found.experts] == [6, 6]
    assert {path.parent.name for path in found.transformer_files} == {"low_noise_model"}
    assert {path.parent.name for path in found.high_noise_files} == {"high_noise_model"}
    assert found.transformer_config == weight_files.SIZES["14B"]


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    root = a14b(tmp_path / "model")
    shutil.rmtree(root / "low_noise_model")
    with pytest.raises(CheckpointError, match=r"low_noise_model/.*the low-noise expert of Wan 2.2 A14B"):
        identify(root)


def test_a_missing_shard_of_an_expert_is_named(tmp_path: Path) -> None:
    root = a14b(tmp_path / "model")
    (root / "low_noise_model" / "diffusion_pytorch_model-00004-of-00006.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"low_noise_model.*00004-of-00006.*no such file"):
        identify(root)


def test_the_official_5b_folder_has_a_vae_of_48_channels(tmp_path: Path) -> None:
    root = official(tmp_path, VAE22)
    weight_files.shards(root, "diffusion_pytorch_model", stored(dit("5B"), "F32"), 3)
    config_json(root, "5B")
    found = identify(root)
    assert found.variant == TI2V_5B
    assert vae_config(found) == VAE22Config(dim=160, dec_dim=256, z_dim=48)


def test_the_vae_of_another_model_is_refused(tmp_path: Path) -> None:
    root = official(tmp_path)
    write(root / WEIGHTS, stored(dit("5B"), "F32"))
    with pytest.raises(CheckpointError, match=r"a VAE of 16 latent channels; the transformer makes 48"):
        identify(root)


def diffusers(root: Path, *transformers: str, size: str = "14B", **index: object) -> Path:
    for name in transformers:
        write(root / name / WEIGHTS, stored(dit_diffusers(size), "BF16"))
        config = weight_files.SIZES[size]
        said = {"_class_name": "WanTransformer3DModel", "num_attention_heads": config.num_heads}
        said |= {
            "in_channels": config.in_dim,
            "out_channels": config.out_dim,
            "num_layers": config.num_layers,
        }
        (root / name / "config.json").write_text(json.dumps(said))
    write(root / "text_encoder" / "model.safetensors", stored(umt5(), "BF16"))
    vae = weight_files.vae22_diffusers() if size == "5B" else weight_files.vae21_diffusers()
    write(root / "vae" / WEIGHTS, stored(vae, "F32"))
    (root / "tokenizer").mkdir()
    shutil.copy(SPIECE, root / "tokenizer")
    (root / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"} | index))
    return root


def test_diffusers_a14b_has_its_low_noise_expert_in_transformer_2(tmp_path: Path) -> None:
    second = ["diffusers", "WanTransformer3DModel"]
    root = diffusers(tmp_path, "transformer", "transformer_2", transformer_2=second, boundary_ratio=0.875)
    found = identify(root)
    assert found.variant == T2V_A14B
    assert [(p.expert, p.naming, p.files[0].parent.name) for p in found.experts] == [
        ("high", "diffusers", "transformer"),
        ("low", "diffusers", "transformer_2"),
    ]
    assert (found.vae.naming, found.text_encoder.naming) == ("diffusers", "transformers")


def test_diffusers_boundary_ratio_means_nothing_without_a_second_transformer(tmp_path: Path) -> None:
    root = diffusers(tmp_path, "transformer", transformer_2=[None, None], boundary_ratio=0.875)
    assert identify(root).variant == T2V_14B


def test_diffusers_scheduler_config_does_not_change_the_row(tmp_path: Path) -> None:
    root = diffusers(tmp_path, "transformer", size="5B", expand_timesteps=True)
    (root / "scheduler").mkdir()
    (root / "scheduler/scheduler_config.json").write_text(json.dumps({"flow_shift": 3.0}))
    found = identify(root)
    assert (found.variant, found.variant.shift) == (TI2V_5B, 5.0)
    assert found.vae.config == VAE22Config()


def test_an_expert_of_another_size_is_refused(tmp_path: Path) -> None:
    root = a14b(tmp_path / "model")
    shutil.rmtree(root / "low_noise_model")
    write(root / "low_noise_model" / WEIGHTS, stored(dit("1.3B"), "F32"))
    with pytest.raises(CheckpointError, match=r"low_noise: a Wan2.1-T2V-1.3B, which is not an expert beside"):
        identify(root)


# ---- single files ----

HIGH, LOW = (
    "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
    "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors",
)
SINGLE = "wan2.1_t2v_14B_fp16.safetensors"
UMT5 = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"


def split_files(root: Path, *transformers: str) -> Path:
    """What ComfyUI's users download: one folder per kind of network."""
    scaled = cast(stored(dit("14B"), "F16"), scale_weight=scalar) | {"scaled_fp8": ("F8_E4M3", (2,))}
    for name in transformers:
        entries = scaled if "scaled" in name else stored(dit("14B"), "F16")
        write(root / "diffusion_models" / name, entries)
    text = cast(stored(umt5(), "F16"), matrix=weight_files.T5_MATRIX, scale_weight=scalar)
    text |= {"scaled_fp8": ("F8_E4M3", (0,))}
    spiece = SPIECE.read_bytes()
    write(
        root / "text_encoders" / UMT5,
        text | {"spiece_model": ("U8", (len(spiece),))},
        data={"spiece_model": spiece},
    )
    write(root / "vae" / "wan_2.1_vae.safetensors", vae21())
    write(root / "vae" / "wan2.2_vae.safetensors", stored(weight_files.vae22(), "F16"))
    write(root / "loras" / "x.safetensors", {"blocks.0.ffn.0.lora_A.weight": ("F16", (8, 5120))})
    return root


@pytest.mark.parametrize("folder", ["", "split_files"])
def test_a_tree_of_single_files_with_one_transformer_is_a_checkpoint(tmp_path: Path, folder: str) -> None:
    root = split_files(tmp_path / folder, SINGLE)
    for given in (root, root / "diffusion_models" / SINGLE):
        found = identify(given)
        assert (found.variant, found.root) == (T2V_14B, given)
        assert [path.name for path in found.transformer_files] == [SINGLE]
        assert found.high_noise_files == ()
        assert found.vae_files[0].name == "wan_2.1_vae.safetensors"
        assert found.text_encoder_files == (found.tokenizer,) == (root / "text_encoders" / UMT5,)
        assert found.text_encoder.scheme.name == "fp8_scaled"


def test_the_tokenizer_inside_a_text_encoder_is_the_tokenizer(tmp_path: Path) -> None:
    root = split_files(tmp_path, SINGLE)
    inside, beside = Tokenizer(identify(root).tokenizer), Tokenizer(SPIECE)
    assert inside.to_ids("a gray tabby cat") == beside.to_ids("a gray tabby cat")


def test_either_expert_of_a_tree_finds_the_other(tmp_path: Path) -> None:
    root = split_files(tmp_path, HIGH, LOW)
    for given in (root, root / "diffusion_models" / HIGH, root / "diffusion_models" / LOW):
        found = identify(given)
        assert (found.variant, [part.expert for part in found.experts]) == (T2V_A14B, ["high", "low"])
        assert [part.files[0].name for part in found.experts] == [HIGH, LOW]
        assert [part.scheme.name for part in found.experts] == ["fp8_scaled"] * 2


def test_an_expert_alone_asks_for_the_other(tmp_path: Path) -> None:
    root = split_files(tmp_path, HIGH, "wan2.2_t2v_low_noise_14B_fp16.safetensors")
    with pytest.raises(
        CheckpointError, match=r"missing beside it: the low-noise expert \(low_noise\)"
    ) as caught:
        identify(root / "diffusion_models" / HIGH)
    assert "model: {" in caught.value.hint


def test_a_tree_with_several_transformers_lists_them(tmp_path: Path) -> None:
    root = split_files(tmp_path, HIGH, LOW, SINGLE)
    with pytest.raises(CheckpointError, match=f"several transformers: {SINGLE}, {HIGH}, {LOW}"):
        identify(root)
    assert identify(root / "diffusion_models" / SINGLE).variant == T2V_14B


def test_two_text_encoders_that_would_do_are_not_chosen_from(tmp_path: Path) -> None:
    root = split_files(tmp_path, SINGLE)
    write(root / "text_encoders" / "umt5_xxl_fp16.safetensors", stored(umt5(), "F16"))
    with pytest.raises(CheckpointError, match=f"several text encoders beside it: umt5_xxl_fp16.*{UMT5}"):
        identify(root)


def test_what_a_lone_transformer_needs_is_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "wan.safetensors", stored(dit("14B"), "F16"))
    with pytest.raises(CheckpointError) as caught:
        identify(path)
    needs = "the text encoder (text_encoder), UMT5's SentencePiece model (tokenizer), the VAE (vae)"
    assert caught.value.message == f"missing beside it: {needs}"


def test_a_folder_without_a_transformer_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no Wan transformer in this folder"):
        identify(tmp_path)
    write(
        tmp_path / "wan2.1_vace.safetensors",
        stored(dit("14B"), "F16") | {"vace_blocks.0.after_proj.weight": ("F16", (1,))},
    )
    with pytest.raises(CheckpointError, match=r"VACE checkpoint; wancli renders text-to-video"):
        identify(tmp_path)


def named(tmp_path: Path, **files: Path | None) -> SingleFiles:
    root = split_files(tmp_path / "tree", HIGH, LOW, SINGLE)
    found = {"text_encoder": root / "text_encoders" / UMT5, "vae": root / "vae" / "wan_2.1_vae.safetensors"}
    return SingleFiles(**(found | files))


def test_files_named_one_by_one_are_a_checkpoint(tmp_path: Path) -> None:
    single = tmp_path / "tree" / "diffusion_models" / SINGLE
    files = named(tmp_path, transformer=single, tokenizer=SPIECE)
    found = identify(files)
    assert (found.variant, found.root, found.tokenizer, found.source) == (T2V_14B, single, SPIECE, files)
    assert found.text_encoder.files == (files.text_encoder,)


def test_experts_that_changed_places_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "tree" / "diffusion_models"
    right = named(tmp_path, high_noise=folder / HIGH, low_noise=folder / LOW)
    assert identify(right).variant == T2V_A14B
    with pytest.raises(
        CheckpointError, match="high_noise: this is the low-noise expert by its name"
    ) as caught:
        identify(replace(right, high_noise=folder / LOW, low_noise=folder / HIGH))
    assert "exchange" in caught.value.hint


def test_one_expert_cannot_stand_for_both(tmp_path: Path) -> None:
    folder = tmp_path / "tree" / "diffusion_models"
    with pytest.raises(CheckpointError, match=r"the low-noise expert of Wan 2.2 A14B by its name"):
        identify(named(tmp_path, transformer=folder / LOW))
    with pytest.raises(CheckpointError, match=r"the high-noise expert \(high_noise\)"):
        identify(named(tmp_path / "b", low_noise=tmp_path / "b/tree/diffusion_models" / LOW))


def test_named_experts_need_no_word_in_their_file_names(tmp_path: Path) -> None:
    a, b = (write(tmp_path / f"{x}.safetensors", stored(dit("14B"), "F16")) for x in "ab")
    found = identify(named(tmp_path, high_noise=a, low_noise=b))
    assert [(p.expert, p.variant) for p in found.experts] == [("high", T2V_A14B), ("low", T2V_A14B)]


def test_a_file_of_another_kind_says_what_it_is(tmp_path: Path) -> None:
    vae = tmp_path / "tree" / "vae" / "wan_2.1_vae.safetensors"
    with pytest.raises(CheckpointError, match=r"no transformer: this is a Wan 2.1 VAE"):
        identify(named(tmp_path, transformer=vae))


def test_the_heads_of_an_odd_width_can_be_given(tiny: Path) -> None:
    files = SingleFiles(
        transformer=tiny / WEIGHTS,
        text_encoder=tiny / T5_FILE,
        tokenizer=tiny / "google/umt5-xxl/spiece.model",
        vae=tiny / VAE21,
    )
    with pytest.raises(CheckpointError, match="48 is not a multiple of 128"):
        identify(files)
    assert identify(replace(files, heads=2)).transformer_config == identify(tiny).transformer_config


def test_a_whole_checkpoint_in_one_file_needs_only_a_tokenizer(tmp_path: Path) -> None:
    entries = (
        stored(dit("14B"), "F16", "model.diffusion_model.")
        | stored(umt5(), "F16", "text_encoders.umt5xxl.transformer.")
        | stored(weight_files.vae21_diffusers(), "F16", "vae.")
    )
    path = write(tmp_path / "whole.safetensors", entries)
    found = identify(SingleFiles(transformer=path, tokenizer=SPIECE))
    assert {part.files for part in (*found.experts, found.text_encoder, found.vae)} == {(path,)}
    assert found.vae.prefix == "vae."
