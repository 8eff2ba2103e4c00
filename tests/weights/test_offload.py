"""Blocks that fetch their weights: the official numbers, the bits of resident blocks, bounded memory."""

from __future__ import annotations

import gc
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import forked
import gguf
import pytest
import torch
from oracles import relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor
from weight_files import write_gguf

from wancli.errors import CheckpointError
from wancli.models.config import WanConfig
from wancli.models.dit import Context, Request, WanModel
from wancli.weights import disk_reader
from wancli.weights.checkpoint import identify
from wancli.weights.disk_reader import keep_on_disk
from wancli.weights.formats.packed import Packed
from wancli.weights.formats.read import iterate_tensors, read_packed
from wancli.weights.loader import LoadOptions, load_into, load_transformer
from wancli.weights.offload import OffloadedBlocks, matrix_names, place_weights

ROOT = Path(__file__).parents[2]
FIXTURE = Path(__file__).parents[1] / "fixtures" / "wan21-tiny"
WEIGHTS = FIXTURE / "diffusion_pytorch_model.safetensors"
T5 = FIXTURE / "models_t5_umt5-xxl-enc-bf16.pth"
CASES = json.loads((FIXTURE / "reference.json").read_text())["cases"]
CONFIG = WanConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=5, text_dim=32, freq_dim=64)


@pytest.fixture(scope="module")
def official() -> dict[str, Tensor]:
    return load_file(FIXTURE / "reference.safetensors")


def everywhere(model: WanModel, context: Context) -> list[tuple[tuple[Context, float], ...]]:
    return [((context, 1.0),)] * len(model.blocks)


def random_weights(config: WanConfig = CONFIG) -> dict[str, Tensor]:
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = WanModel(config).state_dict()
    return {name: 0.3 * torch.randn(tensor.shape) for name, tensor in shapes.items()}


def resident(weights: Mapping[str, Tensor], config: WanConfig = CONFIG) -> WanModel:
    model = WanModel(config).eval()
    model.load_state_dict(dict(weights))
    return model


def plain(weights: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Packed]:
    return {name: Packed("plain", weights[name], weights[name].shape) for name in names}


class Watched(dict[str, Packed]):
    """A source that tells what was fetched, and where to; fetching the weight `broken` fails."""

    def __init__(self, weights: Mapping[str, Packed]) -> None:
        super().__init__(weights)
        self.log: list[tuple[str, int]] = []
        self.buffers: dict[int, int] = {}
        self.broken = ""

    def __getitem__(self, name: str) -> Watching:  # type: ignore[override]
        return Watching(self, name, super().__getitem__(name))


@dataclass(frozen=True)
class Watching:
    source: Watched
    name: str
    weight: Packed

    @property
    def shape(self) -> Sequence[int]:
        return self.weight.shape

    def unpack(self, dtype: torch.dtype, *, out: Tensor) -> Tensor:
        if self.name == self.source.broken:
            raise OSError(5, "the disk is on fire")
        self.source.log.append(("fetch", int(self.name.split(".")[1])))
        self.source.buffers[out.data_ptr()] = out.nbytes
        return self.weight.unpack(dtype, out=out)


def watched(
    weights: Mapping[str, Tensor], after_unpack: Callable[[str, Tensor], None] | None = None
) -> tuple[WanModel, Watched]:
    """A model of the weights whose blocks are streamed from a source that tells."""
    with torch.device("meta"):
        model = WanModel(CONFIG)
    away = matrix_names(model.blocks, "blocks")
    load_into(
        model,
        weights.items(),
        rename=str,
        dtype=torch.float32,
        device="cpu",
        keep_fp32=lambda _: False,
        where="",
        keep_on_meta=away,
    )
    source = Watched(plain(weights, away))
    model.blocks = OffloadedBlocks(model.blocks, "blocks", source, "cpu", after_unpack)
    for i in range(CONFIG.num_layers):
        model.blocks[i].register_forward_hook(lambda *_, i=i: source.log.append(("ran", i)))
    return model.eval(), source


def readers_alive() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("weights")]


def bound(model: WanModel) -> list[str]:
    return [name for name in matrix_names(model.blocks, "blocks") if not model.get_parameter(name).is_meta]


