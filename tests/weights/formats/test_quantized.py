"""Each layout of quantized checkpoints, written by hand from the tiny weights, read back as Packed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from safetensors.torch import load_file
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel
from weight_files import save_tensors, write_gguf

from wancli.errors import CheckpointError, DoesNotFit
from wancli.weights.formats.embedded_tokenizer import read_tokenizer
from wancli.weights.formats.gguf_header import umt5_to_transformers as from_gguf
from wancli.weights.formats.key_mapping import transformer_from_diffusers, umt5_to_transformers
from wancli.weights.formats.mapped_file import map_file
from wancli.weights.formats.packed import Packed
from wancli.weights.formats.read import TEXT_ENCODER_PREFIXES, read_packed

State = dict[str, Tensor]
LAYER = "blocks.3.ffn.2"
SPIECE = Path(__file__).parents[2] / "fixtures/wan21-tiny/google/umt5-xxl/spiece.model"


@pytest.fixture(scope="module")
def original(tiny: Path) -> State:
    """Four blocks of the tiny transformer, fp32."""
    state = load_file(tiny / "diffusion_pytorch_model.safetensors")
    return {k: v for k, v in state.items() if not k.startswith("blocks.") or int(k.split(".")[1]) < 4}


def matrices(state: State) -> list[str]:
    return [name for name, tensor in state.items() if name.startswith("blocks.") and tensor.dim() == 2]


def quantized(state: State, groups: Callable[[Tensor], Tensor], dtype: torch.dtype) -> tuple[State, State]:
    """fp8 values and fp32 scales [groups, 1] of every matrix, `groups` viewing it as [groups, elements]."""
    data, scales = {}, {}
    top = torch.finfo(dtype).max
    for name in matrices(state):
        weight = groups(state[name])
        scales[name] = weight.abs().amax(1, keepdim=True) / top
        data[name] = (weight / scales[name]).to(dtype).view(state[name].shape)
    return data, scales


def is_as_good_as(found: dict[str, Packed], original: State, data: State, scales: State) -> bool:
    """Every matrix is data * scale by torch's own conversion, everything else as it was."""
    assert found.keys() == original.keys()
    for name, weight in found.items():
        unpacked = weight.unpack(torch.float32)
        assert weight.shape == original[name].shape
        if name in data:
            expected = data[name].float().view(scales[name].numel(), -1) * scales[name].view(-1, 1)
            assert torch.equal(unpacked, expected.view(original[name].shape))
            assert torch.linalg.vector_norm(unpacked - original[name]) < 0.07 * original[name].norm()
        else:
            assert weight.scheme == "plain"
            assert torch.equal(unpacked, original[name])
    return True


