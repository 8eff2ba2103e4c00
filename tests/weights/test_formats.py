"""Checkpoints in every format that wancli reads, rendered from the command line.

Each file is written here from the fixture's weights, as the programs that make such files do. The
oracle is a plain fp32 checkpoint of what the format's definition makes of the same bytes: torch's
casts and products, gguf's own dequantization. Both must give the same latents, bit for bit,
wherever the weights live.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from jobs import KEPT, SPIECE, T5, TRANSFORMER, VAE, CommandResult, latents_of, manifest_of, rule
from safetensors.torch import load_file, save_file
from torch import Tensor
from weight_files import add_t5_tokenizer, finish_gguf

from wancli.job.loader import load
from wancli.models.config import WanConfig
from wancli.models.dit import WanModel
from wancli.plan import memory_policy
from wancli.plan.memory_estimate import predict_phases
from wancli.plan.planner import build_plan
from wancli.resources.memory_model import PROCESS
from wancli.weights.checkpoint import identify
from wancli.weights.loader import load_vae
from wancli.weights.single_files import SingleFiles

State = dict[str, Tensor]
Format = Callable[[State], tuple[State, State]]
MATRIX = re.compile(r"blocks\.\d+\.(self_attn\.[qkvo]|cross_attn\.[qkvo]|ffn\.[02])\.weight")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def cast(dtype: torch.dtype) -> Format:
    """Every matrix in fewer bits, without scales."""

    def stored(state: State) -> tuple[State, State]:
        small = {name: w.to(dtype) if MATRIX.fullmatch(name) else w for name, w in state.items()}
        return small, {name: w.float() for name, w in small.items()}

    return stored


def scaled(
    key: str, per: Callable[[Tensor], Tensor], extra: Callable[[str], State], prefix: str = ""
) -> Format:
    """fp8 with a scale beside each matrix; `per` is the largest value of each group of weights."""

    def stored(state: State) -> tuple[State, State]:
        small, plain = {}, dict(state)
        for name, w in state.items():
            if not MATRIX.fullmatch(name):
                small[name] = w
                continue
            scale = per(w) / 448
            groups = w.view(len(w), scale.shape[1], -1) if scale.dim() == 3 else w
            q = (groups / scale).clamp(-448, 448).to(E4M3)
            plain[name] = (q.float() * scale).view(w.shape)
            small[name] = q.view(w.shape)
            small[name.replace("weight", key)] = scale
            small |= extra(name.removesuffix(".weight"))
        return {prefix + name: w for name, w in small.items()}, plain

    return stored


def comfy_quant(layer: str) -> State:
    said = json.dumps({"format": "float8_e4m3fn"}).encode()
    return {f"{layer}.comfy_quant": torch.tensor(list(said), dtype=torch.uint8)}


def marker(_: str) -> State:
    return {"scaled_fp8": torch.zeros(0, dtype=E4M3)}


def nothing(_: str) -> State:
    return {}


def whole(w: Tensor) -> Tensor:
    return w.abs().max()


def rows(w: Tensor) -> Tensor:
    return w.abs().amax(1, keepdim=True)


def halves(w: Tensor) -> Tensor:
    return w.view(len(w), 2, -1).abs().amax(2, keepdim=True)


FORMATS: dict[str, tuple[Format, float]] = {
    "bf16": (cast(torch.bfloat16), 0.01),
    "fp16": (cast(torch.float16), 0.002),
    "fp8 e4m3": (cast(E4M3), 0.1),
    "fp8 e5m2": (cast(E5M2), 0.2),
    "ComfyUI fp8_scaled": (scaled("scale_weight", whole, marker, "model.diffusion_model."), 0.1),
    "ComfyUI comfy_quant": (scaled("weight_scale", whole, comfy_quant), 0.1),
    "LightX2V, a scale per row": (scaled("weight_scale", rows, nothing), 0.1),
    "a scale per block": (scaled("weight_scale", halves, nothing), 0.1),
}


def around(model: Path, **files: Any) -> dict[str, Any]:
    """A model of named files: those of a checkpoint folder but for some."""
    whole = {
        "text_encoder": model / T5,
        "tokenizer": SPIECE,
        "vae": model / VAE,
        "transformer": model / TRANSFORMER,
    }
    named = {key: str(path) for key, path in (whole | files).items() if path}
    return named | {"heads": 2}


@pytest.fixture(scope="module")
def rendered() -> State:
    """Latents that tests of this module share."""
    return {}


@pytest.mark.parametrize("name", FORMATS)
def test_a_transformer_in_each_format_renders_what_its_bytes_mean(
    name: str, render: Callable[..., CommandResult], shallow: Path, tmp_path: Path, rendered: State
) -> None:
    stored, bound = FORMATS[name]
    state = load_file(shallow / TRANSFORMER)
    small, plain = stored(state)
    save_file(small, tmp_path / "small.safetensors")
    save_file(plain, tmp_path / "plain.safetensors")
    latents = rendered  # that of fp32 is the same for all formats
    for case, file, residency in (
        *((("fp32", shallow / TRANSFORMER, "resident"),) if "fp32" not in rendered else ()),
        ("meant", tmp_path / "plain.safetensors", "resident"),
        ("resident", tmp_path / "small.safetensors", "resident"),
        ("packed", tmp_path / "small.safetensors", "packed"),
        ("streamed", tmp_path / "small.safetensors", "streamed"),
    ):
        model = around(shallow, transformer=file)
        result = render(folder=tmp_path / case, model=model, video=KEPT, memory={"residency": residency})
        assert result.code == 0, result.err
        assert manifest_of(tmp_path / case)["model"]["residency"] == residency
        latents[case] = latents_of(tmp_path / case)
    for residency in ("resident", "packed", "streamed"):
        assert torch.equal(latents[residency], latents["meant"]), residency
    error = torch.linalg.vector_norm(latents["meant"] - latents["fp32"]) / latents["fp32"].norm()
    assert 0 < error < bound


def test_fp8_made_at_load_is_a_file_of_fp8_with_a_scale_per_row(
    render: Callable[..., CommandResult], shallow: Path, tmp_path: Path
) -> None:
    small, _ = FORMATS["LightX2V, a scale per row"][0](load_file(shallow / TRANSFORMER))
    save_file(small, tmp_path / "small.safetensors")
    assert render(folder=tmp_path / "made", video=KEPT, memory={"dtype": "fp8"}).code == 0
    model = around(shallow, transformer=tmp_path / "small.safetensors")
    assert render(folder=tmp_path / "stored", model=model, video=KEPT).code == 0
    assert torch.equal(latents_of(tmp_path / "made"), latents_of(tmp_path / "stored"))
    said = manifest_of(tmp_path / "made")["model"]
    assert (said["dtype"], said["residency"]) == ("fp8", "packed")
    refused = render(memory={"dtype": "fp8", "residency": "streamed"})
    assert (refused.code, "memory.residency: streamed weights cannot be converted to fp8" in refused.err) == (
        2,
        True,
    )


# ---- GGUF ----


def blocks_of(kind: Type, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Random GGUF blocks [out, bytes] whose scales make weights of a usual size."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (shape[0], shape[1] // elements, size), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.0002).tobytes(), np.uint8)
    for at in {Type.Q8_0: (0,), Type.Q4_K: (0, 2), Type.Q6_K: (208,)}[kind]:
        data[:, :, at : at + 2] = scale
    return data.reshape(shape[0], -1)


@pytest.mark.parametrize("residency", ["resident", "packed", "streamed"])
def test_a_gguf_of_several_types_renders_what_its_blocks_mean(
    residency: str, render: Callable[..., CommandResult], shallow: Path, tmp_path: Path
) -> None:
    config = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=64, freq_dim=64)
    torch.manual_seed(1)
    shapes = {name: tuple(p.shape) for name, p in WanModel(config).state_dict().items()}
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(tmp_path / "wan.gguf", "wan")
    plain: State = {}
    for name, shape in shapes.items():
        if MATRIX.fullmatch(name):
            kind = Type.Q8_0 if "self" in name else Type.Q4_K if "cross" in name else Type.Q6_K
            blocks = blocks_of(kind, shape, rng)
            writer.add_tensor(name, blocks, raw_dtype=kind)
            plain[name] = torch.from_numpy(gguf.quants.dequantize(blocks, kind).copy())
        else:
            dtype = np.float16 if name == "patch_embedding.weight" else np.float32
            numbers = (0.05 * rng.normal(size=shape) + ("norm" in name)).astype(dtype)
            writer.add_tensor(name, numbers)
            plain[name] = torch.from_numpy(numbers.astype(np.float32))
    finish_gguf(writer)
    save_file(plain, tmp_path / "plain.safetensors")
    for case, file, where in (("meant", "plain.safetensors", "resident"), ("gguf", "wan.gguf", residency)):
        model = around(shallow, transformer=tmp_path / file)
        result = render(folder=tmp_path / case, model=model, video=KEPT, memory={"residency": where})
        assert result.code == 0, result.err
    assert torch.equal(latents_of(tmp_path / "gguf"), latents_of(tmp_path / "meant"))


# ---- text encoder and VAE ----


@pytest.mark.parametrize("residency", ["resident", "streamed"])
def test_a_text_encoder_in_fp8_that_carries_its_tokenizer_and_a_vae_in_bf16_render(
    residency: str, render: Callable[..., CommandResult], shallow: Path, tmp_path: Path
) -> None:
    """As ComfyUI's umt5_xxl_fp8_e4m3fn_scaled and wan_2.1_vae are."""
    text, video = (torch.load(shallow / name, weights_only=True) for name in (T5, VAE))
    small: State = {"spiece_model": torch.tensor(list(SPIECE.read_bytes()), dtype=torch.uint8)}
    small["scaled_fp8"] = torch.zeros(2, dtype=E4M3)
    plain: State = {}
    for name, w in text.items():
        small[name] = plain[name] = w.float()
        if re.fullmatch(r"blocks\.\d+\.(attn\.[qkvo]|ffn\.(gate\.0|fc\d))\.weight", name):
            scale = w.float().abs().max() / 448
            small[name] = (w.float() / scale).to(E4M3)
            small[name.replace("weight", "scale_weight")] = scale
            plain[name] = small[name].float() * scale
    save_file(small, tmp_path / "text.safetensors")
    save_file(plain, tmp_path / "plain text.safetensors")
    save_file(
        {name: w.to(torch.bfloat16).contiguous() for name, w in video.items()}, tmp_path / "vae.safetensors"
    )
    vae = tmp_path / "vae.safetensors"
    meant = around(shallow, text_encoder=tmp_path / "plain text.safetensors", vae=vae)
    found = around(shallow, text_encoder=tmp_path / "text.safetensors", tokenizer=None, vae=vae)
    assert render(folder=tmp_path / "meant", model=meant, video=KEPT).code == 0
    result = render(folder=tmp_path / "found", model=found, video=KEPT, memory={"residency": residency})
    assert result.code == 0, result.err
    assert torch.equal(latents_of(tmp_path / "found"), latents_of(tmp_path / "meant"))


