"""The loader of job files, as a table of everything that people write into them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import tiny_job

from wancli.errors import JobError
from wancli.job.loader import JobFile, load, parse
from wancli.job.schema_values import EmbeddingFile
from wancli.job.validation import known_keys

MINIMAL = "model: m\nprompt: a cat\n"
TOP = ", ".join(known_keys(()))


def load_text(text: str) -> JobFile:
    return parse(text.encode(), "job.yaml", "job", Path("/jobs"))


def load_problems(text: str) -> list[str]:
    with pytest.raises(JobError) as caught:
        load_text(text)
    return str(caught.value).splitlines()


def test_defaults_that_depend_on_the_model_are_left_to_the_plan() -> None:
    job = load_text(MINIMAL).items[0].job
    assert (job.negative, job.output) == ("default", "out/{job}/{item:04d}-{slug}.mp4")
    assert (job.size, job.frames, job.sampler.steps, job.sampler.shift, job.video.fps) == (None,) * 5
    assert (job.seed, job.noise, job.measure, job.inject) == (0, "cpu", False, [])
    assert (job.sampler.solver, job.text.max_tokens, job.text.truncate) == ("unipc", 256, False)


def test_a_job_is_named_after_its_file_and_its_paths_start_from_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "night shift.yaml"
    path.write_text(MINIMAL)
    job = load(path)
    assert (job.name, job.directory) == ("night shift", tmp_path)


def test_json_is_a_job_too() -> None:
    assert load_text('{"model": "m", "prompt": "a \\ud83d\\udc31"}').items[0].job.prompt == "a 🐱"


def test_an_embedding_file_may_replace_a_prompt() -> None:
    job = (
        load_text(
            "model: m\nprompt: {embedding: a.safetensors}\nnegative: {embedding: a.safetensors, index: 1}\n"
        )
        .items[0]
        .job
    )
    assert job.prompt == EmbeddingFile(embedding="a.safetensors")
    assert job.negative == EmbeddingFile(embedding="a.safetensors", index=1)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        # unknown keys, at every level
        ("promt: x", "promt: unknown key; did you mean 'prompt'?"),
        ("modle: x", "modle: unknown key; did you mean 'model'?"),
        ("item: []", "item: unknown key; did you mean 'items'?"),
        ("foo: 1", f"foo: unknown key; known: {TOP}"),
        (
            "<<: {seed: 1}",
            "<<: unknown key; YAML 1.2 has no merge keys; write extends, or common keys above items",
        ),
        ("1: x", f"1: unknown key; known: {TOP}"),
        ("'<text>': x", "<text>: unknown key; did you mean 'text'?"),
        ("null: x", f"null: unknown key; known: {TOP}"),
        ("sampler: {step: 5}", "sampler.step: unknown key; did you mean 'steps'?"),
        ("sampler: {cfg: 5}", "sampler.cfg: unknown key; write sampler.guidance"),
        ("scheduler: unipc", "scheduler: unknown key; write sampler.solver"),
        ("num_frames: 81", "num_frames: unknown key; write frames"),
        ("start_image: a.png", "start_image: unknown key; write image.first"),
        ("fps: 24", "fps: unknown key; write video.fps"),
        (
            "video: {bits: 10}",
            "video.bits: unknown key; wancli writes 8-bit 4:2:0 MP4 alone; "
            "video.keep_latents: true keeps the latent for other programs",
        ),
        (
            "video: {codec: prores}",
            "video.codec: 'prores' is not one of 'h264', 'h265'; wancli writes 8-bit 4:2:0 MP4 alone; "
            "video.keep_latents: true keeps the latent for other programs",
        ),
        (
            "inject: [{prompt: x, strength: '0.5'}]",
            "inject.0.strength: expected a number, got '0.5'; write 0.5 without quotes",
        ),
        ("seed: '7'", "seed: expected a whole number, got '7'; write 7 without quotes"),
        ("text: {truncat: true}", "text.truncat: unknown key; did you mean 'truncate'?"),
        ("video: {fsp: 8}", "video.fsp: unknown key; did you mean 'fps'?"),
        ("video: {fps: 0.5}", "video.fps: not between 1 and 240 frames a second, got 0.5"),
        ("memory: {dtyp: fp32}", "memory.dtyp: unknown key; did you mean 'dtype'?"),
        ("negative: {embeding: x}", "negative.embeding: unknown key; did you mean 'embedding'?"),
        ("inject: [{prompt: x, block: 1}]", "inject.0.block: unknown key; did you mean 'blocks'?"),
        (
            "inject: [{prompt: x}, {prompt: y, strenght: 1}]",
            "inject.1.strenght: unknown key; did you mean 'strength'?",
        ),
        (
            "inject: [{prompt: {embedding: x, idx: 1}}]",
            "inject.0.prompt.idx: unknown key; did you mean 'index'?",
        ),
        (
            "inject: [{prompt: x, strength: {curve: sine, period: 2}}]",
            "inject.0.strength.period: unknown key; did you mean 'periods'?",
        ),
        (
            "inject: [{prompt: x, steps: {sigmas: [0, 1]}}]",
            "inject.0.steps.sigmas: unknown key; did you mean 'sigma'?",
        ),
        (
            "sampler: {guidance: {hihg: 4, low: 3}}",
            "sampler.guidance.hihg: unknown key; did you mean 'high'?",
        ),
        # missing keys
        ("sampler: {guidance: {high: 4}}", "sampler.guidance.low: is missing"),
        ("inject: [{blocks: 1}]", "inject.0.prompt: is missing"),
        ("negative: {index: 1}", "negative.embedding: is missing"),
        ("inject: [{prompt: x, strength: {start: 0.1}}]", "inject.0.strength.curve: is missing"),
        # wrong types
        ("negative: 5", "negative: expected text, got 5; put it in quotes"),
        ("negative: true", "negative: expected text, got true; put it in quotes"),
        ("negative: 1e3", "negative: expected text, got 1000.0; put it in quotes"),
        ("negative:", "negative: expected text, got nothing"),
        ("negative: [a]", "negative: expected text, got a list"),
        ("id: 7", "id: expected text, got 7; put it in quotes"),
        ("size: 832", "size: expected text, got 832; put it in quotes"),
        ("size: [832, 480]", "size: expected text, got a list"),
        ("frames: 5.0", "frames: expected a whole number, got 5.0"),
        ("frames: 1e1", "frames: expected a whole number, got 10.0"),
        ("frames: '5'", "frames: expected a whole number, got '5'; write 5 without quotes"),
        ("frames: no", "frames: expected a whole number, got 'no'"),
        ("frames: true", "frames: expected a whole number, got true"),
        ("frames: .nan", "frames: expected a whole number, got nan"),
        ("seed: 0x10", "seed: expected a whole number, got '0x10'"),
        ("seed: 2024-01-01", "seed: expected a whole number, got '2024-01-01'"),
        ("seed: 12:30", "seed: expected a whole number, got '12:30'"),
        ("seed: [1]", "seed: expected a whole number, got a list"),
        ("measure: yes", "measure: expected true or false, got 'yes'"),
        ("measure: 1", "measure: expected true or false, got 1"),
        ("sampler: fast", "sampler: expected a mapping of keys to values, got 'fast'"),
        ("sampler:", "sampler: expected a mapping of keys to values, got nothing"),
        ("sampler: {shift: high}", "sampler.shift: expected a number, got 'high'"),
        ("sampler: {shift: .nan}", "sampler.shift: expected a number, got nan"),
        ("sampler: {guidance: [4, 3]}", "sampler.guidance: expected a number, got a list"),
        (
            "inject: [{prompt: x, expert: both of them}]",
            "inject.0.expert: 'both of them' is not one of 'high', 'low', 'both'",
        ),
        ("sampler: {guidance: .inf}", "sampler.guidance: expected a number, got inf"),
        ("sampler: {guidance: 1e999}", "sampler.guidance: expected a number, got inf"),
        ("labels: [a]", "labels: expected a mapping of keys to values, got a list"),
        ("labels: {a: }", "labels.a: expected text, got nothing"),
        ("labels: {a: [1]}", "labels.a: expected text, got a list"),
        ("labels: {a: .nan}", "labels.a: expected a number, got nan"),
        ("inject: {prompt: x}", "inject: expected a list, got a mapping"),
        ("inject: [x]", "inject.0: expected a mapping of keys to values, got 'x'"),
        ("inject: [{prompt: 5}]", "inject.0.prompt: expected text, got 5; put it in quotes"),
        ("inject: [{prompt: x, blocks: {a: 1}}]", "inject.0.blocks: expected text, got a mapping"),
        ("inject: [{prompt: x, blocks: [1, null]}]", "inject.0.blocks.1: expected text, got nothing"),
        (
            "inject: [{prompt: x, blocks: [1.5]}]",
            "inject.0.blocks.0: expected text, got 1.5; put it in quotes",
        ),
        ("inject: [{prompt: x, strength: max}]", "inject.0.strength: expected a number, got 'max'"),
        ("inject: [{prompt: x, strength: [1, a]}]", "inject.0.strength.1: expected a number, got 'a'"),
        ("inject: [{prompt: x, strength: .nan}]", "inject.0.strength: expected a number, got nan"),
        ("inject: [{prompt: x, steps: {sigma: 1}}]", "inject.0.steps.sigma: expected a list, got 1"),
        # values out of range
        ("frames: 0", "frames: should be greater than or equal to 1, got 0"),
        ("seed: -1", "seed: -1 is not a seed, and seeds are never random; write matrix: {seed: [0, 1]}"),
        (
            "seed: 9223372036854775808",
            "seed: 9223372036854775808 is too large, the last seed is 2^63-1; "
            "with `noise: cpu`, seed 0 draws the same noise",
        ),
        ("sampler: {steps: 0}", "sampler.steps: should be greater than or equal to 1, got 0"),
        ("sampler: {shift: 0}", "sampler.shift: should be greater than 0, got 0"),
        ("video: {crf: 52}", "video.crf: should be less than or equal to 51, got 52"),
        (
            "inject: [{prompt: x, strength: 11}]",
            "inject.0.strength: should be less than or equal to 10, got 11",
        ),
        ("inject: [{prompt: x, blocks: []}]", "inject.0.blocks: expected at least 1 values, got 0"),
        (
            "inject: [{prompt: x, steps: {sigma: [1]}}]",
            "inject.0.steps.sigma: expected at least 2 values, got 1",
        ),
        (
            "inject: [{prompt: x, steps: {sigma: [1, 2, 3]}}]",
            "inject.0.steps.sigma: expected at most 2 values, got 3",
        ),
        (
            "inject: [{prompt: x, strength: {curve: linear, end: 1e300}}]",
            "inject.0.strength.end: should be less than or equal to 10, got 1e+300",
        ),
        (
            "inject: [{prompt: x, strength: {curve: gaussian, width: 1e-300}}]",
            "inject.0.strength.width: should be greater than or equal to 0.001, got 1e-300",
        ),
        # not one of the words
        (
            "sampler: {solver: ddim}",
            "sampler.solver: 'ddim' is not one of 'unipc', 'dpm++', 'euler', 'distill4'",
        ),
        ("batch: all", "batch: 'all' is neither a number nor 'auto'"),
        ("batch: 1.5", "batch: expected a whole number, got 1.5"),
        ("noise: gpu", "noise: 'gpu' is not one of 'cpu', 'cuda'"),
        ("text: {max_tokens: 300}", "text.max_tokens: 300 is not one of 256, 512"),
        ("memory: {dtype: int8}", "memory.dtype: 'int8' is not one of 'auto', 'fp32', 'bf16', 'fp16', 'fp8'"),
        (
            "inject: [{prompt: x, branch: all}]",
            "inject.0.branch: 'all' is not one of 'cond', 'uncond', 'both'",
        ),
    ],
    ids=lambda text: text[:40],
)
def test_an_error_is_one_line_with_file_line_key_and_a_way_out(line: str, problem: str) -> None:
    assert load_problems(f"{MINIMAL}{line}\n") == [f"job.yaml:3: {problem}"]


def test_a_long_value_is_shown_in_part() -> None:
    (problem,) = load_problems(MINIMAL + "seed: " + "9" * 5000 + "\n")
    assert problem.startswith("job.yaml:3: seed: expected a whole number, got '999")
    assert len(problem) < 120


def test_a_misspelt_key_is_not_also_reported_as_missing() -> None:
    assert load_problems("model: m\npromt: x\n") == ["job.yaml:2: promt: unknown key; did you mean 'prompt'?"]


def test_a_missing_key_names_the_file() -> None:
    assert load_problems("seed: 1\n") == ["job.yaml: prompt: is missing"]


def test_all_problems_are_reported_at_once_in_the_order_of_the_file() -> None:
    text = "model: 5\nprompt: 1\nfrages: 3\nframes: 0\nsampler:\n  steps: x\n  solver: ddim\n"
    assert load_problems(text) == [
        "job.yaml:1: model: expected text, got 5; put it in quotes",
        "job.yaml:2: prompt: expected text, got 1; put it in quotes",
        "job.yaml:3: frages: unknown key; did you mean 'frames'?",
        "job.yaml:4: frames: should be greater than or equal to 1, got 0",
        "job.yaml:6: sampler.steps: expected a whole number, got 'x'",
        "job.yaml:7: sampler.solver: 'ddim' is not one of 'unipc', 'dpm++', 'euler', 'distill4'",
    ]


@pytest.mark.parametrize("text", ["- a\n", "hello\n", "null\n", "5\n"])
def test_a_job_is_a_mapping(text: str) -> None:
    assert load_problems(text) == ["job.yaml: a job is a mapping of keys to values"]


@pytest.mark.parametrize("items", ["", "[]", "{}", "x", "[x]", "[{seed: 1}, 2]"])
def test_items_are_a_list_of_mappings(items: str) -> None:
    line = "job.yaml:3: items: must be a list of mappings, one per shot"
    assert load_problems(f"{MINIMAL}items: {items}\n") == [line]


# ---- items ----

ITEMS = """\
model: m
prompt: a cat
sampler: {steps: 20, shift: 3}
labels: {series: a, take: 1}
inject:
  - prompt: fish
    blocks: early
  - prompt: birds
