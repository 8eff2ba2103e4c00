"""Properties that only a GPU can show, run by `make gpu`. Everything else is tested on the CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jobs import CommandResult, latents_of, manifest_of
from oracles import relative_error
from torch import Tensor

from wancli.errors import MachineError
from wancli.models import t5
from wancli.models.attention import TORCH_BACKENDS, attend, choose_backend
from wancli.models.config import AttentionBackend, ComputeOptions, VAEConfig, WanConfig
from wancli.models.dit import WanModel
from wancli.models.vae import WanVAE
from wancli.resources import memory_model
from wancli.resources.memory_model import Residency
from wancli.sampling import denoise
from wancli.weights.checkpoint import identify
from wancli.weights.formats.key_mapping import umt5_to_transformers
from wancli.weights.formats.packed import Packed
from wancli.weights.fp8_linear import CAPABILITY, replace_with_fp8
from wancli.weights.loader import LoadOptions, load_transformer, load_umt5
from wancli.weights.offload import matrix_names

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: torch sees no CUDA device"),
]
DEVICE = "cuda"
WIDE = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=3, text_dim=64)  # 1.3B, three blocks of it


def velocity(model: WanModel, latent: tuple[int, ...] = (16, 3, 8, 12)) -> Tensor:
    """Of the same latent and prompt on any device."""
    generator = torch.Generator().manual_seed(3)
    device = model.head.modulation.device
    x = torch.randn(1, *latent, generator=generator).to(device)
    rows_NE = torch.randn(9, model.config.text_dim, generator=generator).to(device)
    with torch.inference_mode():
        return model(x, 500.0, [((model.project(rows_NE), 1.0),)] * model.config.num_layers)


def wide(kernels: ComputeOptions = ComputeOptions()) -> WanModel:
    """Random weights, the same each time, as half precision keeps them."""
    torch.manual_seed(0)
    model = WanModel(WIDE, kernels).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    for block in model.blocks:
        for layer in (m for m in block.modules() if isinstance(m, torch.nn.Linear)):
            layer.to(torch.bfloat16)
    return model


def test_the_transformer_gives_the_velocity_of_the_cpu(tiny: Path):
    there, here = (
        load_transformer(identify(tiny), LoadOptions(torch.float32, device)) for device in (DEVICE, "cpu")
    )
    assert relative_error(velocity(there), velocity(here)) < 1e-4


@pytest.mark.parametrize("residency", ["packed", "streamed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fetched_weights_give_the_velocity_of_resident_ones_bit_for_bit(
    tiny: Path, residency: Residency, dtype: torch.dtype
):
    resident = velocity(load_transformer(identify(tiny), LoadOptions(dtype, DEVICE)))
    fetched = load_transformer(identify(tiny), LoadOptions(dtype, DEVICE, residency=residency))
    for _ in range(5):  # blocks of one pass follow those of the last on the same buffers
        assert torch.equal(velocity(fetched), resident)


def test_the_text_encoder_gives_the_rows_of_the_cpu(tiny: Path):
    files, ids = identify(tiny).text_encoder_files, [5, 9, 200, 17, 1]
    found = []
    for device, residency in (("cpu", "resident"), (DEVICE, "resident"), (DEVICE, "streamed")):
        model = load_umt5(files, umt5_to_transformers, torch.float32, device, residency)
        with torch.inference_mode():
            (rows_NE,) = t5.encode(model, [ids])
        found.append(rows_NE)
    here, resident, streamed = found
    assert relative_error(resident, here) < 1e-4
    assert torch.equal(streamed, resident)


def test_the_vae_gives_the_frames_of_the_cpu():
    torch.manual_seed(0)
    vae, z = WanVAE(VAEConfig(8, 16, (1, 2, 4, 4))).eval(), torch.randn(16, 3, 6, 8)
    here = torch.cat([*vae.decode(z)])
    there = torch.cat([frames.cpu() for frames in vae.to(DEVICE).decode(z.to(DEVICE))])
    assert here.shape == there.shape
    assert (here.float() - there.float()).abs().max() <= (1 if here.dtype == torch.uint8 else 1e-3)


def test_noise_is_drawn_where_the_job_says():
    drawn = torch.randn(
        (16, 1, 4, 4), generator=torch.Generator(DEVICE).manual_seed(7), device=DEVICE, dtype=torch.float32
    )
    assert torch.equal(denoise.draw_noise((16, 1, 4, 4), 7, DEVICE), drawn)
    assert denoise.draw_noise((16, 1, 4, 4), 7).device.type == "cpu"


@pytest.mark.parametrize("chunk", [None, 1024])
def test_a_forward_takes_the_memory_that_is_predicted(chunk: int | None):
    latent = (16, 5, 60, 104)  # 7,800 tokens
    model = wide(ComputeOptions(chunk=chunk)).to(DEVICE)
    velocity(model, latent)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    velocity(model, latent)
    predicted = (
        memory_model.sample_coefficients(WIDE, element_bytes=2).phase(latent, text_rows=10, chunk=chunk).total
    )
    assert 0.9 < torch.cuda.max_memory_allocated() / predicted < 1.1


@pytest.mark.parametrize("asked", TORCH_BACKENDS)
@torch.inference_mode()
def test_every_available_backend_agrees_with_the_plain_one(asked: AttentionBackend):
    try:
        choose_backend(DEVICE, torch.bfloat16, 128, requested=asked)
    except MachineError:
        pytest.skip(f"torch has no {asked} attention here")
    q, k, v = torch.randn(3, 1, 4, 500, 128, device=DEVICE, dtype=torch.bfloat16)
    assert (
        relative_error(attend(q, k, v, asked).float(), attend(q.float(), k.float(), v.float(), "math")) < 1e-2
    )


@pytest.mark.parametrize("chunk", [None, 256])
def test_products_in_fp8_are_near_those_in_bf16(chunk: int | None):
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < CAPABILITY:
        pytest.skip("this card does not multiply in fp8")
    exact = wide().to(DEVICE)
    found = wide(ComputeOptions(chunk=chunk)).to(DEVICE)
    source = {}
    for name in matrix_names(found.blocks, "blocks"):
        weight = found.get_parameter(name).data
        source[name] = Packed("plain", weight, tuple(weight.shape))
    replace_with_fp8(found.blocks, "blocks", source, DEVICE)
    assert 1e-4 < relative_error(velocity(found), velocity(exact)) < 0.06


def test_a_job_renders_on_the_gpu(render: Callable[..., CommandResult], tmp_path: Path):
    job = {"size": "64x64", "frames": 5, "video": {"keep_latents": True}}
    assert render(**job, memory={"device": DEVICE, "dtype": "fp32"}).code == 0
    body = manifest_of(tmp_path)
    assert body["model"]["device"] == DEVICE
    assert all(phase["cuda"] for phase in body["phases"] if phase["name"] == "sample")
    there = latents_of(tmp_path)
    assert render("--force", **job, memory={"device": "cpu", "dtype": "fp32"}).code == 0
    assert relative_error(there, latents_of(tmp_path)) < 1e-3