CONVOLUTION = re.compile(r".*(conv\d|time_conv|shortcut|residual\.[26]|head\.2|resample\.1)\.weight")


def a_vae_of(model: Path, kind: str, path: Path) -> State:
    """Writes the VAE with its convolutions in fp8 or all of it in 16 bits, and returns what that means."""
    state = {name: w.float() for name, w in torch.load(model / VAE, weights_only=True).items()}
    if kind.startswith("GGUF"):
        dtype = {"GGUF F16": np.float16, "GGUF F32": np.float32}[kind]
        writer = gguf.GGUFWriter(path, "pig")
        for name, w in state.items():
            writer.add_tensor(name, w.numpy().astype(dtype))
        finish_gguf(writer)
        return {name: torch.from_numpy(w.numpy().astype(dtype)).float() for name, w in state.items()}
    stored, plain = {}, dict(state)
    for name, w in state.items():
        if not CONVOLUTION.fullmatch(name):
            stored[name] = w
            continue
        scale = w.abs().max() / 448 if kind == "fp8 scaled" else torch.tensor(1.0)
        stored[name] = (w / scale).to(E5M2 if kind == "fp8 e5m2" else E4M3)
        plain[name] = stored[name].float() * scale
        if kind == "fp8 scaled":
            stored[name.replace("weight", "scale_weight")] = scale
    save_file({name: w.contiguous() for name, w in stored.items()}, path)
    return plain


