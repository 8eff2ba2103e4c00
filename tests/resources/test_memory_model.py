from __future__ import annotations

import mmap
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bytes import most_live_bytes

from wancli.models import parameter_count, t5
from wancli.models.clip import CLIPVision
from wancli.models.config import CLIPConfig, ComputeOptions, T5Config, VAEConfig, WanConfig
from wancli.models.dit import Request, WanModel
from wancli.models.vae import WanVAE
from wancli.models.vae_layers import CausalCache
from wancli.resources import machine, measure, memory_model
from wancli.resources.measure import PeakMemory
from wancli.weights.checkpoint import identify
from wancli.weights.formats.key_mapping import umt5_to_transformers
from wancli.weights.loader import LoadOptions, load_transformer, load_umt5
from wancli.weights.offload import OffloadedBlocks

T2V_14B = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
T2V_1_3B = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
UMT5_XXL = T5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
SMALL = 100 * 2**20


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# ---- parameters ----


def test_the_published_models_have_their_published_number_of_parameters():
    assert parameter_count.wan_parameters(T2V_14B) == 14_288_491_584
    assert parameter_count.wan_parameters(T2V_1_3B) == 1_418_996_800
    assert parameter_count.t5_parameters(UMT5_XXL) == 5_680_910_336
    assert parameter_count.vae_parameters(VAEConfig()) == 126_892_531


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 99), st.integers(1, 3), st.integers(1, 48))
def test_a_transformer_of_any_size_is_counted_exactly(pairs, heads, ffn, layers, channels):
    width = 6 * pairs * heads
    config = WanConfig(width, ffn, heads, layers, in_dim=channels, out_dim=channels + 1, text_dim=7)
    with torch.device("meta"):
        assert parameter_count.wan_parameters(config) == parameters(WanModel(config))


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("in_time", [(False, True, True), (True, False, True), (True, True, True)])
def test_a_vae_of_any_size_is_counted_exactly(blocks, in_time):
    config = VAEConfig(8, 6, (1, 2, 3, 3), blocks, in_time)
    with torch.device("meta"):
        assert parameter_count.vae_parameters(config) == parameters(WanVAE(config))


def test_a_text_encoder_of_any_size_is_counted_exactly():
    config = T5Config(vocab_size=99, d_model=24, d_kv=5, d_ff=17, num_layers=3, num_heads=7, num_buckets=9)
    assert parameter_count.t5_parameters(config) == parameters(t5.build_encoder(config))


# ---- bytes of weights ----


@pytest.fixture(scope="module")
def models(tiny: Path) -> dict[tuple[str, torch.dtype], WanModel]:
    return {
        (residency, dtype): load_transformer(identify(tiny), LoadOptions(dtype, residency=residency))
        for residency in ("resident", "packed", "streamed")
        for dtype in (torch.float32, torch.bfloat16)
    }


def held(model: torch.nn.Module, blocks: torch.nn.ModuleList) -> int:
    """Bytes of the parameters that have storage, and of the buffers that blocks are fetched to."""
    buffers: dict[int, int] = {}
    if isinstance(blocks, OffloadedBlocks):
        with torch.inference_mode():
            for _ in blocks:
                buffers |= {p.data_ptr(): p.nbytes for p in model.parameters() if not p.is_meta}
    own = {p.data_ptr(): p.nbytes for p in model.parameters() if not p.is_meta}
    return sum((buffers | own).values())