def velocity(model: WanModel, x_BCTYX: Tensor) -> Tensor:
    torch.manual_seed(2)
    with torch.inference_mode():
        return model(x_BCTYX, 500.0, everywhere(model, model.project(torch.randn(7, model.config.text_dim))))


X_BCTYX = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(1))


# ---- the same numbers ----


@pytest.mark.parametrize("residency", ["packed", "streamed"])
@pytest.mark.parametrize("name", ["unipc_cfg6", "dpmpp_cfg5"])
@torch.inference_mode()
def test_fetched_weights_give_the_velocities_of_the_official_code(
    name: str, residency: str, official: dict[str, Tensor]
):
    model = load_transformer(identify(FIXTURE), LoadOptions(residency=residency))  # type: ignore[arg-type]
    x, t = official[f"{name}.noise"][None], official[f"{name}.timesteps"][0]
    branches = [model.project(official[f"context.{text}"]) for text in ("main", "negative")]
    requests = [Request(x, t, everywhere(model, context)) for context in branches]
    for v_BCTYX, branch in zip(model.predict_velocities(requests), ("cond", "uncond")):
        assert relative_error(v_BCTYX[0], official[f"{name}.v_{branch}_step0"]) < 1e-5


@pytest.mark.parametrize("residency", ["packed", "streamed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_fetched_weights_give_the_bits_of_resident_ones_pass_after_pass(
    residency: str, dtype: torch.dtype, official: dict[str, Tensor]
):
    expected, found = [], []
    for where, into in (("resident", expected), (residency, found)):
        model = load_transformer(identify(FIXTURE), LoadOptions(dtype, residency=where))  # type: ignore[arg-type]
        contexts = everywhere(model, model.project(official["context.main"]))
        x = official["unipc_cfg6.noise"][None]
        into += [model(x, t, contexts) for t in (999.0, 500.0)]
        into += [y.clone() for y in model.iterate_residuals(x, 20.0, contexts)]
    assert len(expected) == 42
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@dataclass(frozen=True)
class Scaled:
    """An fp8 weight and its scale, standing for any packed format."""

    data: Tensor
    shape: Sequence[int]
    scale: float

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def select_rows(self, rows: slice) -> Scaled:
        return replace(self, data=self.data[rows], shape=self.data[rows].shape)

    def unpack(self, dtype: torch.dtype, *, out: Tensor) -> Tensor:
        return out.copy_(self.data).mul_(self.scale)


@pytest.mark.parametrize("residency", ["packed", "streamed"])
def test_packed_formats_are_unpacked_from_memory_and_from_disk(residency: str, tmp_path: Path):
    weights = random_weights()
    with torch.device("meta"):
        model = WanModel(CONFIG)
    away = matrix_names(model.blocks, "blocks")
    path = tmp_path / "fp8.safetensors"
    save_file({name: (200 * weights[name]).to(torch.float8_e4m3fn) for name in away}, path)
    mapped = {name: Scaled(data, data.shape, 0.005) for name, data in iterate_tensors([path])}
    model.load_state_dict({k: v for k, v in weights.items() if k not in away}, strict=False, assign=True)
    source = place_weights(mapped, residency, "cpu")  # type: ignore[arg-type]
    model.blocks = OffloadedBlocks(model.blocks, "blocks", source, "cpu")
    saved = load_file(path)
    expected = resident(weights | {name: 0.005 * saved[name].float() for name in away})
    assert torch.equal(velocity(model, X_BCTYX), velocity(expected, X_BCTYX))


def test_a_weight_may_be_changed_after_it_is_unpacked():
    weights = random_weights()
    down, up = torch.randn(2, 48), torch.randn(96, 2)
    name = "blocks.3.ffn.0.weight"

    def add(unpacked: str, weight: Tensor) -> None:
        if unpacked == name:
            weight.addmm_(up, down)

    model, _ = watched(weights, add)
    merged = resident(weights | {name: weights[name] + up @ down})
    for _ in range(2):  # the second pass must not add it to what the first left
        assert relative_error(velocity(model, X_BCTYX), velocity(merged, X_BCTYX)) < 1e-6
    assert relative_error(velocity(model, X_BCTYX), velocity(resident(weights), X_BCTYX)) > 1e-3


# ---- bounded memory ----


def test_two_blocks_are_in_memory_whatever_the_depth():
    model, source = watched(random_weights())
    for _ in range(3):
        velocity(model, X_BCTYX)
    matrices = 8 * 48 * 48 + 2 * 48 * 96
    assert sum(source.buffers.values()) == 2 * matrices * 4
    assert len(source.buffers) == 2 * 10
    assert not bound(model)


def test_a_block_is_fetched_while_the_one_before_runs_and_no_earlier():
    model, source = watched(random_weights())
    velocity(model, X_BCTYX)
    for block in range(2, CONFIG.num_layers):
        first_fetch = source.log.index(("fetch", block))
        assert first_fetch > source.log.index(("ran", block - 2))
    assert [block for what, block in source.log if what == "ran"] == [0, 1, 2, 3, 4]


def test_a_block_is_whole_in_its_turn_and_bare_outside():
    model, _ = watched(random_weights())
    kept = {name: tensor.data_ptr() for name, tensor in model.named_parameters() if not tensor.is_meta}
    assert any("blocks.2.modulation" in name for name in kept)
    assert any("blocks.2.ffn.0.bias" in name for name in kept)
    assert "CrossAttention" in repr(model)  # which fetches nothing
    with torch.inference_mode():
        for i, block in enumerate(model.blocks):
            names = [name for name in matrix_names(model.blocks, "blocks") if f"blocks.{i}." in name]
            assert bound(model) == names
            assert block is model.blocks[i]
    assert not bound(model)
    assert kept == {
        name: tensor.data_ptr() for name, tensor in model.named_parameters() if not tensor.is_meta
    }


@pytest.mark.parametrize(("riders", "passes"), [(None, 1), (5, 1), (2, 2), (1, 3)])
def test_requests_share_passes_over_the_weights(riders: int | None, passes: int):
    weights = random_weights()
    model, source = watched(weights)
    alone = resident(weights)
    shapes = ((1, 16, 1, 4, 4), (2, 16, 3, 2, 6), (1, 16, 2, 4, 2))
    texts = [torch.randn(count, 32) for count in (5, 1, 30)]
    with torch.inference_mode():
        xs = [torch.randn(shape) for shape in shapes]
        expected = [
            alone(x, t, everywhere(alone, alone.project(text)))
            for x, t, text in zip(xs, (1.0, 50.0, 999.0), texts)
        ]
        requests = [
            Request(x, t, everywhere(model, model.project(text)))
            for x, t, text in zip(xs, (1.0, 50.0, 999.0), texts)
        ]
        found = model.predict_velocities(requests, riders)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert source.log.count(("fetch", 0)) == 10 * passes


def test_a_checkpoint_larger_than_its_memory_runs(tmp_path: Path):
    """200 MB of weights in 24 blocks: the peak of the process grows by little more than two of them."""
    code = f"""
from dataclasses import replace
from pathlib import Path
import torch
from scripts.make_random_checkpoint import transformer_entries, write_safetensors
from wancli.resources.measure import PeakMemory
from wancli.models.config import WanConfig
from wancli.weights.checkpoint import identify
from wancli.weights.loader import LoadOptions, load_transformer

def run(checkpoint, residency):
    model = load_transformer(checkpoint, LoadOptions(torch.bfloat16, residency=residency))
    with torch.inference_mode():
        context = model.project(torch.ones(3, model.config.text_dim))
        velocity = model(torch.ones(1, 16, 1, 4, 4), 5.0, [((context, 1.0),)] * len(model.blocks))
    assert velocity.isfinite().all()

config, path = WanConfig(512, 2048, 4, 24, text_dim=64), Path({str(tmp_path / "large.safetensors")!r})
write_safetensors(path, transformer_entries(config, "bf16"))
small = identify(Path({str(FIXTURE)!r}))
large = replace(small, experts=(replace(small.experts[0], config=config, files=(path,)),))
run(small, "streamed")
for residency in ("streamed", "resident"):
    with PeakMemory() as peak:
        run(large, residency)
    print(peak.rss_peak - peak.rss_start)
"""
    done = forked.run(program=code)
    assert done.returncode == 0, done.stderr
    streamed, all_of_it = map(int, done.stdout.split())
    size = (tmp_path / "large.safetensors").stat().st_size
    assert size > 200e6
    assert all_of_it > 0.9 * size  # so the measure sees mapped weights
    assert streamed < 0.3 * size


# ---- what goes wrong ----


def test_an_error_while_fetching_comes_out_of_the_forward_with_the_weight_named():
    weights = random_weights()
    model, source = watched(weights)
    source.broken = "blocks.3.cross_attn.k.weight"
    with pytest.raises(OSError, match="on fire") as caught:
        velocity(model, X_BCTYX)
    assert caught.value.__notes__ == ["while fetching blocks.3.cross_attn.k.weight"]
    assert [block for what, block in source.log if what == "ran"] == [0, 1, 2]
    assert not readers_alive()
    assert not bound(model)
    source.broken = ""
    assert torch.equal(velocity(model, X_BCTYX), velocity(resident(weights), X_BCTYX))


@torch.inference_mode()
def test_a_loop_left_half_way_ends_its_thread_and_unbinds_its_block():
    model, _ = watched(random_weights())
    contexts = everywhere(model, model.project(torch.randn(5, 32)))
    stream = model.iterate_residuals(X_BCTYX, 500.0, contexts)
    next(stream)
    assert readers_alive()
    assert bound(model)
    stream.close()
    assert not readers_alive()
    assert not bound(model)
    with pytest.raises(ValueError, match="zip"):
        model(X_BCTYX, 500.0, contexts[:2])
    assert not readers_alive()
    model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(X_BCTYX, 500.0, contexts)
    assert not readers_alive()
    assert not bound(model)


@torch.inference_mode()
def test_two_loops_at_a_time_are_refused():
    model, _ = watched(random_weights())
    for _ in model.blocks:
        with pytest.raises(RuntimeError, match="another loop"):
            next(iter(model.blocks))
    assert len(list(model.blocks)) == 5


def test_gradients_through_fetched_weights_are_refused():
    model, _ = watched(random_weights())
    with pytest.raises(RuntimeError, match="without gradients"):
        model(X_BCTYX, 500.0, everywhere(model, model.project(torch.randn(5, 32))))


def test_a_source_of_other_shapes_is_refused():
    weights = random_weights()
    weights["blocks.1.ffn.2.weight"] = torch.zeros(48, 95)
    with torch.device("meta"):
        blocks = WanModel(CONFIG).blocks
    source = plain(weights, matrix_names(blocks, "blocks"))
    with pytest.raises(ValueError, match=r"blocks.1.ffn.2.weight is \[48, 95\], expected \[48, 96\]"):
        OffloadedBlocks(blocks, "blocks", source, "cpu")


# ---- on disk ----


@pytest.mark.parametrize("path", [WEIGHTS, T5], ids=["safetensors", "pth"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_on_disk_are_those_of_the_file(path: Path, dtype: torch.dtype):
    mapped = dict(iterate_tensors([path]))
    expected = {k: v.clone() for k, v in mapped.items()}
    found = keep_on_disk({name: Packed("plain", tensor, tensor.shape) for name, tensor in mapped.items()})
    del mapped
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        out = torch.empty(*weight.shape, dtype=dtype)
        assert weight.nbytes == expected[name].nbytes
        assert torch.equal(weight.unpack(dtype, out=out), expected[name].to(dtype))


def test_a_weight_that_is_read_in_pieces_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    path = tmp_path / "fp8.safetensors"
    scales = torch.rand(7, 1)
    save_file({"a": torch.randn(7, 30).to(torch.float8_e4m3fn)}, path)
    ((_, data),) = iterate_tensors([path])
    weight = Packed("fp8", data, (7, 30), scales)
    expected = weight.unpack(torch.float32)
    read: list[int] = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *a: (read.append(preadv(*a)), read[-1])[1])
    monkeypatch.setattr(disk_reader, "READ_CHUNK", 65)
    assert torch.equal(
        keep_on_disk({"a": weight})["a"].unpack(torch.float32, out=torch.empty(7, 30)), expected
    )
    assert read == [60, 60, 60, 30]


def test_single_rows_are_read_in_any_order():
    mapped = dict(iterate_tensors([T5]))["token_embedding.weight"]
    table = keep_on_disk({"table": Packed("plain", mapped, mapped.shape)})["table"]
    ids = [3, 383, 0, 3]
    part = table.read_rows(ids)
    assert torch.equal(part.unpack(torch.float32, out=torch.empty(4, 64)), mapped[ids].float())


def test_rows_of_blocks_of_bytes_are_cut_where_they_end(tmp_path: Path):
    """As GGUF lies in its file: one run of bytes for all rows."""
    path = tmp_path / "weights.safetensors"
    save_file({"table": torch.arange(40, dtype=torch.uint8)}, path)
    (mapped,) = (tensor for _, tensor in iterate_tensors([path]))
    part = keep_on_disk({"table": Packed("plain", mapped, (10, 16))})["table"].read_rows([7, 2])
    assert part.data.tolist() == [28, 29, 30, 31, 8, 9, 10, 11]
    assert tuple(part.shape) == (2, 16)


def test_a_file_that_was_cut_is_an_error_that_names_it_and_the_weight(tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(4000), "b": torch.ones(4000)}, path)
    found = keep_on_disk(
        {name: Packed("plain", tensor, tensor.shape) for name, tensor in iterate_tensors([path])}
    )
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 8000)
    assert found["a"].unpack(torch.float32, out=torch.empty(4000)).sum() == 4000
    with pytest.raises(CheckpointError, match=r"weights.safetensors: the file ends before b does"):
        found["b"].unpack(torch.float32, out=torch.empty(4000))


