"""Checkpoints of every size, and broken ones, through the command line."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import (
    KEPT,
    NETWORKS,
    T5,
    TINY,
    TRANSFORMER,
    VAE,
    CommandResult,
    change_tensors,
    checkpoint,
    files_in,
    latents_of,
    manifest_of,
    rule,
)
from safetensors.torch import load_file, save_file

from wancli.models.config import WanConfig
from wancli.models.dit import WanModel
from wancli.text.embedding import Embedding, save_embeddings
from wancli.text.tokenizer import Tokenizer
from wancli.weights import loader


def test_several_models_in_one_job_are_loaded_once_each(
    render: Callable[..., CommandResult], quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = checkpoint(tmp_path, quick)
    change_tensors(other / TRANSFORMER, lambda tensors: tensors["head.head.bias"].add_(0.1))
    loaded: list[Path] = []
    real = loader.load_transformer

    def counted(found: Any, *rest: Any) -> WanModel:
        loaded.append(found.root)
        return real(found, *rest)

    monkeypatch.setattr(loader, "load_transformer", counted)
    items = [{"id": "a"}, {"id": "b", "model": str(other)}, {"id": "c", "seed": 1}]
    NETWORKS.clear()
    assert render(output="out/{id}.mp4", items=items, video=KEPT).code == 0
    assert loaded == [quick, other]
    assert not torch.equal(latents_of(tmp_path, "a"), latents_of(tmp_path, "b"))
    assert manifest_of(tmp_path, "b")["model"]["root"] == str(other)


@pytest.mark.parametrize(("layers", "heads", "head_dim"), [(30, 2, 24), (3, 3, 10), (2, 1, 22), (1, 5, 14)])
def test_a_model_of_any_depth_and_head_width_renders(
    render: Callable[..., CommandResult], tmp_path: Path, layers: int, heads: int, head_dim: int
) -> None:
    model = checkpoint(tmp_path)
    torch.manual_seed(layers)
    config = WanConfig(heads * head_dim, 52, heads, layers, text_dim=64, freq_dim=32)
    save_file(WanModel(config).state_dict(), model / TRANSFORMER)
    (model / "config.json").write_text(json.dumps({"num_heads": heads, "eps": 1e-6, "model_type": "t2v"}))
    assert render(model=str(model), inject=[rule(blocks="second_half")], video=KEPT).code == 0
    body = manifest_of(tmp_path)
    assert body["model"]["sizes"] | {"num_layers": layers, "num_heads": heads} == body["model"]["sizes"]
    assert [int(b) for b in body["injection"][0]["blocks"]] == list(range(layers // 2, layers))
    assert latents_of(tmp_path).isfinite().all()


def test_shards_are_one_model_and_each_must_be_whole(
    render: Callable[..., CommandResult], quick: Path, tmp_path: Path
) -> None:
    model = checkpoint(tmp_path, quick)
    tensors = load_file(model / TRANSFORMER)
    (model / TRANSFORMER).unlink()
    names = sorted(tensors)
    shards = {
        "diffusion_pytorch_model-1.safetensors": names[::2],
        "diffusion_pytorch_model-2.safetensors": names[1::2],
    }
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, model / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (model / f"{TRANSFORMER}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert render(folder=tmp_path / "one", video=KEPT).code == 0
    assert render(folder=tmp_path / "two", video=KEPT, model=str(model)).code == 0
    assert torch.equal(latents_of(tmp_path / "one"), latents_of(tmp_path / "two"))

    second = model / "diffusion_pytorch_model-2.safetensors"
    second.write_bytes(second.read_bytes()[:-100])
    result = render(model=str(model))
    assert result.code == 4
    assert result.err.startswith(f"wancli: {tmp_path}/job.yaml:1: model: {second}: truncated or damaged: ")
    second.unlink()
    result = render(model=str(model))
    assert result.err.splitlines()[0].endswith(f"job.yaml:1: model: {second}: no such file")
    assert result.code == 4
    assert files_in(tmp_path) == []


def broken(tensors: dict[str, torch.Tensor], names: Sequence[str]) -> None:
    """One tensor missing, one too many, one of another shape."""
    del tensors[names[0]]
    tensors["stranger"] = torch.zeros(1)
    tensors[names[1]] = torch.zeros(*tensors[names[1]].shape, 2)


@pytest.mark.parametrize(
    ("file", "names"),
    [
        (TRANSFORMER, ("blocks.5.cross_attn.q.weight", "blocks.6.norm3.bias")),
        (VAE, ("decoder.middle.0.residual.2.bias", "decoder.head.2.bias")),
        (T5, ("blocks.1.ffn.fc1.weight", "blocks.2.norm1.weight")),
    ],
)
def test_missing_unexpected_and_misshapen_tensors_are_listed(
    render: Callable[..., CommandResult], tmp_path: Path, file: str, names: tuple[str, str]
) -> None:
    model = checkpoint(tmp_path)
    change_tensors(model / file, lambda tensors: broken(tensors, names))
    result = render(model=str(model))
    assert result.code == 4
    line = result.err.splitlines()[0]
    assert str(model) in line
    assert "missing " in line
    assert "unexpected stranger" in line
    assert ", expected [" in line
    assert not list(tmp_path.rglob("*.mp4"))


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("file", [VAE, T5])
@pytest.mark.parametrize("plain", [True, False], ids=["bare pickle", "zip"])
def test_a_pickle_that_wants_to_run_code_is_refused_and_does_not_run(
    render: Callable[..., CommandResult], tmp_path: Path, file: str, plain: bool
) -> None:
    model, marker = checkpoint(tmp_path), tmp_path / "marker"
    if plain:
        (model / file).write_bytes(pickle.dumps({"a": Payload(marker)}))
    else:
        change_tensors(model / file, lambda tensors: tensors.update(evil=Payload(marker)))
    result = render(model=str(model))
    assert result.code == 4
    assert result.err.startswith(f"wancli: {tmp_path}/job.yaml:1: model: {model / file}: ")
    assert not marker.exists()


def test_an_embedding_of_another_width_is_refused(
    render: Callable[..., CommandResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.safetensors"
    tokens = Tokenizer(TINY / "google/umt5-xxl/spiece.model").tokenize("a fog", 256)
    save_embeddings(out, [Embedding.from_tokens(tokens, torch.zeros(len(tokens.ids), 32), "x")])
    result = render(prompt={"embedding": "a.safetensors"})
    assert result.code == 1
    assert f"wancli: shot 0000: {out}: its rows are 32 wide, the model reads 64\n" in result.err


def test_half_precision_renders_nearly_the_same(render: Callable[..., CommandResult], tmp_path: Path) -> None:
    for dtype in ("fp32", "bf16"):
        assert render(folder=tmp_path / dtype, memory={"dtype": dtype}, video=KEPT).code == 0
    full, half = latents_of(tmp_path / "fp32"), latents_of(tmp_path / "bf16")
    assert 0 < torch.linalg.vector_norm(full - half) / torch.linalg.vector_norm(full) < 0.1
