"""The configuration chosen for a memory limit, its explanation, and the alternatives."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jobs import CAT, TINY, CommandResult, forbid_calls, run_wancli, tiny_job, words, write_job

from wancli.errors import DoesNotFit
from wancli.job.loader import load
from wancli.models.config import WanConfig
from wancli.models.variants import T2V_14B, TI2V_5B
from wancli.plan import memory_estimate, memory_policy
from wancli.plan.alternatives import alternatives, nearby_sizes
from wancli.plan.memory_policy import MemoryRequest
from wancli.plan.planner import build_plan
from wancli.plan.shot import Shot
from wancli.resources import machine

GIB = 2**30
T2V = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)


@pytest.fixture
def tiny_shot(tmp_path: Path) -> Shot:
    return build_plan(load(write_job(tmp_path, tiny_job())), tmp_path / "memo.json").shots[0]


@pytest.fixture
def large(tiny_shot: Shot) -> Shot:
    """A shot of the 14B model at 832x480x81, in bf16 from a file of fp8."""
    part = tiny_shot.model.checkpoint.experts[0]
    matrices = replace(part.precision_of("block matrices"), dtypes=(("F8_E4M3", 400),), nbytes=14_050_918_400)
    part = replace(
        part,
        config=T2V,
        precision=(replace(matrices, largest=5120 * 13824),),
        scheme=replace(part.scheme, name="fp8_scaled"),
    )
    checkpoint = replace(tiny_shot.model.checkpoint, experts=(part,), variant=T2V_14B)
    model = replace(tiny_shot.model, checkpoint=checkpoint, dtype="bf16")
    return replace(tiny_shot, model=model, width=832, height=480, frames=81)


def chosen(shot: Shot, budget: int, **said: Any) -> Shot:
    return memory_policy.choose_residency([shot], [MemoryRequest(budget=budget, **said)])[0]


def peak(shot: Shot) -> int:
    return memory_estimate.peak_of(shot.model, memory_estimate.predict_phases(shot))


def test_the_fastest_option_that_fits_is_chosen(large: Shot) -> None:
    """The weights take 26.9 GiB in bf16, 14.7 GiB as stored, and 2.8 GiB streamed."""
    found = [chosen(large, budget * GIB).model for budget in (64, 24, 8)]
    assert [model.residency for model in found] == ["resident", "packed", "streamed"]
    assert found[0].kernels.chunk is None


@pytest.mark.parametrize("budget", [64, 32, 20, 14, 8])
def test_the_chosen_option_fits_and_no_faster_one_does(large: Shot, budget: int) -> None:
    model = chosen(large, budget * GIB).model
    order = [(r, c) for r in ("resident", "packed", "streamed") for c in memory_policy.CHUNKS]
    at = order.index((model.residency, model.kernels.chunk))
    needs = [
        memory_policy.peak_bytes(
            memory_policy.with_transformer_residency(model, r, c), [large], memory_policy.TRANSFORMER_PHASES
        )
        for r, c in order
    ]
    assert needs[at] <= budget * GIB
    assert all(faster > budget * GIB for faster in needs[:at])


def test_every_kind_of_shot_counts_in_the_choice(large: Shot) -> None:
    """Without its negative a shot has one forward on a pass, and the same texts otherwise."""
    assert large.negative
    lean = replace(large, negative=None, injected=(large.negative,))
    sizes = [
        memory_policy.peak_bytes(
            memory_policy.with_transformer_residency(s.model, "streamed", None), [s], ("sample",)
        )
        for s in (large, lean)
    ]
    assert sizes[0] > sizes[1]
    for order in ([large, lean], [lean, large]):
        settled = memory_policy.choose_residency(order, [MemoryRequest("streamed", None)] * 2)[0].model
        assert (
            settled.residency_reasons
            == memory_policy.choose_residency([large], [MemoryRequest("streamed", None)])[
                0
            ].model.residency_reasons
        )


def test_models_that_run_alike_are_equal_however_that_was_chosen(large: Shot) -> None:
    said = [
        MemoryRequest("streamed", "auto", 9 * GIB),
        MemoryRequest("streamed", None, 9 * GIB),
        MemoryRequest("auto", None, 9 * GIB),
    ]
    whole, also_whole, other = (one.model for one in memory_policy.choose_residency([large] * 3, said))
    assert whole == also_whole != other  # whose text encoder is resident
    assert len(dict.fromkeys((whole, replace(whole, residency_reasons=("another reason",))))) == 1


def test_the_reason_names_what_was_too_large_and_the_budget(large: Shot) -> None:
    _, why = chosen(large, 14 * GIB).model.residency_reasons
    assert why.startswith("transformer: streamed")
    assert "(resident 3" in why
    assert why.endswith("; the budget is 14.0 GiB")


def test_settings_that_a_job_fixes_stay(large: Shot) -> None:
    model = chosen(large, 10**15, residency="streamed", chunk=512).model
    assert (model.residency, model.encoder.residency, model.kernels.chunk) == ("streamed", "streamed", 512)
    fp8 = replace(large, model=replace(large.model, dtype="fp8"))
    assert chosen(fp8, 10**15).model.residency == "packed"


def test_all_shots_of_a_model_run_alike(large: Shot) -> None:
    small = replace(large, width=256, height=256, frames=1)
    enough = memory_policy.peak_bytes(large.model, [small], memory_policy.TRANSFORMER_PHASES)
    one, two = memory_policy.choose_residency([small, large], [MemoryRequest(budget=enough)] * 2)
    assert one.model == two.model
    assert one.model.residency == "packed"
    assert chosen(small, enough).model.residency == "resident"


def test_on_cuda_the_budget_is_of_the_device_and_the_process_takes_none(
    large: Shot, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu = replace(large, model=replace(large.model, device="cuda"))
    assert memory_estimate.process_bytes(on_gpu.model) == 0
    assert chosen(on_gpu, 24 * GIB).model.residency == "packed"
    monkeypatch.setattr(machine, "cuda_free_memory", lambda: None)
    assert memory_policy.choose_residency([on_gpu], [MemoryRequest()])[0].model.residency == "resident"
    monkeypatch.setattr(machine, "cuda_free_memory", lambda: 16 * GIB)
    assert memory_policy.choose_residency([on_gpu], [MemoryRequest()])[0].model.residency == "packed"


def test_the_free_memory_of_a_gpu_is_read_from_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = SimpleNamespace(
        NVMLError=OSError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: {1: "second"}[index],
        nvmlDeviceGetMemoryInfo=lambda handle: {"second": SimpleNamespace(free=7)}[handle],
    )
    monkeypatch.setattr(machine, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert machine.cuda_free_memory() == 7


# ---- what does not fit ----


def refused(shot: Shot, budget: int, **said: Any) -> DoesNotFit:
    with pytest.raises(DoesNotFit) as caught:
        memory_policy.require(chosen(shot, budget, **said))
    return caught.value


def test_a_shot_that_does_not_fit_is_refused_with_the_nearest_size_and_length_that_do(large: Shot) -> None:
    lean = memory_policy.with_transformer_residency(large.model, "streamed", memory_policy.CHUNKS[-1])
    budget = memory_policy.peak_bytes(lean, [large], memory_policy.TRANSFORMER_PHASES) - GIB // 2
    error = refused(large, budget)
    assert str(error).startswith("shot 0000: sample needs ")
    assert ", the budget is " in str(error)
    shot = chosen(large, budget)
    smaller = memory_policy.nearest_size(shot, lambda s: peak(s) <= budget)
    shorter = memory_policy.nearest_frames(shot, lambda s: peak(s) <= budget)
    assert smaller is not None
    assert shorter is not None
    assert error.hint == (f"What fits: size: {smaller.width}x{smaller.height}, or frames: {shorter.frames}.")
    assert (smaller.width % 16, smaller.height % 16, shorter.frames % 4) == (0, 0, 1)
    assert smaller.width / smaller.height == pytest.approx(832 / 480, rel=0.1)
    memory_policy.require(smaller)
    memory_policy.require(shorter)
    with pytest.raises(DoesNotFit):
        memory_policy.require(replace(shorter, frames=shorter.frames + 4))


def test_if_nothing_fits_the_smallest_budget_is_named(large: Shot) -> None:
    hint = refused(large, GIB).hint
    least = int(hint.removeprefix("memory.budget: ").partition("MiB")[0]) * 2**20
    memory_policy.require(chosen(large, least))
    refused(large, least - 2**20)
    assert "even 1 frame of 16x16 needs 2." in hint


def test_if_streaming_would_fit_the_refusal_says_so(large: Shot) -> None:
    assert refused(large, 14 * GIB, residency="resident").hint.startswith("memory.residency: auto")


def test_cached_prompts_need_no_memory_for_the_encoder(large: Shot) -> None:
    encoder = replace(large.model.text_encoder, d_model=10**5, d_ff=10**5)
    shot = chosen(replace(large, model=replace(large.model, text_encoder=encoder)), 20 * GIB)
    memory_policy.require(shot, encoded=True)
    with pytest.raises(DoesNotFit, match="encode needs"):
        memory_policy.require(shot)


@pytest.mark.parametrize("verb", ["plan", "render"])
def test_plan_and_render_refuse_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    forbid_calls(monkeypatch)
    result = run_wancli(capsys, verb, write_job(tmp_path, tiny_job(memory={"budget": "100MiB"})))
    assert result.code == 5
    assert "shot 0000: " in result.err
    assert "the budget is 100 MiB" in result.err
    assert "memory.budget: " in result.err


def test_a_budget_that_is_not_a_size_is_an_error_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = write_job(tmp_path, tiny_job(memory={"budget": "lots"}))
    result = run_wancli(capsys, "plan", job)
    assert result.code == 2
    assert "memory.budget: 'lots' is not a size; write 500MiB or 2GiB" in result.err
    assert run_wancli(capsys, "plan", write_job(tmp_path, tiny_job()), "--memory", "x").code == 2


def test_pixels_do_not_depend_on_the_budget(render: Callable[..., CommandResult], tmp_path: Path) -> None:
    assert render(memory={"budget": "8GiB"}).code == 0
    assert "already done" in render("--json", memory={"budget": "4GiB"}).out


# ---- what else there is ----


def test_the_alternatives_are_all_valid_settings_with_their_sums(large: Shot) -> None:
    shot = chosen(large, 12 * GIB)
    ways = alternatives(shot)
    assert {(way.width, way.height) for way in ways} == {(832, 480), (640, 368), (480, 272), (320, 176)}
    assert {way.residency for way in ways if way.dtype == "fp8"} == {"packed"}
    for way in ways:
        peak = max(phase.total for phase in way.phases)
        assert way.total == memory_estimate.process_bytes(shot.model) + peak
        assert way.fits == (way.total <= 12 * GIB)
    (own,) = [way for way in ways if way.chosen]
    assert (own.dtype, own.residency, own.width) == ("bf16", shot.model.residency, 832)
    assert own.fits
    by = {(w.dtype, w.residency, w.chunk, w.width): w.total for w in ways}
    assert by["fp32", "resident", None, 832] > by["bf16", "resident", None, 832]
    assert by["bf16", "resident", None, 832] > by["bf16", "packed", None, 832]
    assert by["bf16", "packed", None, 832] > by["bf16", "streamed", None, 832]
    assert by["bf16", "streamed", None, 832] > by["bf16", "streamed", None, 480]


def test_smaller_sizes_keep_the_aspect_and_the_stride(large: Shot) -> None:
    checkpoint = replace(large.model.checkpoint, variant=TI2V_5B)
    upright = replace(large, model=replace(large.model, checkpoint=checkpoint), width=704, height=1280)
    assert nearby_sizes(upright) == [(704, 1280), (544, 960), (480, 832), (352, 640)]
    assert nearby_sizes(replace(large, width=512, height=512)) == [
        (512, 512),
        (384, 384),
        (256, 256),
        (128, 128),
    ]
    assert nearby_sizes(replace(large, width=16, height=16)) == [(16, 16)]


def test_plan_shows_the_choice_and_the_alternatives_within_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    job = write_job(tmp_path, tiny_job(prompt=words(50), negative=CAT, size="832x480", frames=81))
    result = run_wancli(capsys, "plan", job, "--memory", "4GiB")
    assert result.code == 0
    assert "transformer: resident needs " in result.out
    assert "; the budget is 4.0 GiB" in result.out
    assert "[" in next(
        line for line in result.out.splitlines() if line.startswith("fp32     resident  whole")
    )
    assert max(map(len, result.out.splitlines())) <= 80
    document = json.loads(run_wancli(capsys, "plan", job, "--memory", "4GiB", "--json").out)
    assert {row["name"] for row in document["memory"]} == {"encode", "sample", "decode"}
    for row in document["memory"]:
        assert row["peak"] == row["process"] + row["model"] + row["activation"] + row["buffer"]
    assert sum(way["chosen"] for way in document["alternatives"]) == 1
    assert all(line in " ".join(result.out.split()) for line in document["models"][0]["why"])
    assert document["models"][0]["limit"] == document["models"][0]["budget"] == 4 * GIB
    assert TINY.name in result.out