def test_a_replaced_file_is_still_read(tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(9)}, path)
    found = keep_on_disk(
        {name: Packed("plain", tensor, tensor.shape) for name, tensor in iterate_tensors([path])}
    )
    save_file({"a": torch.zeros(9)}, tmp_path / "new")
    (tmp_path / "new").replace(path)
    assert found["a"].unpack(torch.float32, out=torch.empty(9)).sum() == 9


def test_data_that_is_not_mapped_from_a_file_is_refused():
    data = torch.ones(3, 4)
    with pytest.raises(ValueError, match="x is not mapped from a file"):
        keep_on_disk({"x": Packed("plain", data, data.shape)})


def test_a_transposed_weight_of_a_pth_is_refused_by_its_name(tmp_path: Path):
    torch.save({"x": torch.ones(8, 4).T}, tmp_path / "a.pth")
    ((name, data),) = iterate_tensors([tmp_path / "a.pth"])
    with pytest.raises(CheckpointError, match="x is stored transposed"):
        keep_on_disk({name: Packed("plain", data, data.shape)})


def test_files_are_closed_with_their_weights(tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(9), "b": torch.ones(9)}, path)

    def count() -> int:
        links = (Path("/proc/self/fd") / name for name in [p.name for p in Path("/proc/self/fd").iterdir()])
        return sum(link.is_symlink() and str(link.readlink()) == str(path) for link in links)

    found = keep_on_disk(
        {name: Packed("plain", tensor, tensor.shape) for name, tensor in iterate_tensors([path])}
    )
    assert count() == 1
    del found
    gc.collect()
    assert count() == 0