@pytest.mark.parametrize("kind", ["fp8 e4m3", "fp8 e5m2", "fp8 scaled", "GGUF F16", "GGUF F32"])
def test_a_vae_in_each_format_decodes_what_its_bytes_mean(
    kind: str, render: Callable[..., CommandResult], shallow: Path, tmp_path: Path
) -> None:
    stored = tmp_path / ("vae.gguf" if kind.startswith("GGUF") else "vae.safetensors")
    plain = a_vae_of(shallow, kind, stored)
    result = render(folder=tmp_path, model=around(shallow, vae=stored))
    assert result.code == 0, result.err
    files = {
        key: value if key == "heads" else Path(value) for key, value in around(shallow, vae=stored).items()
    }
    found = load_vae(identify(SingleFiles(**files)), "cpu").state_dict()
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], w) for name, w in plain.items())


def test_an_input_scale_is_for_products_in_fp8_and_changes_nothing(
    render: Callable[..., CommandResult], shallow: Path, tmp_path: Path
) -> None:
    small, _ = FORMATS["ComfyUI comfy_quant"][0](load_file(shallow / TRANSFORMER))
    save_file(small, tmp_path / "without.safetensors")
    inputs = {
        name.replace("weight_scale", "input_scale"): torch.tensor(3.0)
        for name in small
        if name.endswith(".weight_scale")
    }
    save_file(small | inputs, tmp_path / "with.safetensors")
    for case in ("with", "without"):
        model = around(shallow, transformer=tmp_path / f"{case}.safetensors")
        assert render(folder=tmp_path / case, model=model, video=KEPT).code == 0
    assert torch.equal(latents_of(tmp_path / "with"), latents_of(tmp_path / "without"))


