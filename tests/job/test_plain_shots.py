"""The plain shots that a comparison adds to a job: which, and what they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from wancli.job.cli_overrides import CliOverrides
from wancli.job.loader import Item, JobFile, parse

BASE = """\
prompt: a cat
output: "out/seed{seed}_{blocks}_s{strength}.mp4"
compare: true
inject: [{prompt: fish}]
matrix:
  seed: [11, 23]
  inject.0.blocks: [early, late]
  inject.0.strength: [0.4, 0.9]
"""


def load(text: str, **flags: Any) -> JobFile:
    return parse(text.encode(), "job.yaml", "job", Path("/jobs"), CliOverrides(**flags))


def added(text: str, **flags: Any) -> dict[str, Item]:
    return {item.id: item for item in load(text, **flags).items if item.is_added}


def test_there_is_one_for_each_combination_of_the_other_axes() -> None:
    jobs = load(BASE)
    assert [item.id for item in jobs.items[8:]] == ["seed11-plain", "seed23-plain"]
    assert [(item.job.seed, item.job.inject, item.job.labels) for item in jobs.items[8:]] == [
        (11, [], {"seed": 11}),
        (23, [], {"seed": 23}),
    ]
    assert jobs.selected == tuple(range(10))


def test_the_shots_of_the_file_keep_their_numbers() -> None:
    listed = [item.id for item in load(BASE.replace("compare: true\n", "")).items]
    assert [item.id for item in load(BASE).items[:8]] == listed


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("out/seed{seed}_{blocks}_s{strength}.mp4", "out/{id}.mp4"),
        ("out/{blocks}/{seed}.mp4", "out/{id}/{seed}-plain.mp4"),
        ("out/{id}.mp4", "out/{id}.mp4"),
        ("out/{item:04d}-{slug}.mp4", "out/{item:04d}-{slug}.mp4"),
        ("{key}.mp4", "{key}.mp4"),
    ],
)
def test_its_output_is_named_after_its_id_where_values_are_missing(output: str, expected: str) -> None:
    text = BASE.replace("out/seed{seed}_{blocks}_s{strength}.mp4", output)
    assert {item.job.output for item in added(text).values()} == {expected}


def test_none_is_added_if_the_job_has_it_or_does_not_want_it() -> None:
    assert not added(BASE.replace("true", "{add_baseline: false}"))
    assert not added(BASE.replace("true", "{baseline: seed11-early-strength0.4}"))
    assert not added(BASE.replace("[0.4, 0.9]", "[0, 0.9]"))
    assert not added(BASE.replace("compare: true\n", ""))


@pytest.mark.parametrize(
    "key", ["measure: true", "attention: {words: [cat]}", "batch: 2", "memory: {chunk: 256}"]
)
def test_a_shot_that_is_only_rendered_in_another_way_is_the_plain_one(key: str) -> None:
    items = f"items: [{{id: plain, {key}}}, {{id: fish, inject: [{{prompt: fish}}]}}]"
    assert not added(f"prompt: a cat\ncompare: true\n{items}\n")


def test_an_added_shot_may_be_the_baseline_of_all() -> None:
    assert [*added(BASE.replace("true", "{baseline: seed11-plain}"))] == ["seed11-plain", "seed23-plain"]


def test_only_the_seed_that_lacks_it_gets_one() -> None:
    text = BASE.replace("[0.4, 0.9]", "[0, 0.9]") + "exclude: [{seed: 11, inject.0.strength: 0}]\n"
    assert [*added(text)] == ["seed11-plain"]


def test_its_id_tells_entries_apart() -> None:
    text = "prompt: a cat\ncompare: true\ninject: [{prompt: fish}]\noutput: '{id}.mp4'\n"
    assert [*added(f"{text}items: [{{id: a}}, {{id: b, measure: true}}]\n")] == ["plain"]
    assert [*added(f"{text}items: [{{id: a}}, {{id: b, seed: 2}}]\n")] == ["a-plain", "b-plain"]
    assert [*added(f"{text}items: [{{id: plain}}, {{id: b}}]\n")] == ["plain-plain"]
    assert [*added(f"{text}items: [{{}}, {{seed: 2}}]\n")] == ["0000-plain", "0001-plain"]


def test_a_sweep_of_loras_is_compared_with_no_lora_and_a_lora_of_all_stays() -> None:
    loras = "loras: [{path: a.safetensors}]\n"
    (plain,) = added(
        f"prompt: a\ncompare: true\noutput: '{{id}}.mp4'\n{loras}matrix: {{loras.0.strength: [0.5, 1]}}\n"
    ).values()
    assert (plain.id, plain.job.loras) == ("plain", [])
    assert all(len(item.job.loras) == 1 for item in added(BASE + loras).values())


def test_a_chain_is_joined_without_it() -> None:
    text = "prompt: a\ncompare: true\noutput: '{id}.mp4'\njoin: all.mp4\ninject: [{prompt: b}]\n"
    items = "items: [{id: a}, {id: b, image: {shot: a}}]\n"
    assert [(item.id, item.job.join) for item in added(text + items).values()] == [
        ("a-plain", None),
        ("b-plain", None),
    ]


def test_caches_that_differ_count_as_an_injection_and_a_common_one_stays() -> None:
    swept = "prompt: a cat\ncompare: true\ncache: {table: T}\nmatrix: {cache.threshold: [0.1, 0.2]}\n"
    assert {id: item.job.cache for id, item in added(swept).items()} == {"plain": "none"}
    listed = "prompt: a cat\ncompare: true\nitems: [{}, {cache: magcache}]\n"
    assert added(listed) == {}  # the first item is plain
    common = "prompt: a cat\ncompare: true\ncache: magcache\ninject: [{prompt: fish}]\n"
    assert {id: item.job.cache for id, item in added(common).items()} == {"plain": "magcache"}
