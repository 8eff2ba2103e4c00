"""What a folder of weights is taken for, and how it is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wancli.errors import CheckpointError
from wancli.models.config import WanConfig
from wancli.weights.headers import header
from wancli.weights.identify import fingerprint, identify

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
    assert found.transformer == WanConfig(48, 96, 2, 40, text_dim=64, freq_dim=64)
    assert (found.naming, found.text_encoder_naming, found.vae_naming) == ("official",) * 3
    assert found.transformer_files == (tiny / WEIGHTS,)
    assert found.vae_files == (tiny / "Wan2.1_VAE.pth",)
    assert found.text_encoder_files == (tiny / "models_t5_umt5-xxl-enc-bf16.pth",)
    assert found.tokenizer == tiny / "google/umt5-xxl/spiece.model"


def test_shards_are_found_through_their_index(folder: Path):
    shards = shard(folder)
    found = identify(folder)
    assert found.transformer_files == tuple(shards)
    assert found.transformer.num_layers == 40


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
    ("heads", "message"), [(7, "does not split into 7 heads"), ("two", "heads is unknown")]
)
def test_a_head_count_that_cannot_be_is_refused(folder: Path, heads: object, message: str):
    edit_json(folder / "config.json", num_heads=heads)
    with pytest.raises(CheckpointError, match=message):
        identify(folder)


def test_without_config_json_an_odd_width_asks_for_the_heads(folder: Path):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="48 is no multiple of 128") as caught:
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
        ("img_emb.proj.0.weight", (1,), "Wan 2.1 image-to-video"),
        ("img_emb.emb_pos", (1,), "FLF2V"),
        ("blocks.0.cross_attn.k_img.weight", (1,), "Wan 2.1 image-to-video"),
        ("control_adapter.x", (1,), "Fun-Camera"),
        ("patch_embedding.weight", (48, 36, 1, 2, 2), "Wan 2.2 image-to-video"),
        ("patch_embedding.weight", (48, 48, 1, 2, 2), "Fun-Control"),
        ("patch_embedding.weight", (48, 20, 1, 2, 2), "20 input channels"),
    ],
)
def test_other_models_are_refused_by_name(folder: Path, name: str, shape: tuple[int, ...], what: str):
    edit(folder / WEIGHTS, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    with pytest.raises(CheckpointError, match=f"{what}.*text-to-video"):
        identify(folder)


def test_a_missing_expert_is_named(folder: Path):
    (folder / "high_noise_model").mkdir()
    with pytest.raises(
        CheckpointError, match=r"low_noise_model: diffusion_pytorch_model.safetensors is missing"
    ):
        identify(folder)


def test_weights_that_are_no_transformer_are_refused(folder: Path):
    save_file({"conv.weight": torch.zeros(2)}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"no Wan 2.1 transformer: 'patch_embedding.weight' is missing"):
        identify(folder)


def test_fp8_weights_are_refused_rather_than_loaded_without_their_scales(folder: Path):
    def to_fp8(tensors: dict[str, torch.Tensor]) -> None:
        tensors["blocks.3.ffn.0.weight"] = tensors["blocks.3.ffn.0.weight"].to(torch.float8_e4m3fn)

    edit(folder / WEIGHTS, to_fp8)
    with pytest.raises(CheckpointError, match=r"blocks.3.ffn.0.weight is stored as F8_E4M3"):
        identify(folder)


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
        header(path)
    assert "again" in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"\x01", b"\xff" * 8, struct.pack("<Q", 10**9) + b"{}"])
def test_a_header_length_that_lies_is_refused_without_reading_it(tmp_path: Path, content: bytes):
    path = tmp_path / "lying.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or damaged: its header claims"):
        header(path)


def test_headers_agree_with_safetensors(tiny: Path):
    found = header(tiny / WEIGHTS)
    tensors = load_file(tiny / WEIGHTS)
    assert {name: info.shape for name, info in found.items()} == {
        k: tuple(v.shape) for k, v in tensors.items()
    }
    assert {info.dtype for info in found.values()} == {"F32"}


def test_a_fingerprint_is_the_sha256_of_the_whole_content(tmp_path: Path):
    a, b, memo = tmp_path / "a", tmp_path / "b", tmp_path / "memo.json"
    a.write_bytes(b"first" * 1000)
    b.write_bytes(b"second")
    sha = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (a, b)]
    assert fingerprint([a], memo) == sha[0]
    assert fingerprint([a, b], memo) == hashlib.sha256("".join(sha).encode()).hexdigest()
    assert fingerprint([b, a], memo) != fingerprint([a, b], memo)


def test_a_fingerprint_is_remembered_until_the_file_changes(tmp_path: Path):
    path, memo = tmp_path / "a", tmp_path / "memo.json"
    path.write_bytes(b"before")
    before = fingerprint([path], memo)
    forged = json.loads(memo.read_text())
    memo.write_text(json.dumps(dict.fromkeys(forged, "0" * 64)))
    assert fingerprint([path], memo) == "0" * 64  # the memo was used
    path.write_bytes(b"after!")
    assert fingerprint([path], memo) == hashlib.sha256(b"after!").hexdigest() != before


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff", b'{"x": 7}'])
def test_a_damaged_memo_is_made_anew(tmp_path: Path, damage: bytes):
    path, memo = tmp_path / "a", tmp_path / "memo.json"
    path.write_bytes(b"content")
    memo.write_bytes(damage)
    expected = hashlib.sha256(b"content").hexdigest()
    assert fingerprint([path], memo) == expected
    assert expected in json.loads(memo.read_text()).values()


def test_a_folder_is_identified_without_torch(tiny: Path):
    code = (
        "import sys; from pathlib import Path; from wancli.weights import identify, names; "
        f"identify.identify(Path({str(tiny)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_memo_that_cannot_be_written_costs_time_and_nothing_else(tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"weights")
    (tmp_path / "file").write_text("not a folder")
    expected = hashlib.sha256(b"weights").hexdigest()
    assert fingerprint([weights], tmp_path / "file" / "memo.json") == expected