GGUF_WORDS = {
    "token_embedding": "token_embd",
    "norm": "enc.output_norm",
    "norm1": "attn_norm",
    "norm2": "ffn_norm",
    "pos_embedding.embedding": "attn_rel_b",
    "ffn.gate.0": "ffn_gate",
    "ffn.fc1": "ffn_up",
    "ffn.fc2": "ffn_down",
    **{f"attn.{p}": f"attn_{p}" for p in "qkvo"},
}


@pytest.mark.parametrize("residency", ["resident", "streamed"])
def test_a_text_encoder_in_gguf_that_carries_its_tokenizer_renders(
    residency: str, render: Callable[..., CommandResult], shallow: Path, tmp_path: Path
) -> None:
    """As city96's umt5-xxl-encoder-Q8_0 is."""
    writer = gguf.GGUFWriter(tmp_path / "text.gguf", "t5encoder")
    add_t5_tokenizer(writer)
    plain: State = {}
    for name, w in torch.load(shallow / T5, weights_only=True).items():
        layer = name.removesuffix(".weight")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", layer)
        written = f"enc.blk.{block[1]}.{GGUF_WORDS[block[2]]}" if block else GGUF_WORDS[layer]
        numbers = w.float().numpy()
        if "norm" in name or "pos_embedding" in name:
            writer.add_tensor(f"{written}.weight", numbers)
            plain[name] = w.float()
        else:
            blocks = gguf.quants.quantize(numbers, Type.Q8_0)
            writer.add_tensor(f"{written}.weight", blocks, raw_dtype=Type.Q8_0)
            plain[name] = torch.from_numpy(gguf.quants.dequantize(blocks, Type.Q8_0).copy())
    finish_gguf(writer)
    save_file(plain, tmp_path / "plain.safetensors")
    meant = around(shallow, text_encoder=tmp_path / "plain.safetensors")
    found = around(shallow, text_encoder=tmp_path / "text.gguf", tokenizer=None)
    assert render(folder=tmp_path / "meant", model=meant, video=KEPT).code == 0
    result = render(folder=tmp_path / "found", model=found, video=KEPT, memory={"residency": residency})
    assert result.code == 0, result.err
    assert torch.equal(latents_of(tmp_path / "found"), latents_of(tmp_path / "meant"))


# ---- where weights live is decided ----


def test_injections_are_read_and_measured_on_streamed_blocks_as_on_resident_ones(
    render: Callable[..., CommandResult], tmp_path: Path
) -> None:
    rules = [rule(blocks="2-3"), rule(blocks="0-1", branch="both", blend="output-mix")]
    bodies = []
    for residency in ("resident", "streamed"):
        folder = tmp_path / residency
        changes = {"inject": rules, "measure": True, "video": KEPT, "memory": {"residency": residency}}
        assert render(folder=folder, **changes).code == 0
        bodies.append(manifest_of(folder))
    assert torch.equal(latents_of(tmp_path / "streamed"), latents_of(tmp_path / "resident"))
    assert bodies[0]["effects"] == bodies[1]["effects"] != []
    assert bodies[0]["injection"] == bodies[1]["injection"]
    assert bodies[0]["key"] == bodies[1]["key"]


def test_auto_is_resident_if_all_shots_fit_and_streamed_if_one_does_not(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "job.yaml"
    items = [{"size": "64x64"}, {"size": "128x64"}]
    job = {"model": str(tiny), "prompt": "a cat", "frames": 1, "output": "{item}.mp4", "items": items}
    path.write_text(json.dumps(job))

    def decided(free: int) -> list[tuple[str, str]]:
        monkeypatch.setattr(memory_policy, "read_free_memory", lambda _: PROCESS + free)
        shots = build_plan(load(path), tmp_path / "memo.json").shots
        return [(shot.model.residency, shot.model.encoder.residency) for shot in shots]

    assert decided(2**40) == [("resident", "resident")] * 2
    (small, large) = (predict_phases(shot) for shot in build_plan(load(path), tmp_path / "memo.json").shots)
    needs = {phase.name: phase.total for phase in large}
    assert small[1].total < needs["sample"]
    assert decided(needs["sample"] - 1)[0][0] == decided(needs["sample"] - 1)[1][0] == "streamed"
    encoders = decided(small[0].total - 1)
    assert [text for _, text in encoders] == ["streamed"] * 2
