"""The JSON Schema of a job: it knows every key, and agrees with the loader on real and wrong documents."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jobs import run_wancli

from wancli.job import json_schema
from wancli.job.schema import Job
from wancli.job.validation import EXPANSION_KEYS, known_keys

CONFIGS = Path(__file__).parents[2] / "configs"
KINDS: dict[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None),
    "integer": int, "number": (int, float),
}  # fmt: skip


def fits(value: Any, rule: dict[str, Any], definitions: dict[str, Any]) -> bool:
    """A small validator: the words of JSON Schema that ours uses, by their specification."""
    if "$ref" in rule and not fits(value, definitions[rule["$ref"].rpartition("/")[2]], definitions):
        return False
    if "anyOf" in rule and not any(fits(value, option, definitions) for option in rule["anyOf"]):
        return False
    kind = rule.get("type")
    if kind and (not isinstance(value, KINDS[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return False
    if ("enum" in rule and value not in rule["enum"]) or ("const" in rule and value != rule["const"]):
        return False
    if isinstance(value, dict):
        known, others = rule.get("properties", {}), rule.get("additionalProperties", True)
        if not set(rule.get("required", ())) <= set(value) or len(value) < rule.get("minProperties", 0):
            return False
        return all(
            fits(inner, known[key], definitions)
            if key in known
            else others is True or (others is not False and fits(inner, others, definitions))
            for key, inner in value.items()
        )
    if isinstance(value, list):
        if not rule.get("minItems", 0) <= len(value) <= rule.get("maxItems", len(value)):
            return False
        return all(fits(inner, rule.get("items", {}), definitions) for inner in value)
    if isinstance(value, str):
        return re.search(rule.get("pattern", ""), value) is not None
    if isinstance(value, int | float):
        bounds = (
            value >= rule.get("minimum", value),
            value <= rule.get("maximum", value),
            "exclusiveMinimum" not in rule or value > rule["exclusiveMinimum"],
            "exclusiveMaximum" not in rule or value < rule["exclusiveMaximum"],
        )
        return all(bounds)
    return True


def accepts(document: Any) -> bool:
    found = json_schema.job_schema()
    return fits(document, found, found["$defs"])


def test_the_validator_here_knows_every_keyword_of_the_schema() -> None:
    words: set[str] = set()

    def collect(rule: Any) -> None:
        if isinstance(rule, list):
            for inner in rule:
                collect(inner)
        elif isinstance(rule, dict):
            words.update(rule)
            for word, inner in rule.items():
                for below in inner.values() if word in ("properties", "$defs") else [inner]:
                    collect(below) if word != "default" else None

    collect(json_schema.job_schema())
    assert words <= {
        "$schema", "$defs", "$ref", "title", "description", "default", "type", "properties", "required",
        "additionalProperties", "minProperties", "items", "minItems", "maxItems", "anyOf", "enum", "const",
        "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength",
        "pattern",
    }  # fmt: skip


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    result = run_wancli(capsys, "schema")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out) == json_schema.job_schema()


def test_it_has_the_keys_of_a_job_file_and_an_item_those_of_a_job() -> None:
    found = json_schema.job_schema()
    assert list(found["properties"]) == known_keys(())
    assert (
        set(found["$defs"]["Item"]["properties"])
        == set(Job.model_fields)
        == set(known_keys(())) - {*EXPANSION_KEYS}
    )


@pytest.mark.parametrize("path", sorted({*CONFIGS.glob("*.yaml")} - {CONFIGS / "models.yaml"}), ids=str)
def test_it_accepts_the_example_jobs(path: Path) -> None:
    assert accepts(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"prompt": "a"}, True),
        ({"labels": {"a": 1, "b": 0.5, "c": True, "d": "x"}}, True),
        ({"inject": [{"prompt": "a", "blocks": [1, "late"], "strength": {"curve": "sine"}}]}, True),
        ({"model": {"transformer": "a"}, "sampler": {"guidance": {"high": 1, "low": 2}}}, True),
        ({"matrix": {"seed": [1]}, "zip": {"a.b": ["x", None]}, "exclude": [{"seed": 1}]}, True),
        ({"extends": ["a"], "prompts_from": "b", "items": [{"seed": 1}]}, True),
        ({"video": {"fps": 23.976}}, True),
        ({"video": {"fps": "24000/1001"}}, True),
        ({"video": {"fps": "fast"}}, False),
        ({"video": {"fps": 0}}, False),
        ({"promt": "a"}, False),
        ({"seed": "1"}, False),
        ({"seed": True}, False),
        ({"seed": -1}, False),
        ({"prompt": 5}, False),
        ({"sampler": {"solver": "ddim"}}, False),
        ({"inject": [{"blocks": 1}]}, False),
        ({"items": [{"items": []}]}, False),
        ({"items": []}, False),
        ({"matrix": {"seed": 1}}, False),
        ({"matrix": {"seed": []}}, False),
        ({"exclude": [{}]}, False),
    ],
    ids=str,
)
def test_it_accepts_or_refuses(document: Any, expected: bool) -> None:
    assert accepts(document) is expected
