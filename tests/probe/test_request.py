"""`wancli probe` from the job to the map, and `auto:top8` from the map to the blocks of a shot."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import CAT, FISH, CommandResult, forbid_calls, rule, run_wancli, tiny_job, write_job

from wancli import progress
from wancli.engine.context import RenderContext
from wancli.engine.encode_stage import encode_prompts
from wancli.engine.networks import Networks
from wancli.errors import DoesNotFit, JobError
from wancli.injection import block_map
from wancli.injection.contexts import ContextCache
from wancli.injection.exprs import Text
from wancli.job.loader import load
from wancli.models.config import ComputeOptions
from wancli.models.dit import WanModel
from wancli.plan import memory_estimate
from wancli.plan.planner import build_plan
from wancli.plan.shot import Shot
from wancli.probe import request
from wancli.resources.memory_model import Phase
from wancli.sampling import denoise
from wancli.sampling.solvers import State
from wancli.storage import cache as store
from wancli.video import mp4

Probe = Callable[..., CommandResult]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def cache(folder: Path, warm: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for the maps, which knows the prompts."""
    own = folder / "cache"
    own.mkdir()
    (own / "embeddings").symlink_to(warm / "embeddings")
    (warm / "embeddings").mkdir(exist_ok=True, mode=0o700)
    monkeypatch.setenv("WANCLI_CACHE", str(own))
    return own