items:
  - id: plain
  - sampler: {guidance: 2}
    labels: {take: 2}
    inject:
      - prompt: rain
  - prompt: {embedding: x.safetensors}
    inject: []
    negative: ""
"""


def test_items_are_merged_mapping_by_mapping_and_lists_are_replaced() -> None:
    plain, second, third = (item.job for item in load_text(ITEMS).items)
    assert (plain.id, plain.sampler.steps, plain.labels) == ("plain", 20, {"series": "a", "take": 1})
    assert [r.prompt for r in plain.inject] == ["fish", "birds"]
    assert (second.sampler.steps, second.sampler.shift, second.sampler.guidance) == (20, 3, 2)
    assert second.labels == {"series": "a", "take": 2}
    assert [(r.prompt, r.blocks) for r in second.inject] == [("rain", "all")]
    assert (third.prompt, third.inject, third.negative) == (EmbeddingFile(embedding="x.safetensors"), [], "")
    assert third.labels == plain.labels


@pytest.mark.parametrize(
    ("path", "place"),
    [
        (("prompt",), "job.yaml:2: prompt"),
        (("sampler", "steps"), "job.yaml:3: sampler.steps"),
        (("sampler", "guidance"), "job.yaml:11: items.1.sampler.guidance"),
        (("sampler", "solver"), "job.yaml:11: items.1.sampler.solver"),
        (("labels", "series"), "job.yaml:4: labels.series"),
        (("labels", "take"), "job.yaml:12: items.1.labels.take"),
        (("inject", 0, "prompt"), "job.yaml:14: items.1.inject.0.prompt"),
        (("inject", 0, "blocks"), "job.yaml:14: items.1.inject.0.blocks"),
        (("inject",), "job.yaml:13: items.1.inject"),
        (("size",), "job.yaml: size"),
        ((), "job.yaml"),
    ],
    ids=str,
)
def test_a_key_of_an_item_has_the_line_that_set_it(path: tuple[Any, ...], place: str) -> None:
    assert load_text(ITEMS).items[1].location(*path) == place


def test_an_error_that_items_share_is_reported_once() -> None:
    text = "model: m\nprompt: a\nsampler: {steps: 0}\nitems:\n  - sampler: {guidance: 2}\n  - seed: 1\n"
    assert load_problems(text) == ["job.yaml:3: sampler.steps: should be greater than or equal to 1, got 0"]


def test_errors_of_items_have_their_own_lines() -> None:
    text = MINIMAL + (
        "items:\n  - seed: x\n  - sampler:\n      steps: 0\n  - inject:\n      - blocks: 3\n  - sed: 1\n"
    )
    assert load_problems(text) == [
        "job.yaml:4: items.0.seed: expected a whole number, got 'x'",
        "job.yaml:6: items.1.sampler.steps: should be greater than or equal to 1, got 0",
        "job.yaml:8: items.2.inject.0.prompt: is missing",
        "job.yaml:9: items.3.sed: unknown key; did you mean 'seed'?",
    ]


def test_a_key_that_only_some_items_set_is_missing_in_the_others() -> None:
    text = "seed: 3\nitems:\n  - prompt: a\n  - seed: 1\n  - {}\n"
    assert load_problems(text) == [
        "job.yaml:4: items.1.prompt: is missing",
        "job.yaml:5: items.2.prompt: is missing",
    ]
    assert load_problems("seed: 3\nitems:\n  - seed: 1\n  - seed: 2\n") == ["job.yaml: prompt: is missing"]


def test_items_have_no_items_of_their_own() -> None:
    (problem,) = load_problems(MINIMAL + "items:\n  - items: [{seed: 1}]\n")
    assert problem.startswith("job.yaml:4: items.0.items: unknown key; known: ")


def test_an_item_may_set_the_required_keys() -> None:
    job = load_text("items:\n  - {model: m, prompt: a}\n  - {model: n, prompt: b}\n")
    assert [item.job.model for item in job.items] == ["m", "n"]


# ---- files ----


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    for path, why in (
        (tmp_path / "no.yaml", "cannot be read: No such file or directory"),
        (tmp_path, "is a folder, not a job file"),
        (tmp_path / ("x" * 300), "cannot be read: File name too long"),
        (Path("/dev/null/job.yaml"), "cannot be read: Not a directory"),
    ):
        with pytest.raises(JobError) as caught:
            load(path)
        assert str(caught.value) == f"{path}: {why}"


def test_the_example_jobs_load() -> None:
    folder = Path(__file__).parents[2] / "configs"
    jobs = {*folder.glob("*.yaml")} - {folder / "models.yaml"}
    assert all(load(path).items for path in jobs)


# ---- anything at all ----

_SCALAR = st.sampled_from(
    [None, True, 0, -1, 10**40, 0.5, float("nan"), float("inf"), "", "x", "no", "7", "\0", "27-39", "a" * 300]
)
_KEYS = st.sampled_from(
    [*known_keys(()), *known_keys(("sampler",)), *known_keys(("inject",)), "embedding", "sigma", "<x>", ""]
)
_ANY = st.recursive(
    _SCALAR,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(_KEYS, _ANY, max_size=5))
@settings(max_examples=150, deadline=None)
def test_any_structure_gives_a_job_or_a_job_error(changes: dict[str, Any]) -> None:
    for job in (changes, tiny_job() | changes):
        text = yaml.safe_dump(job, allow_unicode=False, sort_keys=False)
        try:
            refused = "" if load_text(text).items else "no items"
        except JobError as error:
            refused = str(error)
        assert all(line.startswith("job.yaml") for line in refused.split("\n") if refused)
