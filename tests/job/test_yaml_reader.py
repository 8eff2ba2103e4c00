"""The YAML that a job may be written in: what each scalar becomes, and one line for each refusal."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from wancli.errors import JobError
from wancli.job.yaml_reader import MAX_BYTES, MAX_DEPTH, MAX_NODES, read_yaml


def value_of(scalar: str) -> Any:
    return read_yaml(f"a: {scalar}\n".encode(), "job.yaml")[0]["a"]


def refusal(text: str | bytes) -> tuple[str, str]:
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    with pytest.raises(JobError) as caught:
        read_yaml(data, "job.yaml")
    return str(caught.value), caught.value.hint


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        # What YAML 1.1 would make a bool, a base-60 number or a date is text.
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("12:30", "12:30"),
        ("12:30:45", "12:30:45"),
        ("2024-01-01", "2024-01-01"),
        ("2024-01-01 10:00:00", "2024-01-01 10:00:00"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("0o17", "0o17"),
        ("0b11", "0b11"),
        ("1e", "1e"),
        (".", "."),
        ("+", "+"),
        ("832x480", "832x480"),
        ("27-39", "27-39"),
        ("0-40%", "0-40%"),
        ("=", "="),
        ("<<", "<<"),
        ("nan", "nan"),
        ("infinity", "infinity"),
        # What YAML 1.2's core schema calls null, bool, int and float.
        ("", None),
        ("~", None),
        ("null", None),
        ("true", True),
        ("FALSE", False),
        ("0", 0),
        ("-0", 0),
        ("+7", 7),
        ("-42", -42),
        ("9223372036854775807", 2**63 - 1),
        ("1e3", 1000.0),
        ("1E-3", 0.001),
        ("-1.5e+2", -150.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("0.0", 0.0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("1e999", math.inf),
        # Quotes make anything text.
        ("'true'", "true"),
        ('"010"', "010"),
        ("'1e3'", "1e3"),
        ('"\\x41\\u00e9\\U0001f600"', "Aé😀"),
        # JSON writes a character beyond 16 bits as two halves.
        (r'"\ud83d\ude00!"', "😀!"),
        ("[1, two, 3.0]", [1, "two", 3.0]),
        ("{x: {y: z}}", {"x": {"y": "z"}}),
        ("|\n  one\n  two", "one\ntwo\n"),
        (">-\n  one\n  two", "one two"),
    ],
)
def test_a_scalar_is_read_by_the_core_schema_of_yaml_1_2(scalar: str, value: Any) -> None:
    found = value_of(scalar)
    assert found == value
    assert type(found) is type(value)


def test_not_a_number_is_a_float() -> None:
    assert math.isnan(value_of(".nan"))


@pytest.mark.parametrize("digits", [31, 40, 5000])
def test_a_whole_number_of_any_length_never_becomes_a_rounded_float(digits: int) -> None:
    assert str(value_of("9" * digits)) == "9" * digits


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("", "job.yaml: is empty", "Start with: prompt: ..."),
        ("\n\n", "job.yaml: is empty", "Start with: prompt: ..."),
        ("# a comment\n", "job.yaml: is empty", "Start with: prompt: ..."),
        ("a: 1\nb: 2\na: 3\n", "job.yaml:3: key 'a' appears twice, on lines 1 and 3", ""),
        ("x:\n  a: 1\n  a: 2\n", "job.yaml:3: key 'a' appears twice, on lines 2 and 3", ""),
        ("{a: 1, a: 2}\n", "job.yaml:1: key 'a' appears twice, on lines 1 and 1", ""),
        ("1: a\n'1': b\n", "job.yaml:2: key '1' appears twice, on lines 1 and 2", ""),
        (
            "a: &x 1\n",
            "job.yaml:1: no alias *x uses the anchor &x",
            "Quote a text that starts with & or *.",
        ),
        (
            "a: 1\nb: *x\n",
            "job.yaml:2:4: is not YAML: found undefined alias 'x'",
            "Quote a text that starts with & or *.",
        ),
        (
            "a: &x [1]\nb: &y [*x, *x]\n",
            "job.yaml:2: no alias *y uses the anchor &y",
            "Quote a text that starts with & or *.",
        ),
        ("a: !!int '5'\n", "job.yaml:1: tags (!) are not supported", "Quote a text that starts with !."),
        ("a: !x\n", "job.yaml:1: tags (!) are not supported", "Quote a text that starts with !."),
        ("a: ! x\n", "job.yaml:1: tags (!) are not supported", "Quote a text that starts with !."),
        (
            "a: !!python/object/apply:os.system ['echo hi']\n",
            "job.yaml:1: tags (!) are not supported",
            "Quote a text that starts with !.",
        ),
        ("a: !!binary aGk=\n", "job.yaml:1: tags (!) are not supported", "Quote a text that starts with !."),
        (
            "a:\n\tb: 1\n",
            r"job.yaml:2:1: is not YAML: found character '\t' that cannot start any token",
            "Indent with spaces.",
        ),
        (
            "a: @x\n",
            "job.yaml:1:4: is not YAML: found character '@' that cannot start any token",
            "A text that starts with one of %@`&*!|>[{ needs quotes.",
        ),
        (
            "a: b: c\n",
            "job.yaml:1:5: is not YAML: mapping values are not allowed here",
            "A text with ': ' in it needs quotes.",
        ),
        (
            "a: 1\n---\nb: 2\n",
            "job.yaml:2:1: is not YAML: found another document",
            "A file is one job; `items` makes several shots of it.",
        ),
        ("a: [1, 2\n", "job.yaml:2:1: is not YAML: expected ',' or ']', but got '<stream end>'", ""),
        ("a: 'x\n", "job.yaml:2:1: is not YAML: found unexpected end of stream", ""),
        (
            "a: 1\n b: 2\n",
            "job.yaml:2:3: is not YAML: mapping values are not allowed here",
            "A text with ': ' in it needs quotes.",
        ),
        ("? [a]\n: b\n", "job.yaml:1: a key must be a word", ""),
        ("? {a: b}\n: c\n", "job.yaml:1: a key must be a word", ""),
        (
            "x:\n  a: 010\n",
            "job.yaml:2: x.a: 010 has a leading zero",
            "Write 10 for the number, '010' for the text.",
        ),
        (
            "a: [1, -007]\n",
            "job.yaml:1: a.1: -007 has a leading zero",
            "Write -7 for the number, '-007' for the text.",
        ),
        ("a: 1\nb: x\0y\n", "job.yaml:2: is not YAML: the character U+0000 is not allowed", ""),
        ("a: 1\nb: \x07\n", "job.yaml:2: is not YAML: the character U+0007 is not allowed", ""),
        ('a: 1\nb: "x\\0y"\n', "job.yaml:2: b: contains NUL, which names and prompts cannot", ""),
        ('b: "\\ud800"\n', "job.yaml:1: b: contains half of a surrogate pair, which is not a character", ""),
        (
            'b: ["\\ude00\\ud83d"]\n',
            "job.yaml:1: b.0: contains half of a surrogate pair, which is not a character",
            "",
        ),
        (
            '"\\ud800": 1\n',
            "job.yaml:1: a key: contains half of a surrogate pair, which is not a character",
            "",
        ),
        ('x: {"\\0": 1}\n', "job.yaml:1: a key of x: contains NUL, which names and prompts cannot", ""),
        (b"a: 1\nb: \xff\n", "job.yaml:2: byte 8 is not UTF-8", ""),
        (b"\xff\xfea\0:\0", "job.yaml:1: byte 0 is not UTF-8", ""),
        (b"a: \xed\xa0\x80\n", "job.yaml:1: byte 3 is not UTF-8", ""),
        (
            "a" * (MAX_BYTES + 1),
            f"job.yaml: is larger than {MAX_BYTES // 1024} KiB",
            "Move the shots into a .jsonl file: prompts_from: FILE reads 10,000 of them, up to 16 MiB.",
        ),
        (
            "a:\n  " + "[" * 40 + "]" * 40,
            f"job.yaml:2: more than {MAX_DEPTH} levels or {MAX_NODES} values",
            "",
        ),
        (
            "- 1\n" * (MAX_NODES + 1),
            f"job.yaml:{MAX_NODES}: more than {MAX_DEPTH} levels or {MAX_NODES} values",
            "",
        ),
    ],
    ids=lambda text: str(text)[:24],
)
def test_a_refusal_is_one_line_with_the_place_and_a_way_out(
    text: str | bytes, message: str, hint: str
) -> None:
    assert refusal(text) == (message, hint)


def test_a_byte_order_mark_is_not_part_of_the_first_key() -> None:
    assert read_yaml(b"\xef\xbb\xbfa: 1\n", "job.yaml")[0] == {"a": 1}


def test_comments_behind_unquoted_texts_are_kept_with_their_keys() -> None:
    data = b"a: x #1 y\nb: 'x' #2\nc: 7 #3\nd: [u #4\n, v]\ne: x#y\n\xc3\xa9: \xc3\xbc # 6\r\n# 7\n"
    assert read_yaml(data, "job.yaml").comments == {("a",): "#1 y", ("d", 0): "#4", ("\xe9",): "# 6"}


def test_windows_line_ends_count_as_one_line_each() -> None:
    value, lines, _ = read_yaml(b"a: 1\r\nb:\r\n  c: 2\r\n", "job.yaml")
    assert value == {"a": 1, "b": {"c": 2}}
    assert lines["b", "c"] == 3


def test_every_key_and_list_entry_has_its_line() -> None:
    lines = read_yaml(b"# top\na: 1\n\nb:\n  - c: 2\n    d: [3,\n        4]\n", "job.yaml").lines
    assert lines == {
        (): 2,
        ("a",): 2,
        ("b",): 4,
        ("b", 0): 5,
        ("b", 0, "c"): 5,
        ("b", 0, "d"): 6,
        ("b", 0, "d", 0): 6,
        ("b", 0, "d", 1): 7,
    }


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abcé😀", max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(_JSON)
@settings(max_examples=100, deadline=None)
def test_json_is_read_as_it_was_written(value: Any) -> None:
    assert read_yaml(json.dumps({"a": value}).encode(), "job.json")[0] == {"a": value}


def answer(data: bytes) -> tuple[Any, str]:
    """What was read, and the refusal; anything else than a JobError goes through."""
    try:
        return read_yaml(data, "job.yaml")[0], ""
    except JobError as error:
        return None, str(error)


@given(st.text(st.sampled_from("ab1.:-,?&*!|>%@`'\"[]{}#~\\ \t\n\r\0\ufeff\x85\u2028e0_<"), max_size=40))
@settings(max_examples=300, deadline=None)
def test_a_text_that_is_refused_is_a_job_error(text: str) -> None:
    value, refused = answer(text.encode())
    json.dumps(value)
    assert refused.startswith("job.yaml") == (refused != "")
    assert "\n" not in refused


@given(st.binary(max_size=40))
@settings(max_examples=100, deadline=None)
def test_bytes_that_are_refused_are_a_job_error(data: bytes) -> None:
    assert "\n" not in answer(data)[1]


def test_the_aliases_that_a_program_writes_are_read() -> None:
    rule = {"prompt": "fish", "blocks": ["early", 30]}
    job = {"a": [rule], "items": [{"inject": [rule, rule]}, {"inject": [rule]}]}
    text = yaml.safe_dump(job, sort_keys=False)
    assert "&id001" in text
    document = read_yaml(text.encode(), "job.yaml")
    assert document.value == job
    assert document.lines["items", 0, "inject", 1, "blocks", 1] == document.lines["a", 0, "blocks", 1]


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 8)}]\n" for a, b in itertools.pairwise("abcdefgh"))
        + "i: *h\n",
        "a: &a [*a, *a]\n",
        "a: &a {b: *a}\n",
    ],
    ids=["billion laughs", "a list in itself", "a mapping in itself"],
)
def test_what_aliases_expand_to_is_limited(text: str) -> None:
    with pytest.raises(JobError, match=f"more than {MAX_DEPTH} levels or {MAX_NODES} values"):
        read_yaml(text.encode(), "job.yaml")
