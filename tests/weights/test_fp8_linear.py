"""Products in fp8 against the same numbers multiplied in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracles import relative_error
from torch import Tensor

from wancli.errors import CheckpointError, MachineError
from wancli.models.config import ComputeOptions, WanConfig
from wancli.models.dit import WanModel
from wancli.weights import fp8_linear
from wancli.weights.checkpoint import identify
from wancli.weights.formats.packed import Packed, pack_fp8
from wancli.weights.fp8_linear import Fp8Linear, check_fp8_matmul, quantize_rows, replace_with_fp8
from wancli.weights.loader import LoadOptions, load_transformer
from wancli.weights.offload import matrix_names

BF16 = 2**-8  # the rounding of the result


def in_fp8(x_RI: Tensor) -> Tensor:
    """The rows of an input as the product sees them, in fp32."""
    x8_RI, scale_R1 = quantize_rows(x_RI)
    assert x8_RI.dtype == torch.float8_e4m3fn
    return x8_RI.float() * scale_R1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 17, 40])
def test_rows_keep_their_size_and_lose_a_sixteenth_at_most(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fp8_linear, "SLICE_ELEMENTS", 200)
    torch.manual_seed(0)
    x_RI = (torch.randn(rows, 64) * torch.logspace(-3, 3, rows)[:, None]).to(dtype)
    found, largest = in_fp8(x_RI), x_RI.float().abs().amax(1, keepdim=True)
    tiniest = largest / 448 * 2**-10  # half a step of the subnormals
    assert ((found - x_RI.float()).abs() <= x_RI.float().abs() / 16 + tiniest).all()
    assert torch.allclose(found.abs().amax(1, keepdim=True), largest, rtol=1e-3)


def test_rows_of_zeros_are_zeros():
    assert not in_fp8(torch.zeros(2, 16)).any()


@pytest.mark.parametrize("scale", [None, (), (1, 1), (48,), (48, 1)])
@pytest.mark.parametrize("gelu", [False, True])
@torch.no_grad()
def test_a_product_is_that_of_the_dequantized_factors(scale: tuple[int, ...] | None, gelu: bool):
    torch.manual_seed(0)
    weight = Packed(
        "fp8",
        torch.randn(48, 64).to(torch.float8_e4m3fn),
        (48, 64),
        None if scale is None else torch.rand(scale) + 0.1,
    )
    layer, x = Fp8Linear(weight, torch.randn(48), gelu), torch.randn(2, 9, 64)
    expected = F.linear(in_fp8(x.flatten(0, 1)).view_as(x), weight.unpack(torch.float32), layer.bias.float())
    if gelu:
        expected = F.gelu(expected, approximate="tanh")
    found = layer(x)
    assert found.shape == (2, 9, 48)
    assert found.dtype == layer.dtype == torch.bfloat16
    assert relative_error(found, expected) < BF16


@torch.no_grad()
def test_what_is_not_stored_as_e4m3_by_rows_is_made_so():
    torch.manual_seed(0)
    config = WanConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=2, text_dim=32)
    with torch.device("meta"):
        blocks = WanModel(config).blocks
    source = {}
    for name in matrix_names(blocks, "blocks"):
        shape = blocks.get_parameter(name.removeprefix("blocks.")).shape
        source[name] = Packed("plain", torch.randn(shape), tuple(shape))
    as_stored = pack_fp8(torch.randn(48, 48))
    source["blocks.1.cross_attn.o.weight"] = as_stored
    in_blocks = torch.rand(48, 4, 1)
    source["blocks.0.self_attn.q.weight"] = Packed("fp8", as_stored.data, (48, 48), in_blocks)
    for block in blocks:
        for layer in (m for m in block.modules() if isinstance(m, torch.nn.Linear)):
            layer.bias = torch.nn.Parameter(torch.zeros(layer.out_features))
    replace_with_fp8(blocks, "blocks", source, "cpu")
    assert blocks[1].cross_attn.o.weight.data_ptr() == as_stored.data.data_ptr()
    assert blocks[0].ffn[0].gelu
    assert not blocks[0].ffn[2].gelu
    for name, weight in source.items():
        made = blocks.get_submodule(name.removeprefix("blocks.").removesuffix(".weight"))
        values = made.weight.float() * made.scale_1O.T
        assert relative_error(values, weight.unpack(torch.float32)) < 0.04, name


def test_a_nan_in_a_weight_is_refused_by_its_name():
    blocks = torch.nn.ModuleList([WanModel(WanConfig(24, 16, 2, 1, text_dim=8)).blocks[0]])
    source = {name: Packed("plain", torch.ones(24, 24), (24, 24)) for name in matrix_names(blocks, "blocks")}
    source["blocks.0.self_attn.q.weight"].data[3, 3] = torch.nan
    with pytest.raises(CheckpointError, match=r"blocks\.0\.self_attn\.q\.weight: the weight holds NaN"):
        replace_with_fp8(blocks, "blocks", source, "cpu")


@pytest.mark.parametrize("chunk", [None, 3])
@torch.inference_mode()
def test_a_whole_transformer_multiplies_in_fp8_and_stays_near_its_velocity(tiny: Path, chunk: int | None):
    exact = load_transformer(identify(tiny))
    found = load_transformer(
        identify(tiny), LoadOptions(torch.bfloat16, kernels=ComputeOptions(chunk=chunk, fp8_matmul=True))
    )
    assert {layer.weight.dtype for layer in found.modules() if isinstance(layer, Fp8Linear)} == {
        torch.float8_e4m3fn
    }
    torch.manual_seed(0)
    x, rows_NE = torch.randn(1, 16, 2, 8, 8), torch.randn(7, exact.config.text_dim)
    velocities = [m(x, 500.0, [((m.project(rows_NE), 1.0),)] * 40) for m in (found, exact)]
    assert 1e-3 < relative_error(*velocities) < 0.1


def test_streamed_weights_do_not_multiply_in_fp8(tiny: Path):
    with pytest.raises(ValueError, match="streamed weights"):
        load_transformer(
            identify(tiny),
            LoadOptions(torch.bfloat16, residency="streamed", kernels=ComputeOptions(fp8_matmul=True)),
        )


def test_a_machine_that_cannot_is_named(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(MachineError, match="only CUDA devices"):
        check_fp8_matmul("cpu", (5120,))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "RTX 3090")
    with pytest.raises(MachineError, match=r"RTX 3090 has compute capability 8\.6, .* need 8\.9") as caught:
        check_fp8_matmul("cuda", (5120,))
    assert "memory.dtype: fp8" in caught.value.hint
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    with pytest.raises(MachineError, match="the model is 24 wide"):
        check_fp8_matmul("cuda", (48, 24))
    check_fp8_matmul("cuda", (5120, 13824))
