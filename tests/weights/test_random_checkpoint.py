"""The checkpoint of random weights: safetensors, wancli's strict loaders and a render read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from jobs import run_wancli, tiny_job, write_job
from safetensors.torch import load_file

from scripts.make_random_checkpoint import main, vae_entries, write_checkpoint
from wancli.models import t5
from wancli.models.config import VAEConfig, WanConfig
from wancli.models.dit import WanModel
from wancli.weights.checkpoint import identify
from wancli.weights.formats.infer_config import infer_vae21_config
from wancli.weights.formats.key_mapping import umt5_to_transformers
from wancli.weights.loader import load_transformer, load_umt5

CONFIG = WanConfig(dim=96, ffn_dim=192, num_heads=2, num_layers=3, text_dim=64)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def made(folder: Path, dtype: str = "bf16", config: WanConfig = CONFIG, most: int = 2**30) -> Path:
    write_checkpoint(folder, config, dtype=dtype, text_encoder="tiny", vae="tiny", most=most)
    return folder


def test_the_folder_is_identified_and_renders(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = made(tmp_path / "model")
    assert identify(folder).transformer_config == CONFIG
    result = run_wancli(capsys, "render", write_job(tmp_path, tiny_job(model=folder)), "-q")
    assert (result.code, result.err) == (0, "")


def test_every_tensor_of_the_network_is_there_in_bf16_and_like_no_other(tmp_path: Path):
    found = load_file(made(tmp_path / "model") / WEIGHTS)
    with torch.device("meta"):
        expected = WanModel(CONFIG).state_dict()
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in expected.items()}
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    q, k = found["blocks.0.self_attn.q.weight"].float(), found["blocks.0.self_attn.k.weight"].float()
    assert q.std().item() == pytest.approx(96**-0.5, rel=0.05)
    assert torch.corrcoef(torch.stack([q.flatten(), k.flatten()]))[0, 1].abs() < 0.05


def test_shards_hold_the_same_tensors_and_none_is_larger_than_asked_for(tmp_path: Path):
    whole = load_file(made(tmp_path / "whole") / WEIGHTS)
    folder = made(tmp_path / "shards", most=200_000)
    shards = identify(folder).transformer_files
    assert len(shards) > 3
    assert all(path.stat().st_size < 220_000 for path in shards)
    found = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    index = json.loads((folder / f"{WEIGHTS}.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    load_transformer(identify(folder))


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path):
    first, second = (made(tmp_path / name, "fp8") for name in ("a", "b"))
    assert (first / WEIGHTS).read_bytes() == (second / WEIGHTS).read_bytes()


def test_fp8_matrices_have_a_scale_each_and_all_else_stays_high(tmp_path: Path):
    found = load_file(made(tmp_path / "model", "fp8") / WEIGHTS)
    assert found.pop("scaled_fp8").dtype is torch.float8_e4m3fn
    matrices = {name for name, tensor in found.items() if tensor.dtype is torch.float8_e4m3fn}
    assert len(matrices) == 3 * 10
    assert all(name.startswith("blocks.") and name.endswith(".weight") for name in matrices)
    for name in matrices:
        scale = found.pop(name.replace(".weight", ".scale_weight"))
        assert (scale.dtype, scale.shape) == (torch.float32, ())
        weight = found[name].float() * scale
        assert weight.isfinite().all()
        assert weight.std().item() == pytest.approx(weight.shape[1] ** -0.5, rel=0.05)
    with torch.device("meta"):
        assert found.keys() == WanModel(CONFIG).state_dict().keys()
    assert {found[name].dtype for name in found.keys() - matrices} == {torch.bfloat16}


@torch.inference_mode()
def test_activations_stay_finite_and_of_moderate_size_through_40_blocks(tmp_path: Path):
    folder = made(tmp_path / "model", config=WanConfig(192, 384, 2, 40, text_dim=64))
    model = load_transformer(identify(folder))
    context = model.project(torch.randn(9, 64))
    stream = model.iterate_residuals(torch.randn(1, 16, 2, 8, 8), 999.0, [((context, 1.0),)] * 40)
    sizes = [x_BLD.std().item() for x_BLD in stream]
    assert len(sizes) == 40
    assert all(0.1 < size < 1000 for size in sizes)


def test_the_text_encoder_has_the_width_that_the_transformer_reads(tmp_path: Path):
    files = identify(made(tmp_path / "model")).text_encoder_files
    rows_NE = t5.encode(load_umt5(files, umt5_to_transformers, torch.float32, "cpu"), [5, 6, 7, 1])
    assert rows_NE.shape == (4, 64)
    assert rows_NE.isfinite().all()


def test_the_full_vae_has_its_published_sizes():
    entries = {entry.name: entry.shape for entry in vae_entries()}
    assert infer_vae21_config(entries, "") == VAEConfig()
    assert sum(entry.nbytes for entry in vae_entries()) == 4 * 126_892_531


def test_the_command_takes_a_row_of_sizes_and_refuses_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    main([str(tmp_path / "model"), "--model", "48,96,2,7", "--blocks", "2", "--dtype", "bf16"])
    assert identify(tmp_path / "model").transformer_config == WanConfig(48, 96, 2, 2)
    with pytest.raises(SystemExit):
        main([str(tmp_path / "other"), "--model", "48,96"])
    assert "neither 14B nor 1.3B nor four numbers" in capsys.readouterr().err