@pytest.fixture
def probe(folder: Path, quick: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> Probe:
    """Probes the tiny job with an injection on 4 blocks."""

    def run_probe(*options: str, **changes: Any) -> CommandResult:
        result = tiny_job(quick, **{"inject": [rule(blocks="1-2")]} | changes)
        return run_wancli(capsys, "probe", write_job(folder, result), "-q", *options)

    return run_probe


def document(result: CommandResult) -> dict[str, Any]:
    assert result.code == 0, result.err
    return dict(json.loads(result.out))


# ---- the map ----


def test_the_map_is_written_printed_and_stored(probe: Probe, folder: Path, cache: Path) -> None:
    result = probe("--levels", "2")
    assert (result.code, result.err) == (0, "")
    path = folder / "out" / "job.map.inject.json"
    assert result.out.splitlines()[-1] == f"map: {path}"
    assert "inject map of shot 0000: 4 blocks at 2 noise levels" in result.out
    assert "suggestion: blocks: " in result.out
    assert max(map(len, result.out.splitlines()[:-2])) <= 80
    found = block_map.read(path)
    assert found is not None
    assert [block_map.read(kept) for kept in (cache / "maps").glob("*/*.json")] == [found]
    assert (found.job, found.shot, found.size, found.frames, found.seed) == ("job", "0000", "64x64", 1, 0)
    assert (found.prompts[0].main, found.prompts[0].injected) == (CAT, FISH)
    assert [level.step for level in found.levels] == [0, 1]
    assert found.total == pytest.approx(np.mean(found.values, axis=0))
    assert found.forwards == 2 * (4 + 4 + 3 + 2 + 1) / 4
    assert found.suggestion == str(block_map.rank(found.total)[0])


def test_json_is_the_file(probe: Probe, folder: Path) -> None:
    found = document(probe("--json", "-o", str(folder / "deep" / "m.json"), "--levels", "1"))
    assert found == json.loads((folder / "deep" / "m.json").read_text())
    assert found["schema"] == "wancli/map/1"
    assert not (folder / "out" / "job.map.inject.json").exists()


def load_model(folder: Path, cache: Path) -> tuple[Shot, WanModel, ContextCache]:
    """The shot of the job, its transformer, and the contexts of its prompts."""
    (shot,) = build_plan(load(folder / "job.yaml"), cache / "hashes.json").shots
    encoded, _ = encode_prompts(
        shot.model, shot.prompts, RenderContext(store.Store(cache / "embeddings"), progress.Progress())
    )
    model = Networks(shot.model).transformer("only")
    with torch.no_grad():
        return shot, model, ContextCache(model, {id: one.embedding.rows_NE for id, one in encoded.items()})


def reference(folder: Path, cache: Path, blocks: list[int], s: float = 1.0) -> tuple[float, float]:
    """Relative change of the velocity after one plain step where blocks read the injected prompt, by whole
    forwards of the table; and the same of their outputs mixed with strength s, over s."""
    shot, model, contexts = load_model(folder, cache)
    with torch.no_grad():
        state = State(denoise.draw_noise(shot.latent_shape, shot.seed))
        plain_table = build_plan(load(folder / "plain.yaml"), cache / "hashes.json").shots[0].table
        (stage,) = shot.stages
        walk = denoise.DenoiseRun(state, shot.sigma_schedule, shot.solver, plain_table, contexts, stage)
        x_1CTYX = next(denoise.denoise(model, walk)).state.x[None]
        t = shot.sigma_schedule.timesteps[1]
        a, b = (contexts.context(Text(text.id)) for text in (shot.prompt, shot.injected[0]))
        plain = model(x_1CTYX, t, [((a, 1.0),)] * 4)
        whole = model(x_1CTYX, t, [((b if i in blocks else a, 1.0),) for i in range(4)])
        part = model(x_1CTYX, t, [((a, 1 - s), (b, s)) if i in blocks else ((a, 1.0),) for i in range(4)])
    return tuple(((v - plain).norm() / plain.norm()).item() / of for v, of in ((whole, 1), (part, s)))  # type: ignore[return-value]


def test_injecting_changes_the_velocity_as_whole_forwards_do(
    probe: Probe, folder: Path, cache: Path, quick: Path
) -> None:
    write_job(folder, tiny_job(quick), "plain.yaml")
    single, several = (
        document(probe("--json", "--levels", "2", *options))
        for options in ((), ("--ranges", "0-1,3,alternating"))
    )
    assert several["ranges"] == [[0, 1], [3], [0, 2]]
    values = [*single["values"][1], *several["values"][1]]
    for value, blocks in zip(values, [[0], [1], [2], [3], *several["ranges"]]):
        assert value == pytest.approx(reference(folder, cache, blocks)[0], rel=1e-4), blocks


def first_velocities(folder: Path, cache: Path, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The velocity of the first step, plain and with the injected prompt in a block, [C, T, Y, X]."""
    shot, model, contexts = load_model(folder, cache)
    with torch.no_grad():
        x_1CTYX = denoise.draw_noise(shot.latent_shape, shot.seed)[None]
        t = shot.sigma_schedule.timesteps[0]
        a, b = (contexts.context(Text(text.id)) for text in (shot.prompt, shot.injected[0]))
        plain = model(x_1CTYX, t, [((a, 1.0),)] * 4)
        changed = model(x_1CTYX, t, [((b if i == block else a, 1.0),) for i in range(4)])
    return plain[0].double(), changed[0].double()


def test_frames_are_measured_apart(probe: Probe, folder: Path, cache: Path) -> None:
    found = document(probe("--json", "--levels", "1", "--by", "frame", frames=5))
    assert list(found["parts"]) == ["frame 0", "frames 1-4"]
    plain, changed = first_velocities(folder, cache, 2)
    for t, values in enumerate(found["parts"].values()):
        expected = (changed - plain)[:, t].norm() / plain[:, t].norm()
        assert values[2] == pytest.approx(expected.item(), rel=1e-4)
    shown = probe("--levels", "1", "--by", "frame", frames=5).out
    assert "\n        frames 1-4  " in shown
    assert "parts have one scale, up to (" in shown


def test_a_rule_acts_more_inside_of_its_region_and_both_parts_are_the_whole(
    probe: Probe, folder: Path, cache: Path
) -> None:
    right = rule(blocks="1-2", region=[0.5, 0, 1, 1])
    found = document(probe("--json", "--levels", "1", "--by", "region", inject=[right], frames=5))
    inside, outside = found["parts"]["inside"], found["parts"]["outside"]
    assert all(a > b > 0 for a, b in zip(inside[:3], outside[:3]))
    assert outside[3] < 1e-6  # no block after the last carries it elsewhere
    plain, _ = first_velocities(folder, cache, 0)
    middle = plain.shape[-1] // 2
    for a, b, total in zip(inside, outside, found["total"]):
        squares = (a * plain[..., middle:].norm()) ** 2 + (b * plain[..., :middle].norm()) ** 2
        assert squares.sqrt().item() == pytest.approx(total * plain.norm().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--by", "region"), "no rule of shot 0000 acts in a part of the video"),
        (("--by", "frame"), "shot 0000 has a single frame"),
        (("--by", "frame", "--method", "gradient"), "gradient does not tell parts of a video apart"),
    ],
)
def test_parts_that_a_shot_does_not_have_are_refused(
    probe: Probe, options: tuple[str, ...], words: str
) -> None:
    said = probe(*options)
    assert said.code == 2
    assert f"wancli: --by: {words}" in said.err


def test_streamed_and_resident_weights_have_the_same_map(probe: Probe) -> None:
    of = [
        document(probe("--json", "--levels", "1", memory={"residency": residency}))["values"]
        for residency in ("resident", "streamed")
    ]
    assert of[0] == of[1]


def test_the_gradient_is_close_to_the_change_by_a_small_strength(
    probe: Probe, folder: Path, cache: Path, quick: Path
) -> None:
    write_job(folder, tiny_job(quick), "plain.yaml")
    values = document(probe("--json", "--levels", "2", "--method", "gradient"))["values"][1]
    for block, value in enumerate(values):  # one projection, and each token for itself: not the same number
        assert 0.3 < value / reference(folder, cache, [block], 0.05)[1] < 3


def test_skipping_a_block_is_not_injecting_into_it(probe: Probe) -> None:
    inject, skip = (document(probe("--json", "--levels", "1", "--method", m)) for m in ("inject", "skip"))
    assert skip["method"] == "skip"
    assert all(a != b > 0 for a, b in zip(inject["total"], skip["total"]))


def test_full_renders_are_scored_in_pixels_and_not_rendered_twice(
    probe: Probe, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = document(probe("--json", "--method", "render", "--ranges", "2"))
    assert (found["ranges"], found["levels"], found["values"]) == ([[0, 1], [2, 3]], [], [])
    videos = sorted((folder / "out" / "clip.map").glob("*.mp4"))
    names = ["00-plain", "01-blocks-0-1", "02-blocks-2-3"]
    assert [path.stem for path in videos] == names
    plain, *others = (
        np.stack([np.frombuffer(frame.rgb, np.uint8) for frame in mp4.read_frames(path)]).astype(float)
        for path in videos
    )
    assert found["total"] == [pytest.approx(np.abs(other - plain).mean()) for other in others]
    kinds = ["colour", "background", "motion", "structure"]
    assert [(kind, len(found["changes"][kind])) for kind in kinds] == [(kind, 2) for kind in kinds]
    assert all(value > 0 for value in found["changes"]["background"])
    forbid_calls(monkeypatch)
    again = probe("--method", "render", "--ranges", "2")
    assert document(probe("--json", "--method", "render", "--ranges", "2"))["total"] == found["total"]
    lines = again.out.splitlines()
    assert [line.split() for line in lines if line.endswith("structure")] == [["blocks", *kinds]]
    (told,) = [line for line in lines if line.startswith("changed most: ")]
    best = "0-1" if found["changes"]["colour"][0] >= found["changes"]["colour"][1] else "2-3"
    assert told.startswith(f"changed most: colour by blocks {best}, background by blocks ")
    assert max(map(len, lines[:-2])) <= 80
    suggested = f"suggestion: blocks: {found['suggestion']}"
    command = f"wancli render {folder}/job.yaml --pick 0000 --set inject.0.blocks={found['suggestion']}"
    assert lines[-3:-1] == [suggested, f"check it: {command} -o check/"]


# ---- what is asked for ----


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ([], {"inject": []}, "job: no shot injects a prompt or a picture, so there is nothing to measure"),
        (
            ["--shot", "x"],
            {},
            "--shot: no shot 'x' that injects a prompt or a picture, so there is nothing to measure",
        ),
        (["--levels", "3"], {}, "--levels: 3 is not within 1 and the 2 steps"),
        (["--levels", "0"], {}, "--levels: 0 is not within 1 and the 2 steps"),
        (["--ranges", "5"], {}, "--ranges: 4 blocks cannot be split into 5 ranges"),
        (["--ranges", "0-9"], {}, "--ranges: 9 is past the last block (3)"),
        (["-o", "/"], {}, "/: a folder has the name of an output"),
        (
            [],
            {"prompt": [CAT, FISH], "frames": 5},
            "job: the prompt of shot 0000 changes over the frames; a probe measures one prompt",
        ),
        (
            ["--method", "gradient"],
            {"memory": {"residency": "streamed"}},
            "--method: gradient is not available with streamed weights",
        ),
    ],
)
def test_a_probe_that_cannot_run_is_refused_before_anything_is_loaded(
    options: list[str],
    changes: dict[str, Any],
    message: str,
    probe: Probe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forbid_calls(monkeypatch)
    result = probe(*options, **changes)
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[0] == f"wancli: {message}"


def test_a_probe_that_does_not_fit_is_refused_with_a_way_out(
    probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_calls(monkeypatch)
    result = probe(memory={"budget": "431MiB", "residency": "resident"}, size="512x512", frames=81)
    assert result.code == 5
    assert "probing needs" in result.err
    assert "Fewer frames" in result.err


def plan_tiny_probe(folder: Path, method: block_map.Method, **changes: Any) -> request.ProbeRequest:
    job = tiny_job("wan-mini", **{"inject": [rule(blocks="1-2")]} | changes)
    return request.plan_probe(
        build_plan(load(write_job(folder, job)), folder / "memo"), method, None, None, None
    )


def test_encoding_the_prompts_needs_memory_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe_request = plan_tiny_probe(tmp_path, "inject", memory={"budget": "8GiB"})
    monkeypatch.setattr(memory_estimate, "predict_encoding", lambda *_: Phase("encode", 9 * 2**30, 0, 0))
    assert request.max_forwards_per_pass(probe_request, encoded=True) == 1
    with pytest.raises(DoesNotFit, match="probing needs 9"):
        request.max_forwards_per_pass(probe_request, encoded=False)


def test_a_gradient_keeps_a_residual_stream_for_each_block(tmp_path: Path) -> None:
    gradient, inject = (
        plan_tiny_probe(tmp_path, method, size="256x256") for method in ("gradient", "inject")
    )
    wan = gradient.shot.model.checkpoint.transformer_config
    streams = wan.num_layers * gradient.shot.tokens * wan.dim * 4
    assert (
        request.predict_phase(inject, 1).activation < streams <= request.predict_phase(gradient, 1).activation
    )


@pytest.mark.parametrize(
    ("kernels", "lacking"),
    [
        (ComputeOptions(fp8_matmul=True), "fp8 matmuls"),
        (ComputeOptions(attention="sage"), "SageAttention"),
    ],
)
def test_an_option_without_gradients_is_named(tmp_path: Path, kernels: ComputeOptions, lacking: str) -> None:
    probe_request = plan_tiny_probe(tmp_path, "gradient")
    shot = replace(probe_request.shot, model=replace(probe_request.shot.model, kernels=kernels))
    with pytest.raises(JobError, match=f"--method: gradient is not available with {lacking}"):
        request.max_forwards_per_pass(replace(probe_request, shot=shot), encoded=True)


def test_the_requested_shot_is_probed(probe: Probe) -> None:
    items = [{"id": "plain", "inject": []}, {"id": "a"}, {"id": "b", "seed": 5}]
    for options, shot, seed in (((), "a", 0), (("--shot", "b"), "b", 5)):
        found = document(probe("--json", "--levels", "1", *options, items=items, output="out/{id}.mp4"))
        assert (found["shot"], found["seed"]) == (shot, seed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stopped_probe_leaves_no_map(
    number: signal.Signals, code: int, probe: Probe, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = WanModel.read_velocity, []

    def velocity(self: WanModel, stream: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:  # of the second level
            os.kill(os.getpid(), number)
        return real(self, stream)

    monkeypatch.setattr(WanModel, "read_velocity", velocity)
    result = probe("--levels", "2")
    assert result.code == code
    assert result.err.splitlines()[0] == f"wancli: stopped by {number.name}; no map was written"
    assert not list(folder.rglob("*.map.*")) + list(folder.rglob("maps"))


# ---- auto:top8 ----


def plan_auto(
    folder: Path, quick: Path, capsys: pytest.CaptureFixture[str], *options: str, **changes: Any
) -> CommandResult:
    result = tiny_job(quick, **{"inject": [rule(blocks="auto:top2")]} | changes)
    return run_wancli(capsys, "plan", write_job(folder, result, "auto.yaml"), *options)


def test_a_job_takes_its_blocks_from_the_map(
    probe: Probe, folder: Path, quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranking = block_map.rank(document(probe("--json", "--levels", "1"))["total"])
    (top, bottom) = (sorted(ranking[:2]), sorted(ranking[2:]))
    both = ["auto:top2", *bottom], [*top, *bottom]
    for result, blocks in (("auto:top2", top), (["auto:bottom2"], bottom), both):
        auto = plan_auto(folder, quick, capsys, "--json", inject=[rule(blocks=result)])
        write_job(folder, tiny_job(quick, inject=[rule(blocks=blocks)]), "numbers.yaml")
        numbers = run_wancli(capsys, "plan", folder / "numbers.yaml", "--json")
        keys = [json.loads(one.out)["shots"][0]["key"] for one in (auto, numbers)]
        assert keys[0] == keys[1]
    verbose = plan_auto(folder, quick, capsys, "-v")
    assert verbose.err == ""
    became = f"auto:top2  is {block_map.format_blocks(top)}, by the inject map of shot 0000 of job, 20"
    assert became in verbose.out


def test_a_map_of_other_prompts_is_used_with_a_warning_that_names_it(
    probe: Probe, folder: Path, quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document(probe("--json", "--levels", "1"))
    result = plan_auto(folder, quick, capsys, prompt="A lighthouse on a cliff.")
    assert result.code == 0
    assert "auto:top2 uses the inject map of shot 0000 of job, 20" in result.err
    assert "which was measured with 'A gray tabby cat walks through" in result.err


def test_without_a_map_the_error_names_the_command_and_that_command_needs_none(
    probe: Probe, folder: Path, quick: Path, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    result = plan_auto(folder, quick, capsys)
    assert result.code == 2
    assert "inject.0.blocks: auto:top2 needs a map, and none was measured with this model" in result.err
    assert "`wancli probe JOB` measures one" in result.err
    assert probe("--levels", "1", inject=[rule(blocks="auto:top2")]).code == 0
    assert plan_auto(folder, quick, capsys).code == 0


def test_an_invalid_set_is_an_error_with_its_line(
    folder: Path, quick: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = plan_auto(folder, quick, capsys, inject=[rule(blocks="auto:top99")])
    assert result.code == 2
    assert "inject.0.blocks: 'auto:top99' is not within 1 and the model's 4 blocks" in result.err
