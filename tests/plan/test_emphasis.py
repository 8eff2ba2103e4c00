"""`emphasis`: words of the prompt that count more or less, from the job to the manifest and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import CommandResult, latents_of, manifest_of, rule, tiny_job, write_job

from wancli.engine.output_diff import describe_record
from wancli.errors import JobError
from wancli.injection.area import Area
from wancli.injection.exprs import Concat, Emphasis, Lerp, Text
from wancli.job.loader import load
from wancli.plan import planner as planning
from wancli.plan.render_plan import Plan
from wancli.plan.shot import Shot
from wancli.report.html.rerun_job import build_job
from wancli.storage import manifest


@pytest.fixture
def decide(tmp_path: Path, warm: Path) -> Callable[..., Plan]:
    def decided(**keys: Any) -> Plan:
        job = tiny_job(**({"prompt": "a fog and a cat"} | keys))
        return planning.build_plan(load(write_job(tmp_path, job)), warm / "hashes.json")

    return decided


@pytest.fixture
def shot(decide: Callable[..., Plan]) -> Callable[..., Shot]:
    return lambda **keys: decide(**keys).shots[0]


def test_a_mapping_emphasises_words_everywhere(shot: Callable[..., Shot]) -> None:
    one = shot(emphasis={"fog": 2.0, "cat": 0.5})
    fog, cat = (of.rows for of in one.emphasis)
    expected = [(row, math.log(2)) for row in fog] + [(row, math.log(0.5)) for row in cat]
    for block in (0, 39):
        assert one.table.row(1, "cond")[block] == (
            (Emphasis(Text(one.prompt.id), tuple(sorted(expected))), 1.0),
        )
    assert one.table.row(1, "uncond") == shot().table.row(1, "uncond")


def test_a_list_says_where(shot: Callable[..., Shot]) -> None:
    entry = {"words": "fog", "weight": 2.0, "blocks": "late", "steps": 1, "frames": "1-4"}
    one = shot(emphasis=[entry], frames=5)
    (of,) = one.emphasis
    assert (of.area, [block for block, _ in of.blocks], of.steps) == (
        Area((1, 4)),
        [*range(27, 40)],
        ((1, 1.0),),
    )
    assert one.table.row(0, "cond") == shot(frames=5).table.row(0, "cond")


def test_emphasis_fades_with_the_share_of_the_prompt_and_stays_outermost(shot: Callable[..., Shot]) -> None:
    """So that contexts which differ in emphasis alone share their keys and values."""
    for blend, made in (
        ("context-lerp", lambda a, b: (Lerp(a, b, 0.6), 0.4)),
        ("concat", lambda a, b: (Concat(a, b, 0.6), 1.0)),
    ):
        one = shot(emphasis={"fog": 2.0}, inject=[rule(blocks=3, blend=blend)])
        inner, kept = made(Text(one.prompt.id), Text(one.rules[0].text))
        ((expr, weight),) = one.table.row(0, "cond")[3]
        assert isinstance(expr, Emphasis)
        assert (expr.expr, weight) == (inner, 1.0)
        assert [bias for _, bias in expr.biases] == pytest.approx([kept * math.log(2)] * len(expr.biases))


def test_two_entries_on_one_word_multiply(shot: Callable[..., Shot]) -> None:
    entries = [{"words": "fog", "weight": 2.0}, {"words": "a fog", "weight": 3.0}]
    one = shot(emphasis=entries)
    ((expr, _),) = one.table.row(0, "cond")[0]
    biases = dict(expr.biases)  # type: ignore[union-attr]
    (fog, *_) = one.emphasis[0].rows
    assert math.exp(biases[fog]) == pytest.approx(6.0)


def test_the_key_of_a_shot_counts_weights_and_rows(decide: Callable[..., Plan]) -> None:
    plain = decide().shots[0]
    swept = decide(matrix={"emphasis.fog": [0.5, 1.0, 2.0]}, output="{id}.mp4").shots
    assert len({one.key for one in swept}) == 3
    assert swept[1].key == plain.key
    assert decide(emphasis={"FOG": 2.0}).shots[0].key == swept[2].key


@pytest.mark.parametrize(
    ("emphasis", "message"),
    [
        ({"dog": 2.0}, "emphasis.dog: the prompt has no 'dog'"),
        ({"fog": 0.0}, "emphasis.fog: should be greater than 0, got 0.0"),
        ({"fog": "much"}, "emphasis.fog: expected a number, got 'much'"),
        ([{"words": "fog"}], "emphasis.0.weight: is missing"),
        ([{"words": "fog", "weigth": 2.0}], "emphasis.0.weigth: unknown key; did you mean 'weight'?"),
        ([{"words": "fog", "weight": 2.0, "blocks": 41}], "emphasis.0.blocks"),
        ([{"words": "fog", "weight": 2.0, "frames": 5}], "emphasis.0.frames: 5 is past the last frame (0)"),
        ([{"words": "fog", "weight": 2.0, "expert": "low"}], "emphasis.0.expert: the model has one network"),
        ("fog", "emphasis: expected a list, got 'fog'"),
    ],
)
def test_a_wrong_emphasis_is_an_error_at_its_key(
    decide: Callable[..., Plan], emphasis: Any, message: str
) -> None:
    with pytest.raises(JobError) as caught:
        decide(emphasis=emphasis)
    assert message in str(caught.value)


def test_emphasis_of_a_prompt_that_no_block_reads_is_refused(decide: Callable[..., Plan]) -> None:
    with pytest.raises(
        JobError, match="'fog' reaches no block: injected prompts replace the main prompt there"
    ):
        decide(emphasis={"fog": 2.0}, inject=[rule(blocks="all", strength=1, blend="replace")])


def test_a_rendered_shot_records_its_emphasis_and_is_made_again(
    render: Callable[..., CommandResult], tmp_path: Path, warm: Path
) -> None:
    entries = [
        {"words": "fog", "weight": 3.0, "blocks": [0, 2], "steps": 1},
        {"words": "cat", "weight": 0.2, "region": [0.5, 0, 1, 1]},
    ]
    keys = {"prompt": "a fog and a cat", "video": {"keep_latents": True}}
    assert render(**keys, folder=tmp_path / "plain").code == 0
    assert render(**keys, emphasis=entries).code == 0
    found = manifest_of(tmp_path)["emphasis"]
    assert [(entry["words"], entry["weight"], entry["hits"], entry["planned"]) for entry in found] == [
        ("fog", 3.0, 2, 2),
        ("cat", 0.2, 8, 8),
    ]
    assert (latents_of(tmp_path) - latents_of(tmp_path / "plain")).abs().max() > 1e-3
    record = manifest.read(tmp_path / "out/clip.manifest.json")
    assert record
    path = write_job(tmp_path, build_job(record, "again.mp4"), "again.yaml")
    again = planning.build_plan(load(path), warm / "h.json").shots[0]
    assert again.key == record.key
    assert describe_record(record, again) == ""
    job = tiny_job(model=Path(record.model.root), **keys, emphasis=[entries[0] | {"weight": 2.0}, entries[1]])
    changed = planning.build_plan(load(write_job(tmp_path, job)), warm / "h.json").shots[0]
    assert describe_record(record, changed) == "made with emphasis.0.weight 3, now 2"


def test_compared_shots_with_emphasis_get_the_plain_shot_beside_them(decide: Callable[..., Plan]) -> None:
    plan = decide(compare=True, output="{id}.mp4", matrix={"emphasis.fog": [0.5, 2.0]})
    ids = [one.id for one in plan.shots]
    assert len(ids) == 3
    assert plan.comparison
    assert set(plan.comparison.baselines.values()) == {ids[2]}
    assert plan.shots[2].emphasis == ()
    has_plain = decide(compare=True, output="{id}.mp4", matrix={"emphasis.fog": [0.5, 1.0, 2.0]})
    assert len(has_plain.shots) == 3
