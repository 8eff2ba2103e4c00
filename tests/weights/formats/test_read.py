"""Names and tensors, from files to networks, against diffusers and transformers."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from oracles import relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from wancli.errors import CheckpointError
from wancli.weights.checkpoint import identify
from wancli.weights.formats.key_mapping import (
    transformer_from_diffusers,
    umt5_to_transformers,
    vae_from_diffusers,
)
from wancli.weights.formats.pickle_header import read_pickle_header
from wancli.weights.formats.read import iterate_tensors, read_packed
from wancli.weights.loader import load_into, load_transformer, load_vae

WEIGHTS = "diffusion_pytorch_model.safetensors"
VAE = "Wan2.1_VAE.pth"


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return shutil.copytree(tiny, tmp_path / "model")


@pytest.fixture(scope="module")
def diffusers_folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model as diffusers saves it, the transformer in shards."""
    root = tmp_path_factory.mktemp("diffusers")
    torch.manual_seed(3)
    WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, text_dim=32, freq_dim=64, ffn_dim=96, num_layers=3
    ).save_pretrained(root / "transformer", max_shard_size="300KB")
    AutoencoderKLWan(base_dim=4).save_pretrained(root / "vae")
    UMT5EncoderModel(
        UMT5Config(vocab_size=384, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    ).save_pretrained(root / "text_encoder")
    (root / "tokenizer").mkdir()
    shutil.copy(tiny / "google/umt5-xxl/spiece.model", root / "tokenizer")
    index = {"_class_name": "WanPipeline", "transformer_2": [None, None], "boundary_ratio": None}
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def saved(folder: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, folder / WEIGHTS)
    return folder


def state_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}


def load(folder: Path) -> nn.Module:
    return load_transformer(identify(folder))


def test_diffusers_names_become_the_official_ones(tiny: Path):
    theirs = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, text_dim=64, freq_dim=64, ffn_dim=96, num_layers=40
    )
    official = load_file(tiny / WEIGHTS)
    renamed = {transformer_from_diffusers(name): value.shape for name, value in theirs.state_dict().items()}
    assert renamed == {name: value.shape for name, value in official.items()}
    vae = dict(iterate_tensors([tiny / VAE]))
    renamed = {vae_from_diffusers(k): v.shape for k, v in AutoencoderKLWan(base_dim=4).state_dict().items()}
    assert renamed == {name: value.shape for name, value in vae.items()}


def test_official_umt5_names_become_those_of_transformers(tiny: Path):
    official = dict(iterate_tensors([tiny / "models_t5_umt5-xxl-enc-bf16.pth"]))
    config = UMT5Config(vocab_size=384, d_model=64, d_kv=16, d_ff=128, num_layers=3, num_heads=4)
    theirs = {name: value.shape for name, value in UMT5EncoderModel(config).state_dict().items()}
    theirs.pop("encoder.embed_tokens.weight")  # tied to shared.weight
    assert {umt5_to_transformers(name): value.shape for name, value in official.items()} == theirs


def test_names_that_no_table_knows_stay_as_they_are():
    for rename in (transformer_from_diffusers, vae_from_diffusers, umt5_to_transformers):
        assert rename("blocks") == "blocks"
        assert rename("lora.proj_outer.weight") == "lora.proj_outer.weight"


def test_a_model_saved_by_diffusers_gives_the_same_velocity(diffusers_folder: Path):
    checkpoint = identify(diffusers_folder)
    assert (checkpoint.experts[0].naming, checkpoint.vae.naming) == ("diffusers", "diffusers")
    assert checkpoint.text_encoder.naming == "transformers"
    assert len(checkpoint.transformer_files) > 1
    ours = load_transformer(checkpoint)
    theirs = WanTransformer3DModel.from_pretrained(diffusers_folder / "transformer")
    x, text, t = torch.randn(1, 16, 2, 4, 6), torch.randn(5, 32), torch.tensor([321.0])
    with torch.inference_mode():
        expected = theirs(x, t, F.pad(text, (0, 0, 0, 507))[None]).sample
        velocity = ours(x, t, [((ours.project(text), 1.0),)] * 3)
    assert relative_error(velocity, expected) < 1e-5


def test_a_vae_saved_by_diffusers_decodes_the_same_video(diffusers_folder: Path):
    ours = load_vae(identify(diffusers_folder), "cpu")
    theirs = AutoencoderKLWan.from_pretrained(diffusers_folder / "vae")
    z_CTYX = torch.randn(16, 2, 4, 6)
    mean, std = (
        torch.tensor(v).view(-1, 1, 1, 1) for v in (theirs.config.latents_mean, theirs.config.latents_std)
    )
    with torch.inference_mode():
        expected = theirs.decode((z_CTYX * std + mean)[None]).sample[0]
        video = torch.cat(list(ours.decode(z_CTYX)), dim=1)
    assert torch.allclose(video, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("index", "what"),
    [
        ({"_class_name": "WanVACEPipeline"}, "WanVACEPipeline"),
        ({"_class_name": ["WanPipeline"]}, "this is a .*WanPipeline"),
        ({"_class_name": None, "transformer_2": None}, "nameless pipeline"),
        (
            {"_class_name": "WanPipeline", "transformer_2": ["diffusers", "WanTransformer3DModel"]},
            "transformer_2",
        ),
    ],
)
def test_other_diffusers_pipelines_are_refused_by_name(
    diffusers_folder: Path, tmp_path: Path, index: dict[str, Any], what: str
):
    root = shutil.copytree(diffusers_folder, tmp_path / "other")
    (root / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=what):
        identify(root)


