"""`words` of a rule, and `blend: nag`: what they become, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import CommandResult, manifest_of, rule, tiny_job, write_job

from wancli.engine.output_diff import describe_record
from wancli.errors import JobError
from wancli.injection.exprs import Concat, Lerp, Nag, Select, Text
from wancli.job.loader import load
from wancli.plan import planner as planning
from wancli.plan.render_plan import Plan
from wancli.report.html.rerun_job import build_job
from wancli.report.shot_text import format_rule
from wancli.storage import manifest

FOG = "a fog and a fog"


@pytest.fixture
def decide(tmp_path: Path, warm: Path) -> Callable[..., Plan]:
    """A job of one shot with these rules, planned."""

    def decided(*rules: dict[str, Any]) -> Plan:
        job = tiny_job(inject=[*rules])
        return planning.build_plan(load(write_job(tmp_path, job)), warm / "hashes.json")

    return decided


def test_words_narrow_every_blend_to_their_rows(decide: Callable[..., Plan]) -> None:
    keys = {"prompt": FOG, "blocks": 30, "words": "Fog"}
    for blend, strength in (("context-lerp", 0.6), ("output-mix", 0.6), ("replace", 1), ("concat", 0.6)):
        shot = decide(rule(**keys, blend=blend, strength=strength)).shots[0]
        main, other = Text(shot.prompt.id), Text(shot.rules[0].text)
        rows = shot.rules[0].rows
        assert rows
        assert (
            "".join(shot.injected_prompts[0].tokens.pieces[row] for row in rows).replace("▁", "") == "fogfog"
        )
        cell = shot.table.row(0, "cond")[30]
        assert (
            cell
            == {
                "context-lerp": ((Lerp(main, Select(main, other, rows), 0.6), 1.0),),
                "output-mix": ((main, 0.4), (Select(main, other, rows), 0.6)),
                "replace": ((Select(main, other, rows), 1.0),),
                "concat": ((Concat(main, other, 0.6, rows), 1.0),),
            }[blend]
        )


def test_two_rules_for_words_keep_the_words_of_each_other(decide: Callable[..., Plan]) -> None:
    keys = {"blocks": 0, "strength": 1, "blend": "replace"}
    shot = decide(rule(prompt=FOG, words="fog", **keys), rule(prompt="a cat", words="cat", **keys)).shots[0]
    first, second = (Text(of.text) for of in shot.rules)
    main = Text(shot.prompt.id)
    rows = [of.rows for of in shot.rules]
    assert shot.table.row(0, "cond")[0] == ((Select(Select(main, first, rows[0]), second, rows[1]), 1.0),)


def test_the_key_depends_on_the_rows_and_not_on_the_case_of_the_words(decide: Callable[..., Plan]) -> None:
    keys = [
        decide(rule(prompt=FOG, **words)).shots[0].key
        for words in ({}, {"words": "fog"}, {"words": "FOG"}, {"words": "and"})
    ]
    assert keys[1] == keys[2]
    assert len(set(keys)) == 3


def test_nag_is_a_part_of_a_cell_that_counts_as_much_as_its_strength(decide: Callable[..., Plan]) -> None:
    shot = decide(rule(blend="nag", strength=0.5, blocks=7), rule(prompt=FOG, blocks=7, strength=0.2)).shots[
        0
    ]
    main, away, fog = Text(shot.prompt.id), Text(shot.rules[0].text), Text(shot.rules[1].text)
    cell = shot.table.row(0, "cond")[7]
    assert cell == ((Lerp(main, fog, 0.2), 1.0), (Nag(away, 11.0, 0.25, 2.5), 0.5))
    assert [*format_rule(shot, 0)][1] == "    away from it  scale 11, alpha 0.25, tau 2.5"
    other = decide(rule(blend="nag", strength=0.5, blocks=7, tau=3.5)).shots[0]
    assert other.rules[0].nag == (11.0, 0.25, 3.5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"words": "dog"}, "inject.0.words: the prompt has no 'dog'"),
        ({"words": " "}, "inject.0.words: names no word"),
        ({"words": "fish", "blend": "nag"}, "inject.0.words: nag moves away from a whole prompt"),
        ({"tau": 2.0}, "inject.0.tau: belongs to blend: nag, and the blend is context-lerp"),
        ({"blend": "nag", "gain": 2.0}, "inject.0.gain: nag has no gain"),
        ({"blend": "nag", "strength": -1.0}, "inject.0.strength: nag needs strengths of 0 or above"),
        ({"blend": "nag", "alpha": 2.0}, "inject.0.alpha: should be less than or equal to 1, got 2.0"),
    ],
)
def test_what_has_no_meaning_is_refused_at_its_key(
    decide: Callable[..., Plan], keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(JobError) as caught:
        decide(rule(**keys))
    assert message in str(caught.value)


def test_words_after_a_concat_are_refused(decide: Callable[..., Plan]) -> None:
    with pytest.raises(JobError, match="words follow concat in block 27"):
        decide(rule(blend="concat"), rule(prompt=FOG, words="fog", strength=1, blend="replace"))


def test_a_rendered_shot_records_words_and_nag_and_is_made_again(
    render: Callable[..., CommandResult], tmp_path: Path, warm: Path
) -> None:
    rules = [
        rule(blocks=0, prompt=FOG, words="a fog"),
        rule(blocks=1, blend="nag", tau=3.0),
        rule(blocks=1, blend="nag", prompt=FOG, frames="1-4", strength=1),
    ]
    guidance = {"steps": 2, "guidance": 1}
    assert render(frames=5, sampler=guidance, inject=rules).code == 0
    entries = manifest_of(tmp_path)["injection"]
    assert entries[0]["words"] == "a fog"
    assert entries[1]["nag"] == {"scale": 11.0, "alpha": 0.25, "tau": 3.0}
    assert [entry["hits"] for entry in entries] == [2, 2, 2]
    record = manifest.read(tmp_path / "out/clip.manifest.json")
    assert record
    path = write_job(tmp_path, build_job(record, "again.mp4"), "again.yaml")
    again = planning.build_plan(load(path), warm / "h.json").shots[0]
    assert again.key == record.key
    assert describe_record(record, again) == ""
    rules[0] |= {"words": "and"}
    rules[1] |= {"tau": 3.5}
    job = tiny_job(model=Path(record.model.root), frames=5, sampler=guidance, inject=rules)
    changed = planning.build_plan(load(write_job(tmp_path, job)), warm / "h.json").shots[0]
    assert (
        describe_record(record, changed) == "made with inject.0.words a fog, now and; inject.1.tau 3, now 3.5"
    )
