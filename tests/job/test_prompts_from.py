"""`prompts_from`: lines become items, and a mistake has the line of its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from wancli.errors import JobError
from wancli.job.loader import Item, load
from wancli.job.matrix import MAX_SHOTS


def load_items(folder: Path, data: bytes, name: str = "lists/p.txt", more: str = "") -> tuple[Item, ...]:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    (folder / "job.yaml").write_text(f"model: m\nprompts_from: {name}\n{more}")
    return load(folder / "job.yaml").items


def load_problems(folder: Path, data: bytes, name: str = "lists/p.txt", more: str = "") -> list[str]:
    with pytest.raises(JobError) as caught:
        load_items(folder, data, name, more)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def test_a_text_file_has_a_prompt_per_line_except_comments_and_empty_lines(tmp_path: Path) -> None:
    items = load_items(tmp_path, "\ufeff# cats\n a cat \r\n\n\t# no\na dog: #2, \U0001f415\nno".encode())
    assert [item.job.prompt for item in items] == ["a cat", "a dog: #2, \U0001f415", "no"]
    assert items[1].location("prompt") == f"{tmp_path}/lists/p.txt:5: prompt"
    assert items[1].location("model") == f"{tmp_path}/job.yaml:1: model"
    assert items[1].location("seed") == f"{tmp_path}/job.yaml: seed"


def test_json_lines_may_set_any_key_of_a_job(tmp_path: Path) -> None:
    data = (
        b'{"prompt": "a", "id": "x", "labels": {"k": 1}, "loras": [{"path": "l"}]}\n\n# note\n'
        b'{"prompt": "\\ud83d\\ude00", "sampler": {"steps": 3}}\n'
    )
    first, second = load_items(tmp_path, data, "lists/p.jsonl", "sampler: {shift: 2}\nid: base\n")
    assert (first.job.prompt, first.job.id, first.job.labels) == ("a", "x", {"k": 1})
    assert (second.job.prompt, second.job.id) == ("\U0001f600", "base")
    assert (second.job.sampler.steps, second.job.sampler.shift) == (3, 2)
    assert first.base_dir("loras", 0, "path") == tmp_path / "lists"
    assert second.location("sampler", "steps") == f"{tmp_path}/lists/p.jsonl:4: sampler.steps"
    assert second.location("sampler", "shift") == f"{tmp_path}/job.yaml:3: sampler.shift"


def test_prompts_are_combined_with_a_matrix(tmp_path: Path) -> None:
    items = load_items(tmp_path, b"a\nb\n", more="matrix: {seed: [1, 2]}\n")
    assert [(item.job.prompt, item.job.seed) for item in items] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert [item.job.id for item in items] == ["0000-seed1", "0000-seed2", "0001-seed1", "0001-seed2"]


@pytest.mark.parametrize(
    ("data", "name", "lines"),
    [
        (b"", "p.txt", ["p.txt: contains no prompts"]),
        (b"# a\n\n", "p.txt", ["p.txt: contains no prompts"]),
        (
            b"a\n\xff\nb\xfe\n",
            "p.txt",
            ["p.txt:2: byte 0 of the line is not UTF-8", "p.txt:3: byte 1 of the line is not UTF-8"],
        ),
        (b"a\0b\n", "p.txt", ["p.txt:1: prompt: contains NUL, which names and prompts cannot"]),
        (b"[1]\n", "p.jsonl", ["p.jsonl:1: is not a JSON object"]),
        (b'{"prompt": "a"}\n{"prompt":}\n', "p.jsonl", ["p.jsonl:2: is not JSON: Expecting value"]),
        (
            b'{"prompt": "a", "prompt": "b"}\n',
            "p.jsonl",
            ["p.jsonl:1: is not JSON: key 'prompt' appears twice"],
        ),
        (
            b'{"prompt": "\\ud800"}\n',
            "p.jsonl",
            ["p.jsonl:1: contains half of a surrogate pair, which is not a character"],
        ),
        (
            b'{"a": [{"b\\u0000": 1}]}\n',
            "p.jsonl",
            ["p.jsonl:1: contains NUL, which names and prompts cannot"],
        ),
        (
            b'{"prompt": "a", "sed": 1}\n{"prompt": 5}\n'
            b'{"prompt": "a", "inject": [{"blocks": 1}]}\n{"seed": NaN}\n',
            "p.jsonl",
            [
                "p.jsonl:1: sed: unknown key; did you mean 'seed'?",
                "p.jsonl:2: prompt: expected text, got 5; put it in quotes",
                "p.jsonl:3: inject.0.prompt: is missing",
                "p.jsonl:4: prompt: is missing",
                "p.jsonl:4: seed: expected a whole number, got nan",
            ],
        ),
        (
            b"a\n" * (MAX_SHOTS + 1),
            "p.txt",
            [f"p.txt: contains {MAX_SHOTS + 1:,} prompts; the limit is {MAX_SHOTS:,}"],
        ),
        (b"A cat, red\nA dog\n", "p.csv", ["p.csv:1: has no column `prompt`"]),
        (b'prompt\n"a\nb\n', "p.csv", ["p.csv:3: is not CSV: unexpected end of data"]),
        (b"prompt,seed\na,b,c\n\nd,x\n", "p.csv", ["p.csv:2: 3 cells, the table has 2 columns"]),
        (
            b"prompt,seed,sampler.step\na,x,1\n,2,\n",
            "p.csv",
            [
                "p.csv:2: seed: expected a whole number, got 'x'",
                "p.csv:2: sampler.step: unknown key; did you mean 'steps'?",
                "p.csv:3: prompt: is missing",
            ],
        ),
        (b"prompt\na\n\xe9\n", "p.csv", ["p.csv:3: byte 9 is not UTF-8"]),
        (b"a" * (2**24 + 1), "p.txt", ["p.txt: is larger than 16 MiB"]),
    ],
    ids=lambda value: str(value)[:24],
)
def test_an_error_has_the_file_and_the_line(tmp_path: Path, data: bytes, name: str, lines: list[str]) -> None:
    assert load_problems(tmp_path, data, name) == lines


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (
            b'\xef\xbb\xbfprompt,seed,sampler.steps,id\r\n"A cat, #1: ""red""",1,,7\r\n\r\nA dog,2,5,\r\n',
            "p.csv",
        ),
        (b'prompt;seed;sampler.steps;id\n"A cat, #1: ""red""";1;;7\nA dog;2;5;\n', "p.CSV"),
        (b'seed\tprompt\tsampler.steps\tid\n1\t"A cat, #1: ""red"""\t\t7\n2\tA dog\t5\n', "p.tsv"),
    ],
)
def test_a_row_of_a_table_sets_the_keys_that_its_first_row_names(
    tmp_path: Path, data: bytes, name: str
) -> None:
    cat, dog = (item.job for item in load_items(tmp_path, data, name))
    assert (cat.prompt, cat.seed, cat.sampler.steps, cat.id) == ('A cat, #1: "red"', 1, None, "7")
    assert (dog.prompt, dog.seed, dog.sampler.steps, dog.id) == ("A dog", 2, 5, None)


def test_deeply_nested_json_is_refused(tmp_path: Path) -> None:
    (line,) = load_problems(tmp_path, b'{"a": ' + b"[" * 100_000 + b"\n", "p.jsonl")
    assert line.startswith("p.jsonl:1: is not JSON: ")


def test_a_missing_file_is_an_error_of_the_job(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("prompts_from: no.txt\n")
    with pytest.raises(JobError) as caught:
        load(tmp_path / "job.yaml")
    assert str(caught.value) == (
        f"{tmp_path}/job.yaml:1: prompts_from: 'no.txt' cannot be read: No such file or directory"
    )
    assert caught.value.hint == f"Looked for {tmp_path}/no.txt."


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ("items: [{seed: 1}]\n", "job.yaml:2: prompts_from: items and prompts_from both list shots; use one"),
        ("seed: x\n", "job.yaml:3: seed: expected a whole number, got 'x'"),
    ],
)
def test_an_error_of_the_job_is_reported_in_the_job(tmp_path: Path, more: str, problem: str) -> None:
    assert load_problems(tmp_path, b"a\nb\n", more=more) == [problem]