def test_a_diffusers_config_that_disagrees_is_refused(diffusers_folder: Path, tmp_path: Path):
    root = shutil.copytree(diffusers_folder, tmp_path / "other")
    path = root / "transformer/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "in_channels": 36}))
    with pytest.raises(CheckpointError, match=r"config.json says in_dim = 36, the tensors say 16"):
        identify(root)


def test_weights_are_mapped_not_copied(tiny: Path):
    model = load(tiny)
    weight = model.get_parameter("blocks.0.ffn.0.weight")
    again = dict(iterate_tensors([tiny / WEIGHTS]))["blocks.0.ffn.0.weight"]
    assert torch.equal(weight, again)
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if WEIGHTS in line]
    ranges = [[int(end, 16) for end in fields[0].split("-")] for fields in mapped]
    assert any(start <= weight.data_ptr() < stop for start, stop in ranges)


def test_missing_unexpected_and_misshaped_tensors_are_all_listed(folder: Path):
    state = state_of(folder)
    del state["blocks.7.norm3.weight"]
    state["blocks.7.surprise"] = torch.zeros(1)
    state["head.head.bias"] = torch.zeros(65)
    with pytest.raises(CheckpointError) as caught:
        load(saved(folder, state))
    message = str(caught.value)
    assert "missing blocks.7.norm3.weight" in message
    assert "unexpected blocks.7.surprise" in message
    assert "head.head.bias is [65], expected [64]" in message
    assert str(folder) in message


def test_a_long_list_of_problems_is_cut(folder: Path):
    state = {name: tensor for name, tensor in state_of(folder).items() if "norm_k" not in name}
    with pytest.raises(CheckpointError, match="and 70 more"):
        load(saved(folder, state))


def test_nothing_is_assigned_when_a_tensor_does_not_fit():
    module = nn.Linear(2, 2)
    before = module.weight.clone()
    with pytest.raises(CheckpointError):
        load_into(
            module,
            [("weight", torch.ones(2, 2)), ("bias", torch.ones(3))],
            rename=str,
            dtype=torch.float32,
            device="cpu",
            keep_fp32=lambda _: False,
            where="here",
        )
    assert torch.equal(module.weight, before)