@pytest.mark.parametrize(("residency", "blocks"), [("resident", None), ("packed", 2), ("streamed", 2)])
@pytest.mark.parametrize(("dtype", "element"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_bytes_of_a_loaded_transformer_are_predicted_exactly(
    models, tiny, residency, blocks, dtype, element
):
    model = models[residency, dtype]
    assert held(model, model.blocks) == memory_model.wan_bytes(
        model.config, element_bytes=element, blocks_in_memory=blocks
    )


@pytest.mark.parametrize("residency", ["resident", "streamed"])
@pytest.mark.parametrize(("dtype", "element"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_bytes_of_a_loaded_text_encoder_are_predicted_exactly(tiny, residency, dtype, element):
    files = identify(tiny).text_encoder_files
    model = load_umt5(files, umt5_to_transformers, dtype, "cpu", residency)
    config = T5Config(384, 64, 16, 128, 3, 4)
    assert held(model, model.encoder.block) == memory_model.t5_bytes(
        config, element_bytes=element, streamed=residency == "streamed"
    )


def test_the_published_models_streamed_in_bf16_need_a_tenth_of_their_weights():
    # Matrices of all blocks, and all parameters: the table of wan-formats and the sizes of UMT5-XXL.
    matrices, everything, biases = 14_050_918_400 // 40, 14_288_491_584, 40 * (9 * 5120 + 13824)
    others = everything - 40 * matrices - biases
    assert memory_model.wan_bytes(T2V_14B, element_bytes=2) == 2 * (40 * matrices + biases) + 4 * others
    assert (
        memory_model.wan_bytes(T2V_14B, element_bytes=2, blocks_in_memory=2)
        == 2 * (2 * matrices + biases) + 4 * others
    )
    assert memory_model.wan_bytes(
        T2V_14B, element_bytes=2, blocks_in_memory=2
    ) < 0.1 * memory_model.wan_bytes(T2V_14B, element_bytes=2)
    layer = 4 * 4096 * 4096 + 3 * 4096 * 10240
    assert memory_model.t5_bytes(UMT5_XXL, element_bytes=2, streamed=True) == 2 * (4_630_761_472 - 22 * layer)


@torch.no_grad()
def test_every_further_forward_of_a_pass_costs_its_residual_stream():
    config, shape = WanConfig(dim=192, ffn_dim=384, num_heads=16, num_layers=2, text_dim=8), (16, 5, 8, 8)
    model = WanModel(config)
    context = model.project(torch.randn(9, 8))
    requests = [Request(torch.randn(1, *shape), 5.0, [((context, 1.0),)] * 2) for _ in range(3)]
    model.predict_velocities(requests[:1])  # keys and values are there
    measured = [most_live_bytes(lambda n=n: model.predict_velocities(requests[:n])) for n in (1, 2, 3)]
    predicted = [
        memory_model.sample_coefficients(config, element_bytes=4)
        .phase(shape, text_rows=10, forwards_per_pass=n)
        .activation
        for n in (1, 2, 3)
    ]
    time = 7 * config.dim * 4  # its embedding, which is no matter of tokens
    assert measured[1] - measured[0] == predicted[1] - predicted[0] + time
    assert measured[2] - measured[1] == predicted[2] - predicted[1] + time


@torch.no_grad()
def test_tokens_in_chunks_take_the_predicted_memory():
    config, context_rows = WanConfig(dim=192, ffn_dim=1152, num_heads=8, num_layers=2, text_dim=8), 10

    def peak(rows: int, chunk: int | None) -> tuple[int, int]:
        shape = (16, 4, rows, 32)
        model = WanModel(config, ComputeOptions(chunk=chunk))
        context = model.project(torch.randn(context_rows - 1, 8))
        request = Request(torch.randn(1, *shape), 5.0, [((context, 1.0),)] * 2)
        model.predict_velocities([request])  # keys and values are there
        return most_live_bytes(lambda: model.predict_velocities([request])), memory_model.sample_coefficients(
            config, element_bytes=4
        ).phase(shape, text_rows=context_rows, chunk=chunk).activation

    (few, few_said), (more, more_said) = peak(16, 128), peak(16, 256)
    assert more - few == more_said - few_said
    (long, long_said), rotary = peak(32, 128), 512 * config.head_dim * 4
    assert long - few == long_said - few_said + rotary
    whole, whole_said = peak(32, None)
    assert long < whole / 2
    assert long_said < whole_said / 2
    assert memory_model.sample_coefficients(config, element_bytes=4).phase(
        (16, 4, 32, 32), text_rows=10, chunk=1024
    ) == memory_model.sample_coefficients(config, element_bytes=4).phase((16, 4, 32, 32), text_rows=10)


# ---- prediction ----


@pytest.mark.parametrize("in_strips", [True, False])
def test_the_history_that_a_decoder_keeps_is_predicted(in_strips):
    config, stream = VAEConfig(8, 16, (1, 2, 4, 4)), CausalCache()
    vae = WanVAE(config)
    with torch.set_grad_enabled(not in_strips):
        for latent in torch.randn(3, 16, 1, 6, 4):
            vae.decode_chunk(latent, stream)
    kept = sum(past.nbytes for past in stream.frames.values())
    predicted = memory_model.decode_coefficients(config).phase((16, 3, 6, 4), chunk=1).buffer
    assert 0.88 * predicted < kept <= predicted


def test_the_keys_and_values_that_contexts_keep_are_predicted():
    config = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=3, text_dim=8)
    model = WanModel(config).requires_grad_(False)
    with torch.no_grad():
        context = model.project(torch.randn(9, 8))
        model(torch.randn(1, 16, 1, 4, 4), 500.0, [((context, 1.0),)] * 3)
    kept = sum(x.nbytes for pair in context.kv.values() for x in pair)
    without = memory_model.sample_coefficients(config, element_bytes=4).phase((16, 1, 4, 4), text_rows=0)
    with_context = memory_model.sample_coefficients(config, element_bytes=4).phase(
        (16, 1, 4, 4), text_rows=10
    )
    assert with_context.buffer - without.buffer == kept


@pytest.mark.parametrize("pictures", [1, 2])
@torch.no_grad()
def test_the_working_set_of_clip_is_predicted(pictures):
    config = CLIPConfig(dim=320, num_heads=4, num_layers=4, mlp_dim=1280)
    clip = CLIPVision(config)
    predicted = memory_model.clip_phase(config, pictures=pictures, element_bytes=4)
    measured = most_live_bytes(lambda: clip(torch.randn(pictures, 3, 224, 224)))
    assert measured == pytest.approx(predicted.activation, rel=0.02)
    assert predicted.model == sum(weight.nbytes for weight in clip.parameters())


def test_memory_of_sampling_grows_with_the_tokens_not_with_their_square():
    small = memory_model.sample_coefficients(T2V_14B, element_bytes=2).phase((16, 21, 60, 104), text_rows=130)
    large = memory_model.sample_coefficients(T2V_14B, element_bytes=2).phase(
        (16, 21, 120, 208), text_rows=130
    )
    assert large.activation == 4 * small.activation
    assert large.model == small.model == memory_model.wan_bytes(T2V_14B, element_bytes=2)
    assert small.total == small.model + small.activation + small.buffer


def test_memory_of_decoding_does_not_depend_on_the_length_of_the_clip():
    clips = [
        memory_model.decode_coefficients(VAEConfig()).phase((16, t, 60, 104), chunk=1) for t in (3, 21, 1000)
    ]
    assert clips[0] == clips[1] == clips[2]
    assert (
        memory_model.decode_coefficients(VAEConfig()).phase((16, 1, 60, 104), chunk=1).activation
        < clips[0].activation
    )


def test_chunks_save_all_memory_per_token_except_residual_keys_and_values():
    latent = (16, 21, 60, 104)
    whole, some, few = (
        memory_model.sample_coefficients(T2V_14B, element_bytes=2)
        .phase(latent, text_rows=1, chunk=chunk)
        .activation
        for chunk in (None, 4096, 1024)
    )
    assert 0.4 * whole < few < some < whole
    assert (
        memory_model.sample_coefficients(T2V_14B, element_bytes=2)
        .phase(latent, text_rows=1, chunk=10**6)
        .activation
        == whole
    )


def test_a_mapped_vae_is_its_decoder_twice():
    read, mapped = (
        memory_model.decode_coefficients(VAEConfig(), mapped=m).phase((16, 3, 6, 4), chunk=1).model
        for m in (0, 1)
    )
    assert (read, mapped) == (4 * 126_892_531, 8 * parameters(WanVAE(VAEConfig()).decoder) + 8 * 272)


def test_what_stays_loaded_counts_in_the_phase():
    alone = memory_model.decode_coefficients(VAEConfig()).phase((16, 3, 60, 104), chunk=1)
    beside = memory_model.decode_coefficients(VAEConfig()).phase(
        (16, 3, 60, 104), chunk=1, resident_bytes=10**9
    )
    assert beside.total - alone.total == 10**9


def test_the_text_encoder_is_as_large_as_its_precision_makes_it():
    assert (
        memory_model.encode_coefficients(UMT5_XXL, element_bytes=2).phase(tokens=100).model == 11_361_820_672
    )
    short, long = (
        memory_model.encode_coefficients(UMT5_XXL, element_bytes=2).phase(tokens=n) for n in (10, 500)
    )
    assert short.activation < long.activation < 10**9


def test_pages_of_files_are_not_counted_twice():
    memory = psutil.Process().memory_info()
    assert 0 < machine.process_memory() < memory.rss


# ---- measurement ----


def fresh_pages(size: int) -> mmap.mmap:
    """Memory straight from the kernel: what malloc hands out may have been this process's before."""
    block = mmap.mmap(-1, size)
    for start in range(0, size, mmap.PAGESIZE):
        block[start] = 1
    return block


def test_the_peak_of_a_block_is_seen_after_it_is_freed():
    with PeakMemory() as taken:
        block = fresh_pages(SMALL)
        block.close()
    assert 0.95 * SMALL < taken.rss_peak - taken.rss_start < 2 * SMALL
    assert taken.seconds > 0


def test_a_peak_before_the_block_does_not_count():
    fresh_pages(2 * SMALL).close()
    with PeakMemory() as taken:
        pass
    assert taken.rss_peak - taken.rss_start < SMALL


def test_the_peak_is_sampled_if_the_kernel_has_no_mark(monkeypatch):
    monkeypatch.setattr(measure, "_reset_high_water", lambda: False)
    with PeakMemory() as taken:
        block = fresh_pages(SMALL)
        deadline = time.monotonic() + 60
        while taken._sampler.peak < taken.rss_start + 0.95 * SMALL and time.monotonic() < deadline:
            time.sleep(0.01)
        block.close()
    assert 0.95 * SMALL < taken.rss_peak - taken.rss_start < 2 * SMALL
    assert not taken._sampler.is_alive()


def test_the_peak_of_the_gpu_is_what_torch_allocated(monkeypatch):
    calls = []
    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        reset_peak_memory_stats=lambda: calls.append("reset"),
        max_memory_allocated=lambda: 12345,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    with PeakMemory() as taken:
        assert calls == ["reset"]
    assert taken.cuda_peak == 12345


def test_without_a_gpu_there_is_no_peak_of_one(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    with PeakMemory() as taken:
        pass
    assert taken.cuda_peak is None


def test_what_touches_disk_and_terminal_loads_without_torch_and_numpy():
    code = """
import sys
from wancli import progress
from wancli.resources import memory_model
from wancli.storage import atomic, cache, manifest
from wancli.video import mp4
wan = memory_model.WanConfig(96, 96, 4, 1)
memory_model.sample_coefficients(wan, element_bytes=4).phase((16, 1, 4, 4), text_rows=1)
progress.create_progress(sys.stderr)
sys.exit(" ".join({"torch", "numpy", "rich", "transformers", "imageio_ffmpeg"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stderr, done.returncode) == ("\n", 1)  # sys.exit("") prints the empty list of culprits