def layout(
    original: State,
    name: str,
    shape: Callable[[Tensor], Tensor],
    groups: Callable[[Tensor], Tensor] = lambda w: w.view(1, -1),
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> tuple[State, State, State]:
    """A state with `X.<name>` scales of some shape; its fp8 values; its scales."""
    data, scales = quantized(original, groups, dtype)
    beside = {f"{key.removesuffix('.weight')}.{name}": shape(scale) for key, scale in scales.items()}
    return original | data | beside, data, scales


def scaled(original: State, changes: dict[str, Tensor | None]) -> State:
    """ComfyUI's first layout, with tensors of LAYER replaced, added or (None) taken out."""
    state, _, _ = layout(original, "scale_weight", Tensor.flatten)
    state["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    state |= {f"{LAYER}.{name}": tensor for name, tensor in changes.items() if tensor is not None}
    return {k: v for k, v in state.items() if changes.get(k.removeprefix(f"{LAYER}."), v) is not None}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("shape", [lambda s: s.view(()), lambda s: s.view(1)])
def test_comfyui_scaled_fp8(original: State, tmp_path: Path, dtype: torch.dtype, shape: Any):
    state, data, scales = layout(original, "scale_weight", shape, dtype=dtype)
    state |= {f"{name.removesuffix('.weight')}.scale_input": torch.ones(()) for name in data}
    state["scaled_fp8"] = torch.empty(0, dtype=dtype)
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    state |= {"vae.decoder.conv1.weight": torch.ones(2), "text_encoders.umt5xxl.logit_scale": torch.ones(1)}
    assert is_as_good_as(
        read_packed([save_tensors(tmp_path / "m.safetensors", state)]), original, data, scales
    )


def test_comfyui_quant_tensors(original: State, tmp_path: Path):
    state, data, scales = layout(original, "weight_scale", lambda s: s.view(()))
    said = json.dumps({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}).encode()
    for name in data:
        layer = name.removesuffix(".weight")
        state |= {f"{layer}.comfy_quant": torch.tensor([*said], dtype=torch.uint8)}
        state |= {f"{layer}.input_scale": torch.tensor(0.3)}
    assert is_as_good_as(
        read_packed([save_tensors(tmp_path / "m.safetensors", state)]), original, data, scales
    )


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("said", [{"format": "float8_e4m3fn"}, "float8_e4m3fn"])
def test_comfyui_quantization_metadata(original: State, tmp_path: Path, prefix: str, said: object):
    """Its layer names may lack the prefix that the tensors have."""
    state, data, scales = layout(original, "weight_scale", lambda s: s.view(()))
    layers = {prefix + name.removesuffix(".weight"): said for name in data}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    path = save_tensors(tmp_path / "m.safetensors", state, metadata)
    assert is_as_good_as(read_packed([path]), original, data, scales)


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_kijai_scaled_fp8_without_a_marker(original: State, tmp_path: Path, name: str, dtype: torch.dtype):
    state, data, scales = layout(original, name, Tensor.flatten, dtype=dtype)
    assert is_as_good_as(
        read_packed([save_tensors(tmp_path / "m.safetensors", state)]), original, data, scales
    )


@pytest.mark.parametrize("shape", [lambda s: s, Tensor.flatten])
def test_lightx2v_scales_per_row(original: State, tmp_path: Path, shape: Any):
    state, data, scales = layout(original, "weight_scale", shape, lambda w: w)
    assert is_as_good_as(
        read_packed([save_tensors(tmp_path / "m.safetensors", state)]), original, data, scales
    )


def test_scales_per_block_of_a_row(original: State, tmp_path: Path):
    groups = lambda w: w.view(-1, 24)  # noqa: E731
    data, scales = quantized(original, groups, torch.float8_e4m3fn)
    state = original | data
    for name, scale in scales.items():
        state[name.removesuffix("weight") + "weight_scale"] = scale.view(len(original[name]), -1, 1)
    assert is_as_good_as(
        read_packed([save_tensors(tmp_path / "m.safetensors", state)]), original, data, scales
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_that_was_simply_cast(original: State, tmp_path: Path, dtype: torch.dtype):
    state = {name: t.to(dtype) if name in matrices(original) else t.half() for name, t in original.items()}
    found = read_packed([save_tensors(tmp_path / "m.safetensors", state)])
    assert {name: weight.scheme for name, weight in found.items()} == {
        name: "fp8" if name in matrices(original) else "plain" for name in original
    }
    assert all(torch.equal(found[name].unpack(torch.float32), t.float()) for name, t in state.items())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "model."])
def test_prefixes_are_taken_off(original: State, tmp_path: Path, prefix: str):
    path = save_tensors(
        tmp_path / "m.safetensors", {prefix + name: tensor for name, tensor in original.items()}
    )
    assert read_packed([path]).keys() == original.keys()


def test_shards_are_one_model_and_diffusers_names_are_renamed(original: State, tmp_path: Path):
    """The scale of a weight may be in another shard than the weight."""
    state, data, scales = layout(original, "weight_scale", lambda s: s, lambda w: w)
    swap = {"self_attn": "attn1", "cross_attn": "attn2", ".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v."}
    swap |= {".o.": ".to_out.0.", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2", "norm3": "norm2"}
    blocks = {}
    for name, tensor in state.items():
        if name.startswith("blocks.") and "modulation" not in name:
            for ours, theirs in swap.items():
                name = name.replace(ours, theirs)
            blocks[name] = tensor
    half = {name for name in blocks if name.endswith("weight_scale")}
    paths = [
        save_tensors(tmp_path / "1.safetensors", {name: blocks[name] for name in half}),
        save_tensors(tmp_path / "2.safetensors", {name: blocks[name] for name in blocks.keys() - half}),
    ]
    found = read_packed(paths, rename=transformer_from_diffusers)
    assert is_as_good_as(found, {name: original[name] for name in found}, data, scales)
    assert data.keys() <= found.keys()


def test_a_tensor_in_two_files_is_refused(original: State, tmp_path: Path):
    paths = [save_tensors(tmp_path / f"{i}.safetensors", original) for i in range(2)]
    with pytest.raises(CheckpointError, match=r"1.safetensors: .* is in another file too"):
        read_packed(paths)


def test_a_tensor_under_two_names_is_refused(original: State, tmp_path: Path):
    state = original | {"model.diffusion_model.head.modulation": original["head.modulation"].clone()}
    with pytest.raises(CheckpointError, match=r"m.safetensors: head.modulation has two names"):
        read_packed([save_tensors(tmp_path / "m.safetensors", state)])
    state = original | {"scale_shift_table": original["head.modulation"].clone()}
    with pytest.raises(CheckpointError, match=r"head.modulation has two names"):
        read_packed([save_tensors(tmp_path / "m.safetensors", state)], rename=transformer_from_diffusers)


def test_weights_are_mapped_and_not_read(original: State, tmp_path: Path):
    path = save_tensors(tmp_path / "m.safetensors", scaled(original, {}))
    weight = read_packed([path])[f"{LAYER}.weight"].data
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
    ranges = [[int(end, 16) for end in fields[0].split("-")] for fields in mapped]
    assert any(start <= weight.data_ptr() < stop for start, stop in ranges)


def test_what_is_written_to_a_mapped_weight_never_reaches_the_file(original: State, tmp_path: Path):
    path = save_tensors(tmp_path / "m.safetensors", original)
    before = path.read_bytes()
    read_packed([path])["head.modulation"].data.zero_()
    assert path.read_bytes() == before


def test_a_file_larger_than_the_memory_is_mapped(tmp_path: Path):
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.truncate(2**42)  # sparse: 4 TB that take no space
    assert len(map_file(path)) == 2**42


def letters(text: str) -> Tensor:
    return torch.tensor([*text.encode()], dtype=torch.uint8)


def test_a_pth_larger_than_the_memory_does_not_fit(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def load(*_: object, **__: object) -> None:
        raise RuntimeError("unable to mmap 11361920418 bytes from file <x.pth>: Cannot allocate memory (12)")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(DoesNotFit, match=r"bf16.pth: .* larger than memory"):
        read_packed([tiny / "models_t5_umt5-xxl-enc-bf16.pth"])


GOOD = torch.tensor([0.5])


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"scale_weight": None}, f"{LAYER}.weight is scaled fp8, but its scale is missing"),
        ({"scale_weight": GOOD * torch.nan}, f"{LAYER}.scale_weight holds nan, and scales are positive"),
        ({"scale_weight": GOOD * torch.inf}, f"{LAYER}.scale_weight holds inf, and"),
        ({"scale_weight": GOOD * 0}, f"{LAYER}.scale_weight holds 0, and"),
        ({"scale_weight": -GOOD}, f"{LAYER}.scale_weight holds -"),
        ({"scale_weight": torch.ones(47)}, r"\[47\], which fits no weight of \[48, 96\]"),
        ({"scale_weight": torch.ones(96)}, r"scale_weight is \[96\]"),
        ({"scale_weight": torch.ones(48, 5, 1)}, r"scale_weight is \[48, 5, 1\]"),
        ({"scale_weight": torch.ones(0)}, r"scale_weight is \[0\]"),
        ({"weight_scale": GOOD}, "appears twice"),
        ({"weight": None}, f"belongs to {LAYER}.weight, which is missing"),
        ({"weight": torch.ones(48, 96)}, f"{LAYER}.weight has a scale, but is stored as float32"),
        ({"weight": torch.ones(48, 96).to(torch.int8)}, f"{LAYER}.weight is stored as int8"),
        ({"weight": torch.ones(48, 48).byte()}, f"{LAYER}.weight is stored as .*nvfp4"),
        ({"scale_weight": torch.ones(48, 6).byte()}, f"{LAYER}.weight is stored as mxfp8"),
        ({"scale_weight": torch.ones(48, 6).to(torch.float8_e4m3fn)}, "stored as nvfp4"),
        ({"weight_scale_2": GOOD}, "stored as nvfp4"),
        ({"weight._data": torch.ones(2).to(torch.int8)}, "stored as quanto int8"),
        ({"weight._scale": GOOD}, "stored as quanto int8"),
        ({"qweight": torch.ones(2).int()}, "stored as AWQ"),
        ({"weight.absmax": GOOD}, "stored as bitsandbytes"),
        ({"ids": torch.ones(2).long()}, f"{LAYER}.ids is stored as int64"),
        ({"comfy_quant": letters("{}")}, "comfy_quant is not JSON with a format"),
        ({"comfy_quant": letters("[1]")}, "comfy_quant is not JSON with a format"),
        ({"comfy_quant": torch.tensor([255]).byte()}, "comfy_quant is not JSON with a format"),
        ({"comfy_quant": GOOD}, "comfy_quant is not JSON with a format"),
        ({"comfy_quant": letters('{"format": "mxfp8"}')}, f"{LAYER}.weight is stored as mxfp8"),
        ({"comfy_quant": letters('{"format": "int8_tensorwise"}')}, "stored as int8_tensorwise"),
        ({"comfy_quant": letters('{"format": "nvfp4"}')}, f"{LAYER}.weight is stored as nvfp4"),
        ({"comfy_quant": letters('{"format": "float8_e5m2"}')}, "is marked as float8_e5m2, but stored as"),
        ({"attn.comfy_quant": letters('{"format": "float8_e5m2"}')}, "belongs to .*attn.weight, which"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_file_and_tensor(
    original: State, tmp_path: Path, changes: dict[str, Tensor | None], what: str
):
    path = save_tensors(tmp_path / "broken.safetensors", scaled(original, changes))
    with pytest.raises(CheckpointError, match=rf"broken.safetensors: .*{what}") as caught:
        read_packed([path])
    assert caught.value.hint


@pytest.mark.parametrize(
    "said",
    ["{", "[]", '{"layers": 3}', '{"layers": {"a": {}}}', '{"layers": {"blocks.0.ffn.0": {"format": [3]}}}'],
)
def test_metadata_that_makes_no_sense_is_refused(original: State, tmp_path: Path, said: str):
    path = save_tensors(tmp_path / "broken.safetensors", original, {"_quantization_metadata": said})
    with pytest.raises(CheckpointError, match=r"broken.safetensors"):
        read_packed([path])


def test_metadata_about_other_networks_is_passed_over(original: State, tmp_path: Path):
    layers = {"layers": {"text_encoders.umt5xxl.transformer.x": {"format": "nvfp4"}}}
    path = save_tensors(tmp_path / "m.safetensors", original, {"_quantization_metadata": json.dumps(layers)})
    assert read_packed([path]).keys() == original.keys()


def test_metadata_promises_a_scale(original: State, tmp_path: Path):
    state = original | {f"{LAYER}.weight": original[f"{LAYER}.weight"].to(torch.float8_e4m3fn)}
    layers = {"layers": {LAYER: {"format": "float8_e4m3fn"}}}
    path = save_tensors(tmp_path / "m.safetensors", state, {"_quantization_metadata": json.dumps(layers)})
    with pytest.raises(CheckpointError, match=rf"{LAYER}.weight is scaled fp8, but its scale is missing"):
        read_packed([path])


def test_one_matrix_without_a_scale_among_its_like_is_refused(original: State, tmp_path: Path):
    entries = scaled(original, {"scale_weight": None})
    del entries["scaled_fp8"]
    path = save_tensors(tmp_path / "a.safetensors", entries)
    with pytest.raises(CheckpointError, match=f"{LAYER}.weight is scaled fp8, but its scale is missing"):
        read_packed([path])


def test_a_scale_of_one_beside_a_float_weight_changes_nothing(original: State, tmp_path: Path):
    path = save_tensors(tmp_path / "m.safetensors", original | {f"{LAYER}.scale_weight": torch.ones(1)})
    assert torch.equal(
        read_packed([path])[f"{LAYER}.weight"].unpack(torch.float32), original[f"{LAYER}.weight"]
    )


def write_quantized_gguf(
    path: Path, state: State, kinds: Callable[[str, Tensor], Type], arch: str = "wan"
) -> Path:
    """A GGUF file as city96's converter writes it: matrices in blocks, the rest in 16 or 32 bits."""

    def fill(writer: GGUFWriter) -> None:
        for name, tensor in state.items():
            kind = kinds(name, tensor)
            writer.add_tensor(name, gguf.quantize(tensor.float().numpy(), kind), raw_dtype=kind)

    return write_gguf(path, fill, arch)


def as_city96(name: str, tensor: Tensor) -> Type:
    if name.endswith("ffn.2.weight"):
        return Type.Q8_0
    if name.endswith("text_embedding.0.weight"):
        return Type.Q5_1
    if tensor.dim() == 1 or "modulation" in name:
        return Type.F32
    return Type.F16 if tensor.dim() == 2 else Type.BF16


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_gguf(original: State, tmp_path: Path, prefix: str):
    path = write_quantized_gguf(tmp_path / "m.gguf", {prefix + n: t for n, t in original.items()}, as_city96)
    found = read_packed([path])
    assert found.keys() == original.keys()
    for name, tensor in original.items():
        kind = as_city96(name, tensor)
        expected = gguf.dequantize(gguf.quantize(tensor.numpy(), kind), kind)
        assert found[name].scheme == (kind.name if kind in (Type.Q8_0, Type.Q5_1) else "plain")
        assert torch.equal(found[name].unpack(torch.float32), torch.from_numpy(expected.copy()))


def test_the_merged_patch_embedding_of_stable_diffusion_cpp(original: State, tmp_path: Path):
    state = dict(original)
    weight = state["patch_embedding.weight"]
    state["patch_embedding.weight"] = weight.flatten(0, 1)
    path = write_quantized_gguf(tmp_path / "m.gguf", state, lambda name, tensor: Type.F32)
    assert torch.equal(read_packed([path])["patch_embedding.weight"].unpack(torch.float32), weight)


def test_lightx2v_fp8_text_encoder_in_a_pth(tiny: Path, tmp_path: Path):
    official = torch.load(tiny / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    names = [name for name in official if ".attn." in name or ".ffn." in name]
    state = dict(official)
    for name in names:
        scale = official[name].float().abs().amax(1, keepdim=True) / 448
        state[name] = (official[name].float() / scale).to(torch.float8_e4m3fn)
        state[name.removesuffix("weight") + "weight_scale"] = scale
    torch.save(state, tmp_path / "models_t5_umt5-xxl-enc-fp8.pth")
    found = read_packed([tmp_path / "models_t5_umt5-xxl-enc-fp8.pth"], rename=umt5_to_transformers)
    assert found.keys() == {umt5_to_transformers(name) for name in official}
    for name, tensor in official.items():
        unpacked = found[umt5_to_transformers(name)].unpack(torch.float32)
        assert (
            torch.linalg.vector_norm(unpacked - tensor.float())
            <= (0.04 if name in names else 0) * tensor.norm()
        )


@pytest.fixture(scope="module")
def umt5() -> State:
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=384, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    state = UMT5EncoderModel(config).state_dict()
    return {name: tensor for name, tensor in state.items() if "embed_tokens" not in name}


@pytest.mark.parametrize("prefix", ["", "text_encoders.umt5xxl.transformer."])
def test_comfyui_text_encoder_with_its_tokenizer(umt5: State, tmp_path: Path, prefix: str):
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    fp8 = umt5[name].to(torch.float8_e4m3fn)
    state = umt5 | {name: fp8, name.replace("weight", "scale_weight"): torch.tensor(2.0)}
    state["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    state["spiece_model"] = torch.frombuffer(bytearray(SPIECE.read_bytes()), dtype=torch.uint8)
    path = save_tensors(tmp_path / "t5.safetensors", {prefix + key: tensor for key, tensor in state.items()})
    found = read_packed([path], prefixes=TEXT_ENCODER_PREFIXES)
    assert found.keys() == umt5.keys()
    assert torch.equal(found[name].unpack(torch.float32), fp8.float() * 2)
    assert read_tokenizer(path) == SPIECE.read_bytes()


def test_a_file_without_a_tokenizer_has_none(tiny: Path):
    assert read_tokenizer(tiny / "diffusion_pytorch_model.safetensors") is None
    assert read_tokenizer(tiny / "models_t5_umt5-xxl-enc-bf16.pth") is None


def test_gguf_text_encoder(umt5: State, tmp_path: Path):
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 2)
    theirs = {names.get_name(name, try_suffixes=(".weight",)): tensor for name, tensor in umt5.items()}
    path = write_quantized_gguf(
        tmp_path / "umt5-xxl-encoder-Q8_0.gguf",
        theirs,
        lambda name, tensor: Type.F32 if tensor.dim() == 1 or "attn_rel_b" in name else Type.Q8_0,
        "t5encoder",
    )
    found = read_packed([path], rename=from_gguf)
    assert found.keys() == umt5.keys()
    for name, tensor in umt5.items():
        unpacked = found[name].unpack(torch.float32)
        assert unpacked.shape == tensor.shape
        assert torch.linalg.vector_norm(unpacked - tensor) <= 0.01 * tensor.norm()


def test_a_truncated_gguf_is_refused(original: State, tmp_path: Path):
    path = write_quantized_gguf(tmp_path / "m.gguf", original, as_city96)
    shutil.copy(path, tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"cut.gguf: truncated or damaged"):
        read_packed([tmp_path / "cut.gguf"])
