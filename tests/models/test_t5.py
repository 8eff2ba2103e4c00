"""UMT5 against the official numbers, and against transformers' own way of loading it.

Letters: N tokens, E text width.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracles import relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import UMT5EncoderModel

from wancli.errors import CheckpointError
from wancli.models import t5
from wancli.models.config import TIED_EMBEDDING, T5Config
from wancli.resources.memory_model import Residency
from wancli.text.embedding import Dtype
from wancli.text.encoder import EncoderSpec, load_encoder
from wancli.weights.formats.infer_config import infer_t5_config
from wancli.weights.formats.key_mapping import umt5_to_transformers

ROOT = Path(__file__).parents[1] / "fixtures" / "wan21-tiny"
OFFICIAL = ROOT / "models_t5_umt5-xxl-enc-bf16.pth"
IDS: dict[str, list[int]] = json.loads((ROOT / "reference.json").read_text())["tokens"]


def encoder(
    *files: Path, naming: str = "official", dtype: Dtype = "fp32", residency: Residency = "resident"
) -> EncoderSpec:
    files = files or (OFFICIAL,)
    return EncoderSpec(files, naming, "weights", "tokenizer", dtype, residency=residency)  # type: ignore[arg-type]


def official_tensors() -> dict[str, Tensor]:
    return torch.load(OFFICIAL, weights_only=True)


@pytest.fixture(scope="module")
def model() -> UMT5EncoderModel:
    return load_encoder(encoder())


@pytest.fixture(scope="module")
def saved_by_transformers(model: UMT5EncoderModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text_encoder")
    model.save_pretrained(folder, max_shard_size="200KB")
    return folder


@pytest.mark.parametrize("prompt", IDS)
def test_official_weights_give_the_official_contexts(model: UMT5EncoderModel, prompt: str):
    expected_NE = load_file(ROOT / "reference.safetensors")[f"context.{prompt}"]
    rows_NE = t5.encode(model, IDS[prompt])
    assert rows_NE.shape == expected_NE.shape
    assert relative_error(rows_NE, expected_NE) < 1e-5


def test_shards_saved_by_transformers_give_the_same_rows(
    model: UMT5EncoderModel, saved_by_transformers: Path
):
    shards = sorted(saved_by_transformers.glob("*.safetensors"))
    assert len(shards) > 1
    ours = load_encoder(encoder(*shards, naming="transformers"))
    assert torch.equal(t5.encode(ours, IDS["main"]), t5.encode(model, IDS["main"]))


def test_unpadded_tokens_give_the_rows_of_the_padded_and_masked_512(
    model: UMT5EncoderModel, saved_by_transformers: Path
):
    theirs = UMT5EncoderModel.from_pretrained(saved_by_transformers).eval()
    count = len(IDS["injection"])
    ids_1M = torch.zeros(1, 512, dtype=torch.long)
    ids_1M[0, :count] = torch.tensor(IDS["injection"])
    with torch.no_grad():
        padded_ME = theirs(input_ids=ids_1M, attention_mask=ids_1M != 0).last_hidden_state[0]
    assert relative_error(t5.encode(model, IDS["injection"]), padded_ME[:count]) < 1e-5


def test_a_prompt_of_512_tokens_and_an_empty_one_are_encoded(model: UMT5EncoderModel):
    assert t5.encode(model, [*[260] * 511, 1]).shape == (512, 64)
    assert t5.encode(model, [1]).shape == (1, 64)


@torch.no_grad()
def test_prompts_in_one_pass_get_the_bits_that_transformers_gives_each(model: UMT5EncoderModel):
    prompts = [*IDS.values(), [1], [*[260] * 99, 1]]
    for ids, rows_NE in zip(prompts, t5.encode_batch(model, prompts), strict=True):
        theirs = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        assert torch.equal(rows_NE, theirs)


@pytest.mark.parametrize("prompt", IDS)
def test_streamed_weights_give_the_official_contexts(prompt: str):
    streamed = load_encoder(encoder(residency="streamed"))
    expected_NE = load_file(ROOT / "reference.safetensors")[f"context.{prompt}"]
    assert relative_error(t5.encode(streamed, IDS[prompt]), expected_NE) < 1e-5


@pytest.mark.parametrize("residency", ["packed", "streamed"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_fetched_weights_give_the_bits_of_resident_ones(dtype: Dtype, residency: Residency):
    resident = load_encoder(encoder(dtype=dtype))
    fetched = load_encoder(encoder(dtype=dtype, residency=residency))
    prompts = list(IDS.values())
    for _ in range(2):
        both = zip(t5.encode_batch(resident, prompts), t5.encode_batch(fetched, prompts), strict=True)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in both)


def test_shards_saved_by_transformers_are_streamed_too(model: UMT5EncoderModel, saved_by_transformers: Path):
    shards = sorted(saved_by_transformers.glob("*.safetensors"))
    streamed = load_encoder(encoder(*shards, naming="transformers", residency="streamed"))
    assert torch.equal(t5.encode(streamed, IDS["main"]), t5.encode(model, IDS["main"]))


def test_a_streamed_encoder_holds_neither_its_embedding_nor_its_matrices():
    streamed = load_encoder(encoder(residency="streamed"))
    t5.encode(streamed, IDS["main"])
    held = {name: tensor for name, tensor in streamed.state_dict().items() if not tensor.is_meta}
    per_layer = ["layer.0.SelfAttention.relative_attention_bias", "layer.0.layer_norm", "layer.1.layer_norm"]
    names = {f"encoder.block.{i}.{part}.weight" for i in range(3) for part in per_layer}
    assert held.keys() == names | {"encoder.final_layer_norm.weight"}


def test_sizes_are_read_off_the_tensors():
    shapes = {umt5_to_transformers(name): tensor.shape for name, tensor in official_tensors().items()}
    assert infer_t5_config(shapes, "") == T5Config(
        vocab_size=384, d_model=64, d_kv=16, d_ff=128, num_layers=3, num_heads=4, num_buckets=32
    )


def test_the_network_is_built_without_memory_and_for_inference():
    network = t5.build_encoder(T5Config(256384, 4096, 64, 10240, 24, 64))
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_the_official_file_names_every_tensor_of_the_network(model: UMT5EncoderModel):
    assert {umt5_to_transformers(name) for name in official_tensors()} == {
        name for name in model.state_dict() if name != TIED_EMBEDDING
    }


def test_the_encoder_looks_tokens_up_in_the_one_loaded_embedding(model: UMT5EncoderModel):
    assert model.encoder.embed_tokens.weight.data_ptr() == model.shared.weight.data_ptr()
    assert torch.equal(model.encoder.embed_tokens.weight, official_tensors()["token_embedding.weight"])


def test_a_file_that_holds_the_embedding_under_both_names_is_read(model: UMT5EncoderModel, tmp_path: Path):
    tensors = {umt5_to_transformers(name): tensor for name, tensor in official_tensors().items()}
    both = tmp_path / "model.safetensors"
    save_file(tensors | {TIED_EMBEDDING: tensors["shared.weight"].clone()}, both)
    ours = load_encoder(encoder(both, naming="transformers"))
    assert torch.equal(t5.encode(ours, IDS["main"]), t5.encode(model, IDS["main"]))


def test_bf16_stays_near_fp32(model: UMT5EncoderModel):
    half = load_encoder(encoder(dtype="bf16"))
    rows_NE = t5.encode(half, IDS["main"])
    assert rows_NE.dtype is torch.bfloat16
    assert relative_error(rows_NE.float(), t5.encode(model, IDS["main"])) < 0.03


def test_fp16_keeps_the_layers_that_overflow_in_fp32():
    half = load_encoder(encoder(dtype="fp16"))
    kept = {name for name, tensor in half.state_dict().items() if tensor.dtype is torch.float32}
    assert kept == {f"encoder.block.{i}.layer.1.DenseReluDense.wo.weight" for i in range(3)}


def zeroed(tensors: dict[str, Tensor]) -> None:
    tensors["token_embedding.weight"].zero_()


def without_a_norm(tensors: dict[str, Tensor]) -> None:
    del tensors["blocks.1.norm2.weight"]


def without_an_embedding(tensors: dict[str, Tensor]) -> None:
    del tensors["token_embedding.weight"]


def with_a_stray_tensor(tensors: dict[str, Tensor]) -> None:
    tensors["blocks.0.attn.r.weight"] = torch.ones(64, 64)


def with_a_narrow_value(tensors: dict[str, Tensor]) -> None:
    tensors["blocks.2.attn.v.weight"] = torch.ones(64, 32)


@pytest.mark.parametrize("residency", ["resident", "streamed"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (zeroed, "the token embedding is zero"),
        (without_a_norm, "missing encoder.block.1.layer.1.layer_norm.weight"),
        (without_an_embedding, "shared.weight"),
        (with_a_stray_tensor, "unexpected"),
        (with_a_narrow_value, r"encoder.block.2.layer.0.SelfAttention.v.weight is \[64, 32\]"),
    ],
)
def test_a_file_that_is_not_this_network_is_refused_by_tensor(
    damage: Callable[[dict[str, Tensor]], None], message: str, residency: Residency, tmp_path: Path
):
    tensors = official_tensors()
    damage(tensors)
    path = tmp_path / "umt5.safetensors"
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_encoder(encoder(path, residency=residency))
    assert str(path) in str(caught.value)