class Code:
    """Unpickling it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_a_pickle_that_wants_code_is_refused_and_runs_none(tmp_path: Path):
    path, marker = tmp_path / "evil.pth", tmp_path / "marker"
    torch.save({"weight": torch.zeros(2), "code": Code(marker)}, path)
    with pytest.raises(CheckpointError, match=r"evil.pth: its pickle asks to run code") as caught:
        list(iterate_tensors([path]))
    assert not marker.exists()
    assert ".safetensors" in caught.value.hint


def test_the_only_unpickling_of_weights_is_the_safe_one():
    sources = {path: path.read_text() for path in Path("wancli").rglob("*.py")}
    callers = [path.name for path, text in sources.items() if "torch.load(" in text]
    assert callers == ["read.py"]
    assert "weights_only=True" in sources[Path("wancli/weights/formats/read.py")]


def test_a_zip_bomb_is_refused_before_it_unpacks(tmp_path: Path):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", bytes(50_000_000))
    assert path.stat().st_size < 100_000
    with pytest.raises(CheckpointError, match=r"bomb.pth: archive/data.pkl is compressed, as in a zip bomb"):
        list(iterate_tensors([path]))


def test_a_zip_that_claims_more_than_it_holds_is_refused(tiny: Path, tmp_path: Path):
    data = bytearray((tiny / VAE).read_bytes())
    entry = data.rindex(b"PK\x01\x02")  # the last member's entry in the central directory
    data[entry + 24 : entry + 28] = (2**31).to_bytes(4, "little")
    path = tmp_path / "lying.pth"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"lying.pth"):
        list(iterate_tensors([path]))


@pytest.mark.parametrize("keep", [0, 100, 5000, -1])
def test_a_truncated_pth_is_refused(tiny: Path, tmp_path: Path, keep: int):
    path = tmp_path / "cut.pth"
    path.write_bytes((tiny / VAE).read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"cut.pth: truncated"):
        list(iterate_tensors([path]))


ONE = {"weight": torch.ones(2, 3)}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ([torch.zeros(1)], "does not hold a plain state dict"),
        (7, "does not hold a plain state dict"),
        (ONE | {"step": 5}, "does not hold a plain state dict: 'step' is a int"),
        (ONE | {"x": None}, "'x' is a NoneType"),
        ({"model": {"inner": ONE}}, "'model' is a dict"),
        ({"generator": ONE, "generator_ema": ONE, "step": 3}, "2 state dicts: 'generator', 'generator_ema'"),
    ],
)
def test_a_pth_of_anything_but_named_tensors_is_refused(tmp_path: Path, content: object, what: str):
    path = tmp_path / "odd.pth"
    torch.save(content, path)
    for read in (lambda: list(iterate_tensors([path])), lambda: read_pickle_header(path)):
        with pytest.raises(CheckpointError, match=f"odd.pth: .*{what}"):
            read()


@pytest.mark.parametrize("key", ["state_dict", "module", "generator_ema"])
def test_the_one_state_dict_of_a_trainer_is_read(tmp_path: Path, key: str):
    path = tmp_path / "nested.pth"
    torch.save({key: ONE, "epoch": 3, "optimizer": {"lr": 0.1}, "scheduler": None}, path)
    ((name, tensor),) = iterate_tensors([path])
    assert name == "weight"
    assert torch.equal(tensor, ONE["weight"])
    assert read_pickle_header(path)["weight"].shape == (2, 3)


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path):
    path, other = tmp_path / "wide.pth", tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(77)}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w") as target:
        for member in source.infolist():
            data = source.read(member)
            if member.filename.endswith("data.pkl"):
                assert data.count(b"K\x4d\x85") == 1  # the shape (77,)
                data = data.replace(b"K\x4d\x85", b"J\xff\xff\xff\x7f\x85")
            target.writestr(member.filename, data)
    with pytest.raises(CheckpointError, match=r"other.pth"):
        list(iterate_tensors([other]))


@pytest.mark.parametrize("name", ["blob", "wrong.gguf", "wrong.pth"])
def test_a_container_is_told_by_its_content_whatever_it_is_called(tiny: Path, tmp_path: Path, name: str):
    shutil.copy(tiny / "diffusion_pytorch_model.safetensors", tmp_path / name)
    plain = dict(iterate_tensors([tiny / "diffusion_pytorch_model.safetensors"]))
    found = dict(iterate_tensors([tmp_path / name]))
    assert found.keys() == plain.keys() == read_packed([tmp_path / name]).keys()
    assert all(torch.equal(found[key], plain[key]) for key in plain)


def test_a_header_may_be_as_long_as_the_format_allows(tmp_path: Path):
    path = tmp_path / "long.safetensors"
    save_file({"a": torch.ones(2)}, path, metadata={"modelspec.thumbnail": "A" * 20_000_000})
    assert torch.equal(dict(iterate_tensors([path]))["a"], torch.ones(2))
    path.write_bytes((100_000_001).to_bytes(8, "little") + b"{")
    os.truncate(path, 100_000_100)
    with pytest.raises(CheckpointError, match="claims 100,000,001 bytes, and the format allows 100,000,000"):
        dict(iterate_tensors([path]))


def test_a_missing_pth_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"gone.pth: no such file"):
        list(iterate_tensors([tmp_path / "gone.pth"]))


def test_the_vae_may_be_a_pth_or_a_safetensors_file(folder: Path, tiny: Path):
    from_pth = load_vae(identify(folder), "cpu").state_dict()
    save_file(
        {name: tensor.clone() for name, tensor in iterate_tensors([tiny / VAE])},
        folder / "Wan2.1_VAE.safetensors",
    )
    checkpoint = identify(folder)
    assert checkpoint.vae_files == (folder / "Wan2.1_VAE.safetensors",)
    from_safetensors = load_vae(checkpoint, "cpu").state_dict()
    assert all(torch.equal(from_pth[name], tensor) for name, tensor in from_safetensors.items())


def test_another_vae_is_refused(folder: Path):
    torch.save({"decoder.head.0.gamma": torch.zeros(4, 1, 1, 1)}, folder / VAE)
    with pytest.raises(CheckpointError, match=r"no Wan VAE"):
        load_vae(identify(folder), "cpu")


def test_sizes_are_read_off_the_tensors_where_config_json_is_missing(tmp_path: Path, tiny: Path):
    theirs = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, text_dim=64, freq_dim=64, ffn_dim=96, num_layers=1
    )
    root = shutil.copytree(tiny, tmp_path / "model")
    (root / "config.json").unlink()
    saved(root, {transformer_from_diffusers(k): v.contiguous() for k, v in theirs.state_dict().items()})
    config = identify(root).transformer_config
    assert (config.dim, config.num_heads, config.num_layers, config.ffn_dim) == (128, 1, 1, 96)
    assert math.isclose(config.eps, 1e-6)
