"""`steer`: what blocks read is moved toward some prompts and away from others, from the job to the manifest
and back.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import CAT, CommandResult, latents_of, manifest_of, rule, run_wancli, tiny_job, write_job
from oracles import relative_error
from torch import Tensor

from wancli.engine.networks import Networks
from wancli.engine.output_diff import describe_record
from wancli.errors import JobError
from wancli.injection.area import Area
from wancli.injection.exprs import Lerp, Steer, Text
from wancli.job.loader import load
from wancli.models.dit import WanModel
from wancli.models.text_context import Context
from wancli.plan import planner as planning
from wancli.plan.render_plan import Plan
from wancli.plan.shot import Shot
from wancli.report.html.rerun_job import build_job
from wancli.report.shot_text import format_shot
from wancli.sampling.denoise import draw_noise
from wancli.sampling.solvers import build_sigma_schedule
from wancli.storage import manifest
from wancli.text.embedding import unpack


@pytest.fixture
def decide(tmp_path: Path, warm: Path) -> Callable[..., Plan]:
    return lambda **keys: planning.build_plan(
        load(write_job(tmp_path, tiny_job(**keys))), warm / "hashes.json"
    )


@pytest.fixture
def shot(decide: Callable[..., Plan]) -> Callable[..., Shot]:
    return lambda **keys: decide(**keys).shots[0]


def test_the_vector_is_added_in_the_cells_of_the_entry(shot: Callable[..., Shot]) -> None:
    entry = {"toward": ["day", "sun"], "away": "night", "strength": 1.5, "blocks": "late", "steps": 1}
    one = shot(steer=[entry | {"frames": "1-4"}], frames=5)
    day, sun, night = (prompt.id for prompt in one.steering_prompts)
    assert [prompt.tokens.text for prompt in one.prompts] == [CAT, "fog", "day", "sun", "night"]
    read = one.table.row(1, "cond")
    steered = Steer(Text(one.prompt.id), (day, sun), (night,), 1.5)
    assert one.steering[0].area == Area((1, 4))
    for block in range(40):
        assert ({expr for expr, _ in read[block]} == {Text(one.prompt.id), steered}) == (block >= 27)
    plain = shot(frames=5).table
    assert one.table.row(0, "cond") == plain.row(0, "cond")
    assert one.table.row(1, "uncond") == plain.row(1, "uncond")


def test_steering_follows_injections_and_takes_strengths_by_block_and_step(shot: Callable[..., Shot]) -> None:
    entry = {"away": "night", "blocks": "3-4", "strength": [1, 2], "step_strength": [0.5, -1]}
    one = shot(steer=[entry], inject=[rule(blocks=3)])
    inner = Lerp(Text(one.prompt.id), Text(one.rules[0].text), 0.6)
    (night,) = one.steering[0].away
    for step, factor in ((0, 0.5), (1, -1.0)):
        row = one.table.row(step, "cond")
        assert row[3] == ((Steer(inner, (), (night,), factor), 1.0),)
        assert row[4] == ((Steer(Text(one.prompt.id), (), (night,), 2 * factor), 1.0),)


def test_two_entries_add_up(shot: Callable[..., Shot]) -> None:
    one = shot(steer=[{"toward": "sun"}, {"toward": "sun", "away": "night", "strength": 2}])
    assert [prompt.tokens.text for prompt in one.steering_prompts] == ["sun", "night"]
    ((expr, _),) = one.table.row(0, "cond")[0]
    sun, night = (prompt.id for prompt in one.steering_prompts)
    assert expr == Steer(Steer(Text(one.prompt.id), (sun,), (), 1.0), (sun,), (night,), 2.0)


def test_the_key_of_a_shot_counts_strengths_and_prompts(decide: Callable[..., Plan]) -> None:
    plain = decide().shots[0]
    entry = {"toward": ["sun"], "away": ["night"]}
    swept = decide(steer=[entry], matrix={"steer.0.strength": [0, 1, 2]}, output="{id}.mp4").shots
    assert len({one.key for one in swept}) == 3
    assert swept[0].key == plain.key
    assert decide(steer=[{"toward": "sun", "away": "night"}]).shots[0].key == swept[1].key
    assert decide(steer=[{"toward": "night", "away": "sun"}]).shots[0].key != swept[1].key


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"strength": 2}, "steer.0: steers neither toward nor away from a prompt"),
        ({"toward": " "}, "steer.0.toward: is empty"),
        ({"toward": ["sun", ""]}, "steer.0.toward.1: is empty"),
        ({"away": []}, "steer.0.away: expected at least 1 values, got 0"),
        ({"toward": 3}, "steer.0.toward: expected text, got 3; put it in quotes"),
        ({"toward": ["sun", "sky"], "away": ["sky", "sun"]}, "steer.0: steers toward the prompts that it"),
        ({"towards": "sun"}, "steer.0.towards: unknown key; did you mean 'toward'?"),
        ({"toward": "sun", "strength": "much"}, "steer.0.strength: expected a number, got 'much'"),
        ({"toward": "sun", "blocks": 41}, "steer.0.blocks: 41 is past the last block (39)"),
        ({"toward": "sun", "steps": "5%-6%"}, "steer.0.steps"),
        ({"toward": "sun", "strength": [1, 2]}, "steer.0.strength: 2 strengths for 40 positions"),
        ({"toward": "sun", "frames": 5}, "steer.0.frames: 5 is past the last frame (0)"),
        ({"toward": "sun", "expert": "low"}, "steer.0.expert: the model has one network"),
        ({"toward": {"embedding": "no.safetensors"}}, "steer.0.toward"),
    ],
)
def test_a_wrong_entry_is_an_error_at_its_key(
    decide: Callable[..., Plan], entry: dict[str, Any], message: str
) -> None:
    with pytest.raises(JobError) as caught:
        decide(steer=[entry])
    assert message in str(caught.value)


def test_a_prompt_over_time_is_not_steered(decide: Callable[..., Plan]) -> None:
    with pytest.raises(JobError, match=r"steer: is of one prompt, and that of the shot changes over"):
        decide(prompt=["a cat", "a dog"], frames=5, steer=[{"toward": "sun"}])


def test_compared_shots_get_the_plain_shot_beside_them(decide: Callable[..., Plan]) -> None:
    keys = {"compare": True, "output": "{id}.mp4", "steer": [{"toward": "sun"}]}
    plan = decide(**keys, matrix={"steer.0.strength": [0.5, 2.0]})
    assert plan.comparison
    assert [len(one.steering) for one in plan.shots] == [1, 1, 0]
    assert set(plan.comparison.baselines.values()) == {plan.shots[2].id}
    assert len(decide(**keys, matrix={"steer.0.strength": [0.0, 0.5, 2.0]}).shots) == 3


def test_the_plan_shows_prompts_and_cells(decide: Callable[..., Plan]) -> None:
    entry = {"toward": "sun", "away": "night", "strength": 1.5, "blocks": "late", "region": [0.5, 0, 1, 1]}
    plan = decide(steer=[entry])
    lines = [*format_shot(plan.shots[0], plan.schedule.placement(plan.shots[0]), plan.shots[0])]
    start = lines.index("         steer.0  27-39 at 1.5, steps 0-1, cond")
    assert lines[start + 1 : start + 4] == [
        "          toward  sun (3 tokens)",
        "       away from  night (5 tokens)",
        "            area  region [0.5, 0, 1, 1]: 8 of 16 tokens",
    ]


def test_a_file_has_the_prompts_of_a_vector_with_their_roles(
    capsys: pytest.CaptureFixture[str], known: Path, tmp_path: Path, decide: Callable[..., Plan]
) -> None:
    file = tmp_path / "day.safetensors"
    options = ("--model", known, "--out", file, "-q")
    sides = ("--toward", "day", "--toward", "sun", "--away", "night")
    assert run_wancli(capsys, "encode", *sides, *options).code == 0
    one = decide(model=str(known), steer=[{"file": file.name, "strength": 2}]).shots[0]
    texts = {prompt.id: prompt.tokens.text for prompt in one.steering_prompts}
    (vector,) = one.steering
    assert ([texts[id] for id in vector.toward], [texts[id] for id in vector.away]) == (
        ["day", "sun"],
        ["night"],
    )
    assert {prompt.file for prompt in one.steering_prompts} == {file}
    with pytest.raises(JobError, match=r"steer\.0\.file: stands for `toward` and `away`"):
        decide(steer=[{"file": file.name, "away": "night"}])
    plain = tmp_path / "plain.safetensors"
    assert run_wancli(capsys, "encode", "day", "--model", known, "--out", plain, "-q").code == 0
    with pytest.raises(
        JobError, match=r"steer\.0\.file: 'plain.safetensors' does not say what to steer toward"
    ):
        decide(steer=[{"file": plain.name}])
    for wrong in (("day", *sides, *options), (*sides, "--model", known)):
        said = run_wancli(capsys, "encode", *wrong)
        assert (said.code, "--toward and --away write a file for `steer`" in said.err) == (2, True)


EULER = {"solver": "euler", "steps": 2, "shift": 3.0, "guidance": 2.0}


@torch.inference_mode()
def sample_by_hand(model: WanModel, rows: dict[str, Tensor]) -> Tensor:
    """Euler steps written out on all 512 rows: blocks 1 and 2 read the sum of the prompt and 1.5 times the
    vector at step 1.
    """

    def project(rows_NE: Tensor) -> Tensor:
        padded = torch.zeros(512, rows_NE.shape[1])
        padded[: len(rows_NE)] = rows_NE
        return model.text_embedding(padded)

    projected = {text: project(rows_NE) for text, rows_NE in rows.items()}
    means = {text: projected[text][: len(rows_NE)].double().mean(0) for text, rows_NE in rows.items()}
    vector_D = (means["day"] + means["sun"]) / 2 - means["night"]
    steered = projected[CAT].double()
    steered[: len(rows[CAT])] += 1.5 * vector_D
    read = {text: Context(each, torch.zeros(512)) for text, each in projected.items()}
    moved = Context(steered.float(), torch.zeros(512))
    schedule = build_sigma_schedule("euler", 2, 3.0)
    x = draw_noise((16, 1, 8, 8), 0)
    for step, t in enumerate(schedule.timesteps):
        mixes = [((moved if step == 1 and block in (1, 2) else read[CAT], 1.0),) for block in range(4)]
        cond = model(x[None], t, mixes)[0]
        uncond = model(x[None], t, [((read["fog"], 1.0),)] * 4)[0]
        x = x + (schedule.sigmas[step + 1] - schedule.sigmas[step]) * (uncond + 2.0 * (cond - uncond))
    return x


def test_a_rendered_shot_is_steered_recorded_and_made_again(
    render: Callable[..., CommandResult],
    capsys: pytest.CaptureFixture[str],
    known: Path,
    tmp_path: Path,
    warm: Path,
) -> None:
    texts = [CAT, "fog", "day", "sun", "night"]
    file = tmp_path / "texts.safetensors"
    assert run_wancli(capsys, "encode", *texts, "--model", known, "--out", file, "-q").code == 0
    keys = {"sampler": EULER, "video": {"keep_latents": True}}
    # One of the prompts comes from a file.
    entry = {"toward": ["day", {"embedding": str(file), "index": 3}], "away": "night", "strength": 1.5}
    where = {"blocks": "1-2", "steps": 1}
    assert (
        render(**keys, steer=[entry | where, {"toward": "sun", "region": [0.5, 0, 1, 1], "blocks": 0}]).code
        == 0
    )
    found = manifest_of(tmp_path)["steer"]
    assert [(each["hits"], each["planned"]) for each in found] == [(2, 2), (2, 2)]
    assert render(**keys, steer=[entry | where], folder=tmp_path / "one").code == 0
    rows = dict(zip(texts, (each.rows_NE for each in unpack(file.read_bytes()))))
    spec = planning.build_plan(load(tmp_path / "job.yaml"), warm / "h.json").shots[0].model
    expected = sample_by_hand(Networks(spec).transformer("only"), rows)
    assert relative_error(latents_of(tmp_path / "one"), expected) < 1e-5
    assert render(**keys, folder=tmp_path / "plain").code == 0
    assert relative_error(latents_of(tmp_path / "plain"), expected) > 1e-3
    record = manifest.read(tmp_path / "out/clip.manifest.json")
    assert record
    assert record.negative
    assert record.negative.text == "fog"
    path = write_job(tmp_path, build_job(record, "again.mp4"), "again.yaml")
    again = planning.build_plan(load(path), warm / "h.json").shots[0]
    assert again.key == record.key
    assert describe_record(record, again) == ""
    job = build_job(record, "again.mp4")
    job["steer"][0] |= {"away": "sun", "strength": 2.0}
    job["steer"][1]["region"] = [0, 0, 0.5, 1]
    changed = planning.build_plan(load(write_job(tmp_path, job)), warm / "h.json").shots[0]
    assert describe_record(record, changed) == (
        "made with steer.0.strength 1.5, now 2; steer.1.region [0.5, 0, 1, 1], now [0, 0, 0.5, 1]; "
        "another steer.0.away"
    )