# ---- on a GPU ----


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("residency", ["packed", "streamed"])
@torch.inference_mode()
def test_fetched_weights_give_the_bits_of_resident_ones_on_a_gpu(residency: str, official: dict[str, Tensor]):
    found = []
    for where in ("resident", residency):
        model = load_transformer(identify(FIXTURE), LoadOptions(torch.bfloat16, "cuda", residency=where))  # type: ignore[arg-type]
        contexts = everywhere(model, model.project(official["context.main"].cuda()))
        x = official["unipc_cfg6.noise"][None].cuda()
        found.append(torch.stack([model(x, t, contexts) for t in range(990, 0, -90)]))
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["Q5_0", "Q8_0"])
def test_a_quantized_norm_on_disk_is_what_gguf_reads(tmp_path: Path, kind: str):
    quantized = gguf.GGMLQuantizationType[kind]
    packed = gguf.quants.quantize(torch.randn(96).numpy(), quantized)
    path = write_gguf(
        tmp_path / "n.gguf", lambda writer: writer.add_tensor("norm", packed, raw_dtype=quantized)
    )
    weight = keep_on_disk(read_packed([path]))["norm"]
    expected = torch.from_numpy(gguf.quants.dequantize(packed, quantized))
    assert torch.equal(weight.unpack(torch.float32, out=torch.empty(96)), expected)
