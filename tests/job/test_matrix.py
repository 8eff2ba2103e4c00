"""Sweeps: which shots a job makes, what they are called, and where a mistake in one is found."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from wancli.errors import JobError
from wancli.job.cli_overrides import CliOverrides
from wancli.job.loader import JobFile, parse
from wancli.job.matrix import MAX_SHOTS
from wancli.job.schema import Job

BASE = """\
model: m
prompt: a cat
inject:
  - prompt: fish
    blocks: early
"""


def load(text: str, **flags: Any) -> JobFile:
    return parse((BASE + text).encode(), "job.yaml", "job", Path("/jobs"), CliOverrides(**flags))


def load_jobs(text: str, **flags: Any) -> list[Job]:
    return [item.job for item in load(text, **flags).items]


def load_ids(text: str) -> list[str | None]:
    return [job.id for job in load_jobs(text)]


def load_problems(text: str, **flags: Any) -> list[str]:
    with pytest.raises(JobError) as caught:
        load(text, **flags)
    return str(caught.value).splitlines()


# ---- which shots ----


def test_a_matrix_is_the_product_in_the_order_written_with_the_last_key_fastest() -> None:
    text = "matrix:\n  seed: [1, 2]\n  inject.0.blocks: [late, 3, all]\n  sampler.steps: [4, 5]\n"
    result = [(job.seed, job.inject[0].blocks, job.sampler.steps) for job in load_jobs(text)]
    assert result == list(itertools.product([1, 2], ["late", 3, "all"], [4, 5]))


def test_an_axis_keeps_the_other_keys_of_the_entry_that_it_changes() -> None:
    (first, second) = load_jobs("matrix: {inject.0.strength: [0.2, 0.4]}\n")
    assert (first.inject[0].prompt, first.inject[0].blocks, first.inject[0].strength) == (
        "fish",
        "early",
        0.2,
    )
    assert second.inject[0].strength == 0.4


def test_a_mapping_is_merged_and_a_list_replaces() -> None:
    text = "sampler: {shift: 3, steps: 9}\nmatrix: {sampler: [{steps: 4}, {shift: 2}], inject: [[]]}\n"
    result = [(job.sampler.steps, job.sampler.shift, job.inject) for job in load_jobs(text)]
    assert result == [(4, 3, []), (9, 2, [])]


def test_zip_varies_its_keys_together_inside_the_matrix() -> None:
    text = "matrix: {noise: [cpu, cuda]}\nzip: {seed: [1, 2, 3], size: [16x16, 32x32, 48x48]}\n"
    result = [(job.noise, job.seed, job.size) for job in load_jobs(text)]
    together = [(1, "16x16"), (2, "32x32"), (3, "48x48")]
    assert result == [(noise, *pair) for noise in ("cpu", "cuda") for pair in together]


def test_exclude_leaves_out_the_combinations_that_have_all_of_its_values() -> None:
    text = (
        "matrix: {seed: [1, 2], inject.0.blocks: [late, all]}\n"
        "exclude:\n  - {seed: 1, inject.0.blocks: all}\n  - {seed: 2, inject.0.blocks: late}\n"
    )
    assert [(job.seed, job.inject[0].blocks) for job in load_jobs(text)] == [(1, "late"), (2, "all")]


def test_exclude_may_name_an_item() -> None:
    text = "items: [{id: a}, {id: b}]\nmatrix: {seed: [1, 2]}\nexclude: [{id: b, seed: 1}]\n"
    assert load_ids(text) == ["a-seed1", "a-seed2", "b-seed2"]


def test_every_item_is_combined_with_every_combination() -> None:
    text = "items:\n  - {id: x, size: 16x16}\n  - {id: y, labels: {kind: big}}\nmatrix: {seed: [5, 6]}\n"
    result = [(job.id, job.size, job.seed, job.labels) for job in load_jobs(text)]
    assert result == [
        ("x-seed5", "16x16", 5, {"seed": 5}),
        ("x-seed6", "16x16", 6, {"seed": 6}),
        ("y-seed5", None, 5, {"seed": 5, "kind": "big"}),
        ("y-seed6", None, 6, {"seed": 6, "kind": "big"}),
    ]


ITEMS = "items:\n  - {id: baseline, inject: []}\n  - {id: inj}\n"


def test_axes_that_do_not_apply_to_an_item_are_skipped() -> None:
    text = ITEMS + "matrix: {seed: [1, 2], inject.0.blocks: [early, late], inject.0.strength: [0.4]}\n"
    jobs = load_jobs(text)
    assert [(job.id, job.seed, job.labels) for job in jobs[:2]] == [
        ("baseline-seed1", 1, {"seed": 1}),
        ("baseline-seed2", 2, {"seed": 2}),
    ]
    assert [job.id for job in jobs[2:4]] == ["inj-seed1-early-strength0.4", "inj-seed1-late-strength0.4"]
    assert len(jobs) == 6


def test_an_item_that_no_axis_applies_to_is_one_shot_with_its_own_id() -> None:
    assert load_ids(ITEMS + "matrix: {inject.0.blocks: [early, late]}\n") == [
        "baseline", "inj-early", "inj-late"
    ]  # fmt: skip


def test_an_output_without_the_values_of_skipped_axes_has_the_id_for_a_name() -> None:
    text = "output: out/{blocks}-{seed}.mp4\n" + ITEMS + "matrix: {inject.0.blocks: [early, late]}\n"
    assert [job.output for job in load_jobs(text)] == ["out/{id}.mp4", *["out/{blocks}-{seed}.mp4"] * 2]


def test_an_axis_that_applies_to_no_item_is_a_mistake() -> None:
    assert load_problems(ITEMS + "matrix:\n  inject.1.blocks: [early]\n") == [
        "job.yaml:10: matrix.inject.1.blocks: inject has 0 entries, so no entry 1, in 'baseline'"
    ]


# ---- ids and labels ----


def test_labels_are_the_last_parts_of_the_keys_if_these_differ() -> None:
    (job,) = load_jobs(
        "matrix: {inject.0.blocks: [late], sampler.steps: [4], size: [16x16], measure: [true]}\n"
    )
    assert job.labels == {"blocks": "late", "steps": 4, "size": "16x16", "measure": True}
    (job,) = load_jobs(
        "matrix: {inject.0.prompt: [b], prompt: [a], inject.0.steps: [all], sampler.steps: [3]}\n"
    )
    assert job.labels == {"inject.0.prompt": "b", "prompt": "a", "inject.0.steps": "all", "sampler.steps": 3}


def test_the_users_own_label_stays() -> None:
    (job,) = load_jobs("labels: {seed: first}\nmatrix: {seed: [1]}\n")
    assert job.labels == {"seed": "first"}


def test_the_label_of_a_structure_is_its_json() -> None:
    first, second = load_jobs("matrix:\n  inject.0.strength: [{curve: linear}, 0.5]\n")
    assert first.labels == {"strength": '{"curve": "linear"}'}
    assert (first.id, second.id) == ("strength0", "strength1")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("matrix: {seed: [1, 2]}", ["seed1", "seed2"]),
        ("matrix: {seed: [1], inject.0.blocks: [late, 3]}", ["seed1-late", "seed1-blocks3"]),
        ("matrix: {inject.0.strength: [0.5, -0.5]}", ["strength0.5", "strength-0.5"]),
        ("matrix: {prompt: [A red circle!, Ein rotes Quadrat]}", ["a-red-circle", "ein-rotes-quadrat"]),
        ("matrix: {negative: ['', fog]}", ["negative0", "negative1"]),
        ("matrix: {size: [16x16, null]}", ["size0", "size1"]),
        ("matrix: {measure: [true, false]}", ["measure-true", "measure-false"]),
        (f"matrix: {{prompt: [{'long ' * 9}one, {'long ' * 9}two]}}", ["prompt0", "prompt1"]),
        ("items: [{seed: 1}, {seed: 2}]\nmatrix: {noise: [cpu]}", ["0000-cpu", "0001-cpu"]),
        ("id: base\nmatrix: {seed: [7]}", ["base-seed7"]),
        ("matrix: {id: [a, b]}", ["a", "b"]),
        ("matrix: {id: [a, b], seed: [4]}", ["a", "b"]),
        ("zip: {seed: [1, 2], noise: [cpu, cpu]}", ["seed1-cpu", "seed2-cpu"]),
        ("items: [{seed: 1}, {id: b}]", [None, "b"]),
    ],
)
def test_an_id_is_that_of_the_item_and_the_values_of_the_axes(text: str, expected: list[str]) -> None:
    assert load_ids(text + "\n") == expected


# ---- mistakes ----


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("matrix: 5", ["job.yaml:6: matrix: must be a mapping of keys to lists of values"]),
        ("matrix:", ["job.yaml:6: matrix: must be a mapping of keys to lists of values"]),
        ("zip: [1]", ["job.yaml:6: zip: must be a mapping of keys to lists of values"]),
        ("matrix:\n  seed: 5", ["job.yaml:7: matrix.seed: must be a list of values"]),
        ("matrix:\n  seed: []", ["job.yaml:7: matrix.seed: has no values, so there would be no shot"]),
        ("matrix:\n  a..b: [1]", ["job.yaml:7: matrix.a..b: is not a key; write for example sampler.steps"]),
        (
            "matrix:\n  seed:\n    - 1\n    - x\n",
            ["job.yaml:9: matrix.seed.1: expected a whole number, got 'x'"],
        ),
        (
            "matrix:\n  seed: [1, -1]\n  sampler.steps: [0, 1]",
            [
                "job.yaml:7: matrix.seed.1: -1 is not a seed, and seeds are never random; "
                "write matrix: {seed: [0, 1]}",
                "job.yaml:8: matrix.sampler.steps.0: should be greater than or equal to 1, got 0",
            ],
        ),
        ("matrix:\n  sed: [1, 2]", ["job.yaml:7: matrix.sed: unknown key; did you mean 'seed'?"]),
        (
            "matrix:\n  samplr.steps: [1, 2]",
            ["job.yaml:7: matrix.samplr.steps: unknown key; did you mean 'sampler'?"],
        ),
        (
            "matrix:\n  sampler.step: [1, 2]",
            ["job.yaml:7: matrix.sampler.step: unknown key; did you mean 'steps'?"],
        ),
        (
            "matrix:\n  inject.1.blocks: [late]",
            ["job.yaml:7: matrix.inject.1.blocks: inject has 1 entry, so no entry 1"],
        ),
        ("matrix:\n  loras.0.strength: [1]", ["job.yaml:7: matrix.loras.0.strength: loras has no entries"]),
        (
            "items: [{id: a, inject: []}]\nmatrix:\n  inject.0.blocks: [1, 2]",
            ["job.yaml:8: matrix.inject.0.blocks: inject has 0 entries, so no entry 0, in 'a'"],
        ),
        (
            "matrix:\n  prompt.embedding: [x]",
            ["job.yaml:7: matrix.prompt.embedding: prompt is not a mapping, so it has no embedding"],
        ),
        ("matrix:\n  seed: [1, 2, 1]", ["job.yaml:7: matrix.seed.2: appears twice"]),
        (
            "matrix:\n  items: [1]",
            ["job.yaml:7: matrix.items: is not a key of a shot; it lists or varies the shots of a file"],
        ),
        (
            "matrix: {seed: [1]}\nzip: {seed: [2]}",
            ["job.yaml:7: zip.seed: is also in matrix"],
        ),
        (
            "zip:\n  seed: [1, 2]\n  noise: [cpu]",
            ["job.yaml:6: zip: lists of different lengths cannot be zipped: seed 2, noise 1"],
        ),
        ("exclude: {seed: 1}", ["job.yaml:6: exclude: must be a list of mappings of keys to values"]),
        ("exclude: [{}]", ["job.yaml:6: exclude: must be a list of mappings of keys to values"]),
        (
            "matrix: {seed: [1, 2]}\nexclude:\n  - seed: 2\n  - seed: 3\n",
            ["job.yaml:9: exclude.1: leaves out no combination"],
        ),
        (
            "matrix: {seed: [1]}\nexclude:\n  - seed: true",
            ["job.yaml:8: exclude.0: leaves out no combination"],
        ),
        ("matrix: {seed: [1]}\nexclude: [{seed: 1}]", ["job.yaml:7: exclude: leaves out every shot"]),
        (
            "items:\n  - id: a\n  - id: a",
            ["job.yaml:8: items.1.id: shots 0 and 1 both have the id 'a'"],
        ),
        ("id: a\nitems: [{seed: 1}, {seed: 2}]", ["job.yaml:6: id: shots 0 and 1 both have the id 'a'"]),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_an_error_in_a_sweep_has_the_line_of_its_key_or_value(text: str, lines: list[str]) -> None:
    assert load_problems(text + "\n") == lines


def test_a_sweep_beyond_the_limit_is_refused_before_it_is_expanded() -> None:
    many = ", ".join(map(str, range(1000)))
    text = f"matrix: {{seed: [{many}], sampler.steps: [{many}], frames: [{many}]}}\n"
    assert load_problems(text) == [
        f"job.yaml:6: matrix: makes 1,000,000,000 shots of one file; the limit is {MAX_SHOTS:,}"
    ]


def test_a_shot_knows_which_axis_set_a_key() -> None:
    text = (
        "items:\n  - seed: 3\nmatrix:\n  sampler.steps: [4,\n                  5]\n"
        "  inject.0.strength:\n    - {curve: sine}\n"
    )
    second = load(text).items[1]
    assert second.location("seed") == "job.yaml:7: items.0.seed"
    assert second.location("sampler", "steps") == "job.yaml:10: matrix.sampler.steps.1"
    assert second.location("inject", 0, "strength") == "job.yaml:12: matrix.inject.0.strength.0"
    assert (
        second.location("inject", 0, "strength", "curve") == "job.yaml:12: matrix.inject.0.strength.0.curve"
    )
    assert second.location("inject", 0, "blocks") == "job.yaml:5: inject.0.blocks"
    assert second.location("size") == "job.yaml: size"


# ---- from the command line ----


def test_a_sweep_option_adds_or_replaces_an_axis() -> None:
    text = "matrix: {seed: [1, 2], noise: [cpu, cuda]}\nexclude: [{seed: 2}]\n"
    assert [(job.seed, job.noise) for job in load_jobs(text, sweeps=("seed=8,9",))] == [
        (8, "cpu"),
        (8, "cuda"),
        (9, "cpu"),
        (9, "cuda"),
    ]
    assert [job.sampler.steps for job in load_jobs("", sweeps=("sampler.steps=3,4",))] == [3, 4]
    (line,) = load_problems("zip: {seed: [1], noise: [cpu]}\n", sweeps=("seed=2",))
    assert line == "job.yaml:6: zip.seed: varies together with other keys in zip"


def test_set_overrides_every_file_but_no_key_of_a_sweep() -> None:
    text = "seed: 1\nitems: [{seed: 2, id: a}, {id: b}]\n"
    assert [job.seed for job in load_jobs(text, sets=("seed=3",))] == [3, 3]
    assert load_problems("matrix: {seed: [1, 2]}\n", sets=("seed=3",)) == [
        "--set seed: has one value in each shot of a sweep"
    ]
