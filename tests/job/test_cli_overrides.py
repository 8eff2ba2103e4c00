"""--set, --sweep, --items, --pick and --shard: what they take, what they choose, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from wancli.errors import JobError
from wancli.job.cli_overrides import CliOverrides
from wancli.job.loader import Item, parse

JOB = b"model: m\nprompt: a cat\ninject: [{prompt: fish}]\n"


def items(**flags: Any) -> tuple[Item, ...]:
    return parse(JOB, "job.yaml", "job", Path("/jobs"), CliOverrides(**flags)).items


def refusal(**flags: Any) -> str:
    with pytest.raises(JobError) as caught:
        items(**flags)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("seed=7", lambda job: job.seed == 7),
        ("prompt=A red circle, moving", lambda job: job.prompt == "A red circle, moving"),
        ("prompt='7'", lambda job: job.prompt == "7"),
        ("negative=''", lambda job: job.negative == ""),
        ("negative=a=b", lambda job: job.negative == "a=b"),
        ("sampler.steps=1", lambda job: job.sampler.steps == 1),
        ("sampler={steps: 3, shift: 2}", lambda job: (job.sampler.steps, job.sampler.shift) == (3, 2)),
        ("inject.0.blocks=[early, 39]", lambda job: job.inject[0].blocks == ["early", 39]),
        ("inject=[]", lambda job: job.inject == []),
        ("labels.take=a", lambda job: job.labels == {"take": "a"}),
        ("measure=true", lambda job: job.measure),
    ],
)
def test_a_value_is_read_as_yaml(text: str, read: Any) -> None:
    (item,) = items(sets=(text,))
    assert read(item.job)


def test_a_key_beside_a_short_form_keeps_what_the_text_says_and_where_it_starts_from() -> None:
    (item,) = items(sets=("image=cat.png", "image.fit=pad", "model=wan", "model.variant=Wan2.2-I2V-A14B"))
    assert (item.job.image_options.first, item.job.image_options.fit) == ("cat.png", "pad")
    assert (item.job.model.transformer, item.job.model.variant) == ("wan", "Wan2.2-I2V-A14B")
    overrides = CliOverrides(sets=("image.fit=pad",))
    (item,) = parse(JOB + b"image: cat.png\n", "job.yaml", "job", Path("/jobs"), overrides).items
    assert item.job.image_options.first == "cat.png"
    assert item.base_dir("image", "first") == Path("/jobs")
    assert item.location("image", "fit") == "--set image.fit"


@pytest.mark.parametrize(
    "text",
    [
        "A red circle #1 moves",
        "A red circle. Camera: static shot.",
        '"A red circle" and a blue square',
        "*slow* & [calm], a circle",
        "{circle|square} in a row",
        "{circle}",
        "- 7\n- 8",
        "7",
        "true",
    ],
)
def test_a_text_is_taken_as_it_is_whatever_yaml_would_make_of_it(text: str) -> None:
    for key in ("prompt", "negative", "inject.0.prompt"):
        (item,) = items(sets=(f"{key}={text}",))
        values = {"prompt": item.job.prompt, "negative": item.job.negative}
        assert (values | {"inject.0.prompt": item.job.inject[0].prompt})[key] == text
    if "," not in text:
        assert [item.job.prompt for item in items(sweeps=(f"prompt={text},other",))] == [text, "other"]


@pytest.mark.parametrize(
    ("sets", "read"),
    [
        ("prompt={embedding: a.emb, index: 1}", lambda job: job.prompt.index == 1),
        ("model={transformer: a, vae: b}", lambda job: job.model.vae == "b"),
        ('output="{id}.mp4"', lambda job: job.output == "{id}.mp4"),
        ("output={id} #1.mp4", lambda job: job.output == "{id} #1.mp4"),
        ("id=null", lambda job: job.id is None),
        ("labels.take=7", lambda job: job.labels == {"take": 7}),
        ("save_every=5", lambda job: job.save_every == 5),
    ],
)
def test_quotes_mappings_and_null_are_yaml_for_a_text_too(sets: str, read: Any) -> None:
    (item,) = items(sets=(sets,))
    assert read(item.job)


def test_the_texts_of_a_sweep_are_split_at_commas_outside_quotes_and_braces() -> None:
    swept = "prompt=it's #1, \"a, b\",'it''s' ,{embedding: e.emb, index: 2},"
    prompts = [item.job.prompt for item in items(sweeps=(swept,))]
    assert prompts[:3] == ["it's #1", "a, b", "it's"]
    assert not isinstance(prompts[3], str)
    assert prompts[3].index == 2


def test_the_last_set_of_a_key_wins_and_its_paths_start_from_the_current_folder() -> None:
    (item,) = items(sets=("model=a", "model=./b"))
    assert item.job.model == "./b"
    assert (item.base_dir("model"), item.base_dir("prompt")) == (Path.cwd(), Path("/jobs"))
    assert item.location("model") == "--set model"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"sets": ("seed",)}, "--set: 'seed' sets nothing"),
        ({"sets": ("=5",)}, "--set: '=5' sets nothing"),
        ({"sets": ("a..b=5",)}, "--set: 'a..b=5' sets nothing"),
        ({"sets": ("seed=",)}, "--set seed: has no value"),
        ({"sets": ("seed=x",)}, "--set seed: expected a whole number, got 'x'"),
        ({"sets": ("seed=010",)}, "--set seed:1: 010 has a leading zero"),
        ({"sets": ("seed=1e3",)}, "--set seed: expected a whole number, got 1000.0"),
        ({"sets": ("negative=no\udcff",)}, "--set negative: byte 2 is not UTF-8"),
        ({"sets": ("labels.a=&a b",)}, "--set labels.a:1: no alias *a uses the anchor &a"),
        ({"sets": ("sampler.step=5",)}, "--set sampler.step: unknown key; did you mean 'steps'?"),
        ({"sets": ("samplr.steps=5",)}, "--set samplr.steps: unknown key; did you mean 'sampler'?"),
        ({"sets": ("sampler={step: 5}",)}, "--set sampler.step: unknown key; did you mean 'steps'?"),
        ({"sets": ("prompt={text: red}",)}, "--set prompt.segments: is missing"),
        ({"sets": ("matrix.seed=[1]",)}, "--set matrix.seed: is not a key of a shot"),
        (
            {"sets": ("inject.1.blocks=5",)},
            "--set inject.1.blocks: inject has 1 entry, so no entry 1",
        ),
        (
            {"sets": ("inject.x.blocks=5",)},
            "--set inject.x.blocks: inject has 1 entry, so no entry x",
        ),
        ({"sweeps": ("seed=1,x",)}, "--sweep seed.1: expected a whole number, got 'x'"),
        ({"sweeps": ("sed=1,2",)}, "--sweep sed: unknown key; did you mean 'seed'?"),
        ({"sweeps": ("seed=1,2]",)}, "--sweep seed:1:6: is not YAML: expected '<document start>'"),
        ({"sweeps": ("seed=1", "seed=2")}, "--sweep seed: is given twice"),
        ({"sweeps": ("seed=1",), "sets": ("seed=2",)}, "--sweep seed: is given twice"),
        ({"items": ""}, "--items: '' is not a range"),
        ({"items": "a"}, "--items: 'a' is not a range"),
        ({"items": "0,,1"}, "--items: '' is not a range"),
        ({"items": "-1"}, "--items: '-1' is not a range"),
        ({"items": "0-2:0"}, "--items: '0-2:0' is not a range"),
        ({"items": "0-1"}, "--items: 1 is past the last shot (0)"),
        ({"shard": "1"}, "--shard: '1' is not a shard"),
        ({"shard": "2/2"}, "--shard: '2/2' is not a shard"),
        ({"shard": "0/0"}, "--shard: '0/0' is not a shard"),
        ({"shard": "0/2"}, "--shard: 0/2 contains no shot"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_an_error_names_the_option(flags: dict[str, Any], message: str) -> None:
    assert refusal(**flags).startswith(message)


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ("0", [0]),
        ("0-3,9", [0, 1, 2, 3, 9]),
        ("1-9:2", [1, 3, 5, 7, 9]),
        ("1-8:4", [1, 5]),
        ("9-1:-4", [1, 5, 9]),
        ("5, 3 ,3-4", [3, 4, 5]),
    ],
)
def test_items_are_ranges_as_openjd_writes_them(ranges: str, expected: list[int]) -> None:
    assert list(CliOverrides(items=ranges).select_shots([*"abcdefghij"], range(10))) == expected


@pytest.mark.parametrize(
    ("picks", "expected"),
    [
        (["b"], (1,)),
        (["c, a"], (0, 2)),
        (["c", "a,c"], (0, 2)),
        (["x,y"], (3,)),  # the id itself has a comma
    ],
)
def test_shots_are_picked_by_their_ids_and_keep_their_order(picks: list[str], expected: Any) -> None:
    assert CliOverrides(picks=tuple(picks)).select_shots(["a", "b", "c", "x,y"], range(4)) == expected


def test_unknown_ids_are_named_together_with_those_that_are_near() -> None:
    ids = ["seed7-early-strength0.4", "seed7-early-strength0.9", "seed8-late-strength0.4"]
    with pytest.raises(JobError) as caught:
        CliOverrides(picks=("seed7-early, moon,seed8-late-strength0.4",)).select_shots(ids, range(3))
    assert str(caught.value) == "--pick: no shot has the id 'seed7-early', 'moon'"
    assert caught.value.hint.splitlines() == [
        "'seed7-early': did you mean 'seed7-early-strength0.9' or 'seed7-early-strength0.4'?",
        f"ids: {', '.join(ids)}",
    ]
    assert refusal(items="0", picks=("a",)) == "--items, --pick: both choose shots; give one of them"


def test_a_shot_is_picked_from_a_sweep_after_its_keys_are_set() -> None:
    flags = CliOverrides(sets=("size=832x480",), sweeps=("seed=1,2",), picks=("seed2",))
    job = parse(JOB, "job.yaml", "job", Path("/jobs"), flags)
    assert [(job.items[i].id, job.items[i].job.size) for i in job.selected] == [("seed2", "832x480")]


@pytest.mark.parametrize("ranges", ["3-1", "1-3:-1"])
def test_a_range_with_a_step_of_the_wrong_sign_is_refused(ranges: str) -> None:
    with pytest.raises(JobError, match="is empty"):
        CliOverrides(items=ranges).select_shots([*"abcdefghij"], range(10))


@pytest.mark.parametrize(("count", "parts"), [(10, 3), (8, 8), (1000, 7), (3, 2)])
def test_the_shards_of_a_job_are_contiguous_and_complete(count: int, parts: int) -> None:
    shards = [
        CliOverrides(shard=f"{part}/{parts}").select_shots([*map(str, range(count))], range(count))
        for part in range(parts)
    ]
    assert [index for part in shards for index in part] == list(range(count))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_a_shard_is_taken_from_the_selected_items() -> None:
    assert CliOverrides(items="0-9:2", shard="1/2").select_shots([*"abcdefghij"], range(10)) == (4, 6, 8)


def test_a_shard_has_whole_chains_in_the_order_of_their_first_shots() -> None:
    images = [{"shot": "b"}, "cat.png", {"shot": "a"}, "dog.png", {"shot": "0003"}, "owl.png"]
    ids = ["c", "a", "b", None, "e", "f"]
    items = [{"image": image} | ({"id": id} if id else {}) for id, image in zip(ids, images)]
    text = json.dumps({"prompt": "p", "items": items, "output": "{item}.mp4"}).encode()
    jobs = [parse(text, "job.yaml", "job", Path("/"), CliOverrides(shard=f"{part}/3")) for part in range(3)]
    assert [job.selected for job in jobs] == [(0, 1, 2), (3, 4), (5,)]
    with pytest.raises(JobError, match="0/4 contains no shot"):
        parse(text, "job.yaml", "job", Path("/"), CliOverrides(shard="0/4"))
