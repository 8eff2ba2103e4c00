"""Packed weights against torch's own fp8 conversion and against gguf's numpy reference."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import UMT5Config, UMT5EncoderModel

from wancli.errors import CheckpointError
from wancli.weights.formats import packed as module
from wancli.weights.formats.gguf_header import BLOCK_SIZES
from wancli.weights.formats.packed import Packed, is_high_precision, pack_fp8

BLOCKS = [name for name, (elements, _) in BLOCK_SIZES.items() if elements > 1]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[2**19, 100], ids=["one strip", "many strips"])
def strips(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last strip of many is shorter than the others."""
    monkeypatch.setattr(module, "SLICE_ELEMENTS", request.param)
    monkeypatch.setattr(module, "SLICE_PER_THREAD", 1)


def codes(dtype: torch.dtype, rows: int = 7) -> Tensor:
    """[rows, 256]: every code of an fp8 type in every row."""
    return torch.arange(256).to(torch.uint8).repeat(rows, 1).view(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """The same numbers, zeros with their signs, and NaN where the other is NaN."""
    number = ~b.isnan()
    signs = torch.equal(a.signbit()[number], b.signbit()[number])
    return signs and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def random_blocks(name: str, count: int) -> np.ndarray:
    """Blocks [count, bytes] of random fields and integer scales, with sane half-precision scales."""
    rng = np.random.default_rng(5)
    blocks = rng.integers(0, 256, (count, BLOCK_SIZES[name][1]), dtype=np.uint8)
    halves = {"Q6_K": [208], "Q3_K": [108], "Q2_K": [80, 82]} | {
        name: [0] for name in ("Q8_0", "Q4_0", "Q5_0", "IQ4_NL", "IQ4_XS")
    }
    for at in halves.get(name, [0, 2]):
        blocks[:, at : at + 2] = rng.normal(0, 0.01, (count, 1)).astype(np.float16).view(np.uint8)
    return blocks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp8", FP8)
def test_every_fp8_code_is_the_number_torch_says(fp8: torch.dtype, dtype: torch.dtype, strips: None):
    data = codes(fp8)
    assert same(Packed("fp8", data, (7, 256)).unpack(dtype), data.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp8", FP8)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (7,), (7, 1), (7, 4, 1)])
def test_scales_per_tensor_row_and_block_are_multiplied_in_fp32(
    fp8: torch.dtype, dtype: torch.dtype, shape: tuple[int, ...], strips: None
):
    torch.manual_seed(0)
    data, scale = codes(fp8), torch.rand(shape) * 0.02 + 1e-4
    per_weight = scale.reshape(-1).repeat_interleave(7 * 256 // scale.numel()).view(7, 256)
    expected = (data.float() * per_weight).to(dtype)
    assert same(Packed("fp8", data, (7, 256), scale).unpack(dtype), expected)


def test_an_fp8_vector_needs_no_rows():
    data = codes(torch.float8_e4m3fn, 1)[0, :9]
    assert same(Packed("fp8", data, (9,)).unpack(torch.float32), data.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BLOCKS)
def test_gguf_blocks_are_the_numbers_of_the_reference(name: str, dtype: torch.dtype, strips: None):
    elements, size = BLOCK_SIZES[name]
    blocks = random_blocks(name, 3 * 5)
    expected = torch.from_numpy(gguf.dequantize(blocks, Type[name])).view(3, 5 * elements)
    assert expected.isfinite().all()
    weight = Packed(name, torch.from_numpy(blocks).view(3, 5 * size), (3, 5 * elements))
    assert torch.equal(weight.unpack(dtype), expected.to(dtype))


@pytest.mark.parametrize(
    ("name", "steps", "symmetric"),
    [("Q8_0", 127, True), ("Q5_0", 16, True), ("Q4_0", 8, True), ("Q5_1", 31, False), ("Q4_1", 15, False)],
)
def test_gguf_blocks_that_the_reference_quantized_are_a_step_from_the_weight_at_most(
    name: str, steps: int, symmetric: bool
):
    weight = np.random.default_rng(1).normal(0, 0.02, (8, 64)).astype(np.float32)
    data = torch.from_numpy(gguf.quantize(weight, Type[name]))
    again = Packed(name, data, (8, 64)).unpack(torch.float32).view(16, 32)
    blocks = torch.from_numpy(weight).view(16, 32)
    span = blocks.abs().amax(1) if symmetric else blocks.amax(1) - blocks.amin(1)
    assert ((again - blocks).abs() <= span[:, None] / steps).all()
    assert (again != blocks).any()


def test_sizes_of_blocks_are_those_of_ggml():
    assert all(gguf.GGML_QUANT_SIZES[Type[name]] == size for name, size in BLOCK_SIZES.items())


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_plain_weight_is_converted_or_comes_back_as_it_is(stored: torch.dtype, dtype: torch.dtype):
    torch.manual_seed(0)
    data = torch.randn(3, 5).to(stored)
    unpacked = Packed("plain", data, (3, 5)).unpack(dtype)
    assert torch.equal(unpacked, data.to(dtype))
    assert (unpacked.data_ptr() == data.data_ptr()) == (stored == dtype)


@pytest.mark.parametrize(
    "weight",
    [
        Packed("plain", torch.ones(4, 32), (4, 32)),
        Packed("fp8", torch.ones(4, 32).to(torch.float8_e4m3fn), (4, 32)),
        Packed("Q8_0", torch.from_numpy(gguf.quantize(np.ones((4, 32), np.float32), Type.Q8_0)), (4, 32)),
    ],
    ids=lambda weight: weight.scheme,
)
def test_out_is_filled_and_nothing_else(weight: Packed):
    around = torch.zeros(6, 32)
    out = around[1:5]
    assert weight.unpack(torch.float32, out) is out
    assert around[0].eq(0).all()
    assert around[5].eq(0).all()
    assert torch.allclose(out, torch.ones(4, 32), atol=1e-3)
    for wrong in (torch.zeros(4, 31), torch.zeros(4, 32).bfloat16(), torch.zeros(32, 4).t()):
        with pytest.raises(ValueError, match="out is"):
            weight.unpack(torch.float32, wrong)


@pytest.mark.parametrize("scale", [None, (), (7,), (7, 1), (7, 4, 1)], ids=str)
def test_a_part_of_an_fp8_weight_is_unpacked_to_the_same_rows(scale: tuple[int, ...] | None):
    torch.manual_seed(0)
    scales = None if scale is None else torch.rand(scale) + 0.5
    weight = Packed("fp8", codes(torch.float8_e4m3fn), (7, 256), scales)
    whole, part = weight.unpack(torch.float32), weight.select_rows(slice(2, 5))
    assert part.shape == (3, 256)
    assert same(part.unpack(torch.float32), whole[2:5])


@pytest.mark.parametrize("name", BLOCKS)
def test_a_part_of_gguf_blocks_is_unpacked_to_the_same_rows(name: str):
    elements, size = BLOCK_SIZES[name]
    data = torch.from_numpy(random_blocks(name, 3 * 5)).view(-1)
    for stored in (data, data.view(3, 5 * size)):
        weight = Packed(name, stored, (3, 5 * elements))
        assert torch.equal(
            weight.select_rows(slice(1, 3)).unpack(torch.float32), weight.unpack(torch.float32)[1:]
        )


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_one_nan_among_numbers_is_found(code: int):
    data = torch.zeros(5, 64, dtype=torch.uint8)
    data[3, 9] = code
    unpacked = Packed("fp8", data.view(torch.float8_e4m3fn), (5, 64)).unpack(torch.float32)
    assert unpacked[3, 9].isnan()
    assert unpacked.isnan().sum() == 1


class Largest(TorchDispatchMode):
    """The size in bytes of the largest storage that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0
        self.results: list[Tensor] = []  # kept, so that no storage is taken for another

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for x in [result] if isinstance(result, Tensor) else []:
            if x.untyped_storage().data_ptr() not in given:
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        self.results.append(result)
        return result


@pytest.mark.parametrize("name", ["fp8", *BLOCKS])
def test_unpacking_needs_slices_and_not_a_second_weight(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SLICE_ELEMENTS", 2048)
    monkeypatch.setattr(module, "SLICE_PER_THREAD", 1)
    if name == "fp8":
        weight = pack_fp8(torch.ones(64, 1024))
    else:
        count = 64 * 1024 // BLOCK_SIZES[name][0]
        weight = Packed(name, torch.from_numpy(random_blocks(name, count)), (64, 1024))
    out = torch.empty(64, 1024, dtype=torch.bfloat16)
    weight.unpack(torch.bfloat16, out)  # makes the table of Q5_0 and Q5_1, once for all
    with Largest() as largest:
        weight.unpack(torch.bfloat16, out)
    assert 0 < largest.nbytes <= 2048 * 4


def test_bytes_are_counted_with_the_scales():
    assert pack_fp8(torch.ones(4, 32)).nbytes == 4 * 32 + 4 * 4
    assert Packed("Q4_K", torch.zeros(3 * 144, dtype=torch.uint8), (3, 256)).nbytes == 432


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_takes_the_nearest_fp8_number_of_each_row(dtype: torch.dtype, strips: None):
    torch.manual_seed(2)
    weight = (torch.randn(9, 64) * torch.logspace(-4, 1, 9)[:, None]).to(dtype)
    packed = pack_fp8(weight)
    assert (packed.scheme, packed.data.dtype, packed.shape) == ("fp8", torch.float8_e4m3fn, (9, 64))
    assert packed.scale is not None
    assert torch.equal(packed.scale, weight.float().abs().amax(1, keepdim=True) / 448)
    numbers = codes(torch.float8_e4m3fn, 1)[0].float()
    numbers = numbers[numbers.isfinite()].double()
    exact = weight.double() / packed.scale.double()
    nearest = (exact[..., None] - numbers).abs().amin(-1)
    assert torch.allclose((exact - packed.data.double()).abs(), nearest, atol=1e-4)


def test_a_row_of_zeros_packs_to_zeros():
    weight = torch.zeros(2, 32)
    weight[1] = 1
    assert torch.equal(pack_fp8(weight).unpack(torch.float32), weight)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_packing_refuses_what_is_not_finite(bad: float):
    weight = torch.ones(3, 32)
    weight[1, 7] = bad
    with pytest.raises(CheckpointError, match=r"w.safetensors: the weight holds NaN or infinities"):
        pack_fp8(weight, "w.safetensors")


def test_all_but_the_matrices_of_the_blocks_are_high_precision(tiny: Path):
    """The rule of LightX2V's converter: the Linears of self_attn, cross_attn and ffn, nothing else."""
    state = load_file(tiny / "diffusion_pytorch_model.safetensors")
    matrices = {name for name, t in state.items() if name.startswith("blocks.") and t.dim() == 2}
    assert len(matrices) == 40 * 10
    assert {name for name in state if not is_high_precision(name)} == matrices
    assert all(
        is_high_precision(name) for name in ("img_emb.proj.1.weight", "blocks.0.cross_attn.norm_k_img.weight")
    )


def test_the_embeddings_and_norms_of_the_text_encoder_are_high_precision():
    config = UMT5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    with torch.device("meta"):
        state = UMT5EncoderModel(config).state_dict()
    packed = {name for name in state if not is_high_precision(name) and "embed_tokens" not in name}
    ends = ("q.weight", "k.weight", "v.weight", "o.weight", "wi_0.weight", "wi_1.weight", "wo.weight")
    assert len(packed) == 2 * 7
    assert all(name.endswith(ends) for name in packed)
