"""Files that a job extends: what wins, where paths start, where mistakes are, and what goes too far."""

from __future__ import annotations

from pathlib import Path

import pytest

from wancli.errors import JobError
from wancli.job.loader import JobFile, load, parse


def write_jobs(folder: Path, **files: str) -> Path:
    """Writes NAME.yaml for each, `sub__x` into sub/x.yaml; the job is job.yaml."""
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "job.yaml"


def load_problems(path: Path) -> list[str]:
    with pytest.raises(JobError) as caught:
        load(path)
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()


def test_a_text_that_ends_before_a_hash_without_a_blank_is_a_warning_with_line_and_way_out(
    tmp_path: Path,
) -> None:
    job = write_jobs(
        tmp_path,
        base="negative: fog #2 dark\n",
        job="extends: base.yaml\n# top\nprompt: A circle # the hero\nseed: 7 #lucky\n"
        "items:\n  - prompt: A red circle #1 moves\n  - prompt: 'A red circle #1 moves'\n"
        "matrix:\n  inject.0.prompt: [a, b #3\n    ]\ninject: [{prompt: x}]\n",
    )
    told = [warning.replace(f"{tmp_path}/", "") for warning in load(job).warnings]
    rest = "is read as a comment, not as part of the text; if it belongs to the text, put the text in quotes"
    assert told == [
        f"job.yaml:6: items.0.prompt: '#1 moves' {rest}",
        f"job.yaml:9: matrix.inject.0.prompt.1: '#3' {rest}",
        f"base.yaml:1: negative: '#2 dark' {rest}",
    ]


def test_the_job_overrides_the_last_file_and_that_the_first(tmp_path: Path) -> None:
    job = write_jobs(
        tmp_path,
        one="prompt: one\nseed: 1\nsampler: {steps: 1, shift: 1}\n"
        "labels: {from: one}\ninject: [{prompt: x}]\n",
        two="seed: 2\nsampler: {shift: 2}\n",
        job="extends: [one.yaml, two.yaml]\nsampler: {guidance: 3}\ninject: []\n",
    )
    (item,) = load(job).items
    assert (item.job.prompt, item.job.seed, item.job.labels, item.job.inject) == (
        "one",
        2,
        {"from": "one"},
        [],
    )
    assert (item.job.sampler.steps, item.job.sampler.shift, item.job.sampler.guidance) == (1, 2, 3)


def test_an_extended_file_may_extend_and_one_file_may_be_extended_twice(tmp_path: Path) -> None:
    job = write_jobs(
        tmp_path,
        base="prompt: base\nseed: 1\n",
        left="extends: base.yaml\nframes: 5\n",
        right="extends: base.yaml\nsize: 16x16\n",
        job="extends: [left.yaml, right.yaml]\n",
    )
    (item,) = load(job).items
    assert (item.job.prompt, item.job.seed, item.job.frames, item.job.size) == ("base", 1, 5, "16x16")


def test_the_axes_of_a_matrix_are_merged_and_items_are_replaced(tmp_path: Path) -> None:
    job = write_jobs(
        tmp_path,
        base="prompt: p\nmatrix: {seed: [1, 2]}\nitems: [{id: old}]\n",
        job="extends: base.yaml\nmatrix: {noise: [cpu]}\nitems: [{id: new}]\n",
    )
    assert [item.job.id for item in load(job).items] == ["new-seed1-cpu", "new-seed2-cpu"]


def test_a_relative_path_starts_from_the_folder_of_the_file_that_sets_it(tmp_path: Path) -> None:
    job = write_jobs(
        tmp_path,
        sub__base="model: {transformer: a, vae: b}\nloras: [{path: x}]\nprompts_from: p.txt\n",
        job="extends: sub/base.yaml\nmodel: {vae: c}\nnegative: {embedding: n}\n",
    )
    (tmp_path / "sub" / "p.txt").write_text("a cat\n")
    file = load(job)
    (item,) = file.items
    sub = tmp_path / "sub"
    assert item.job.prompt == "a cat"
    assert item.base_dir("model", "transformer") == item.base_dir("loras", 0, "path") == sub
    assert (
        item.base_dir("model", "vae") == item.base_dir("negative", "embedding") == file.directory == tmp_path
    )


def test_an_error_names_the_file_and_line_that_set_the_key(tmp_path: Path) -> None:
    job = write_jobs(
        tmp_path,
        sub__base="# shared\nprompt: p\nseed: x\nsampler:\n  step: 3\nmatrix:\n  frames: [0]\n",
        job="extends: sub/base.yaml\nsize: 5\n",
    )
    assert load_problems(job) == [
        "job.yaml:2: size: expected text, got 5; put it in quotes",
        "sub/base.yaml:3: seed: expected a whole number, got 'x'",
        "sub/base.yaml:5: sampler.step: unknown key; did you mean 'steps'?",
        "sub/base.yaml:7: matrix.frames.0: should be greater than or equal to 1, got 0",
    ]


def test_a_missing_key_is_missing_in_the_job(tmp_path: Path) -> None:
    job = write_jobs(tmp_path, base="seed: 1\n", job="extends: base.yaml\nframes: 5\n")
    assert load_problems(job) == ["job.yaml: prompt: is missing"]


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"job": "extends: job.yaml\n"}, "job.yaml:1: extends: goes in a circle: job.yaml -> job.yaml"),
        (
            {"job": "seed: 1\nextends: a.yaml\n", "a": "extends: [b.yaml]\n", "b": "extends: a.yaml\n"},
            "b.yaml:1: extends: goes in a circle: a.yaml -> b.yaml -> a.yaml",
        ),
        (
            {"job": "extends: no.yaml\n"},
            "job.yaml:1: extends: 'no.yaml' cannot be read: No such file or directory",
        ),
        ({"job": "extends: [.]\n"}, "job.yaml:1: extends.0: '.' cannot be read: Is a directory"),
        ({"job": "extends: 5\n"}, "job.yaml:1: extends: must be the name of a job file, or a list of names"),
        (
            {"job": "extends: ['']\n"},
            "job.yaml:1: extends: must be the name of a job file, or a list of names",
        ),
        ({"job": "extends: a.yaml\n", "a": "[1]\n"}, "a.yaml: a job is a mapping of keys to values"),
        ({"job": "extends: a.yaml\n", "a": "a: [\n"}, "a.yaml:2:1: is not YAML: "),
        (
            {"job": "extends: s0.yaml\n"} | {f"s{i}": f"extends: s{i + 1}.yaml\n" for i in range(12)},
            "s7.yaml:1: extends: more than 8 files extend one another",
        ),
        (
            {"job": f"extends: [{', '.join(['a.yaml'] * 65)}]\n", "a": "prompt: p\n"},
            "job.yaml:1: extends.64: more than 64 files",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_file_that_cannot_be_extended_is_one_error(
    tmp_path: Path, files: dict[str, str], problem: str
) -> None:
    (line,) = load_problems(write_jobs(tmp_path, **files))
    assert line.startswith(problem)


def test_a_job_on_stdin_extends_from_the_current_folder(tmp_path: Path) -> None:
    write_jobs(tmp_path, base="prompt: p\n")
    job: JobFile = parse(b"extends: base.yaml\n", "stdin", "stdin", tmp_path)
    assert job.items[0].location("prompt") == "base.yaml:1: prompt"
