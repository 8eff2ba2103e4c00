"""Job files that nobody would write: each is a plan or one JobError."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import EXAMPLES, Budget
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jobs import CAT, TINY, rule, tiny_job

from wancli.job.cli_overrides import NO_OVERRIDES
from wancli.job.loader import parse
from wancli.job.schema import Job
from wancli.job.validation import EXPANSION_KEYS
from wancli.plan.planner import build_plan

ROOT = Path(__file__).parents[2]
SEEDS = [
    *((ROOT / "configs" / name).read_bytes() for name in ("demo.yaml", "sweep.yaml")),
    yaml.safe_dump(tiny_job(inject=[rule()], items=[{"seed": 1}, {"prompt": "a dog"}])).encode(),
    yaml.safe_dump(
        tiny_job(matrix={"seed": [1, 2], "inject.0.strength": [0.1, 0.9]}, inject=[rule()])
    ).encode(),
    json.dumps(tiny_job(zip={"seed": [1, 2], "prompt": ["a", "b"]}, exclude=[{"seed": 1}])).encode(),
]
PIECES = [
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b": ",
        b"- ",
        b"\n",
        b"  ",
        b"\t",
        b"&a ",
        b"*a",
        b"!!python/object ",
        b"? ",
        b"|\n",
        b">-\n",
    ),
    *(
        b'"',
        b"'",
        b"\\",
        b"#",
        b"%YAML 1.2\n---\n",
        b"...\n",
        b"<<: ",
        b"\xff",
        b"\x00",
        b"\xef\xbb\xbf",
        b"\xe2\x80\xae",
    ),
    *(
        b".nan",
        b"-.inf",
        b"1e999",
        b"010",
        b"0x10",
        b"12:30",
        b"no",
        b"~",
        b"9" * 400,
        b"\\ud800",
        b"[" * 40,
        b"{a: " * 40,
    ),
]


def try_job(data: bytes, folder: Path) -> None:
    """Reads a job and plans it, where it has few shots: thousands take their time with good reason."""
    jobs = parse(data, "fuzz", "fuzz.yaml", folder, NO_OVERRIDES)
    if len(jobs.items) <= 8:
        build_plan(jobs, folder / "memo.json")


def mutate(draw: random.Random) -> bytes:
    """A job file with a few pieces cut, doubled, put elsewhere, or put in."""
    data = draw.choice(SEEDS)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        a, b = sorted(draw.randrange(len(data) + 1) for _ in range(2))
        b = min(b, a + draw.choice((1, 4, 40)))
        c = draw.randrange(len(data) + 1)
        match draw.randrange(5):
            case 0:
                data = data[:a] + data[b:]
            case 1:
                data = data[:b] + data[a:]
            case 2:
                data = data[:c] + draw.choice(PIECES) + data[c:]
            case 3:
                data = data[:c] + data[a:b] + data[c:]
            case _:
                data = data[:a] + draw.randbytes(b - a) + data[b:]
    return data


def test_any_change_to_the_text_of_a_job_is_accepted_or_refused(tmp_path: Path) -> None:
    draw, budget = random.Random(5), Budget(6)
    while not budget.over:
        data = mutate(draw)
        with budget.attempt(data):
            try_job(data, tmp_path)
    budget.check()


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(
        [0, 1, -1, 2**31, 2**63, 2**64, 10**400, 0.0, -0.0, 1e308, float("nan"), float("inf"), 41, 513]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        [
            "",
            "all",
            "27-39",
            "-1",
            "9-3",
            "late",
            "../x",
            "/",
            "~",
            "{slug}",
            "{",
            "\ud800",
            "\0",
            "80x",
            "64x64",
        ]
    ),
    st.sampled_from(
        ["auto", "10s", "1h", "-5s", "24GiB", "0", "sigma", "1-", "cond", "replace", "default", "file.txt"]
    ),
)
ODDER = st.recursive(
    ODD,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8) | st.sampled_from([*Job.model_fields]), inner, max_size=4)
    ),
    max_leaves=8,
)


def values_near(schema: dict[str, Any], root: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that the schema of a job allows, and here and there one it does not."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    choices: list[st.SearchStrategy[Any]] = [ODDER]
    if "enum" in schema:
        choices += [st.sampled_from(schema["enum"])] * 6
    for key in ("anyOf", "oneOf"):
        choices += [values_near(one, root) for one in schema.get(key, [])]
    match schema.get("type"):
        case "object":
            known = {name: values_near(one, root) for name, one in schema.get("properties", {}).items()}
            choices += [st.fixed_dictionaries({}, optional=known)] * 6
        case "array":
            choices += [st.lists(values_near(schema.get("items", {}), root), max_size=3)] * 6
        case "integer":
            choices += [st.integers(low := schema.get("minimum", 0), low + 50)] * 6
        case "number":
            choices += [st.floats(-1, 2)] * 6
        case "string":
            choices += [st.sampled_from([CAT, "a", "{id}.mp4", "all", "0-3", "high"])] * 6
    return st.one_of(choices)


SCHEMA = Job.model_json_schema()
KEYS = {
    name: values_near(one, SCHEMA)
    for name, one in SCHEMA["properties"].items()
    if name not in ("model", "prompt")
}
SHAPES = {
    "items": st.lists(st.fixed_dictionaries({}, optional=KEYS), max_size=3) | ODDER,
    "matrix": st.dictionaries(
        st.sampled_from([*KEYS, "sampler.steps", "inject.0.strength"]), st.lists(ODD, max_size=2)
    )
    | ODDER,
    **{name: ODDER for name in EXPANSION_KEYS if name not in ("items", "matrix")},
}


def test_any_structure_of_a_job_is_accepted_or_refused(tmp_path: Path) -> None:
    budget = Budget(6.5)

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @given(st.fixed_dictionaries({"prompt": st.just(CAT) | ODD}, optional=KEYS | SHAPES))
    def each(keys: dict[str, Any]) -> None:
        data = to_yaml(tiny_job(TINY) | keys)
        with budget.attempt(data):
            try_job(data, tmp_path)

    while not budget.over:
        each()
    budget.check()


def to_yaml(keys: dict[str, Any]) -> bytes:
    """JSON, which is YAML, with the numbers that only YAML has."""
    text = json.dumps(keys)
    for ours, theirs in (("NaN", ".nan"), ("-Infinity", "-.inf"), ("Infinity", ".inf")):
        text = text.replace(ours, theirs)
    return text.encode()


@pytest.mark.parametrize("seed", range(len(SEEDS)))
def test_the_unchanged_files_are_jobs(seed: int, tmp_path: Path) -> None:
    assert parse(SEEDS[seed], "fuzz", "fuzz.yaml", ROOT / "configs", NO_OVERRIDES).items
