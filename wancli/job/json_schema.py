"""Build the JSON Schema of a job file, for editors, from the models that validate it."""

from __future__ import annotations

from typing import Any

from wancli.job.schema import Job

# Keys of a file that list or vary its shots.
_EXPANSION_PROPERTIES: dict[str, Any] = {
    "items": {
        "description": "A list of overrides, one shot each: mappings are merged, lists and values replaced.",
        "type": "array",
        "minItems": 1,
        "items": {"$ref": "#/$defs/Item"},
    },
    "matrix": {
        "description": "Keys like inject.0.blocks with lists of values: every combination is a shot.",
        "$ref": "#/$defs/Axes",
    },
    "zip": {
        "description": "Keys with lists of one length, which vary together.",
        "$ref": "#/$defs/Axes",
    },
    "exclude": {
        "description": "A combination with all values of an entry is left out.",
        "type": "array",
        "items": {"type": "object", "minProperties": 1},
    },
    "prompts_from": {
        "description": "A file with a prompt per line, or JSON lines (.jsonl) with keys of a job.",
        "type": "string",
    },
    "images_from": {
        "description": "Pictures, each a shot: a pattern (photos/*.jpg), a folder, a list (.txt, .jsonl).",
        "type": "string",
    },
    "extends": {
        "description": "Job files that this one is merged over.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    },
}


def job_schema() -> dict[str, Any]:
    """Build a JSON Schema 2020-12. wancli refuses every document that the schema refuses, and some others."""
    schema = _replace_one_of(Job.model_json_schema())
    definitions = schema.pop("$defs")
    # An item, an axis or an extended file may set a required key.
    schema.pop("required")
    item = schema | {"description": "The keys of one shot, over those of the rest of the file."}
    axes = {"type": "object", "additionalProperties": {"type": "array", "minItems": 1}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "wancli job",
        "description": "A job file of wancli.",
        "properties": schema["properties"] | _EXPANSION_PROPERTIES,
        "$defs": definitions | {"Item": item, "Axes": axes},
    }


def _replace_one_of(value: Any) -> Any:
    """Replace `oneOf` by `anyOf`: `oneOf` would refuse 1, which is both an integer and a number."""
    if isinstance(value, dict):
        return {"anyOf" if key == "oneOf" else key: _replace_one_of(inner) for key, inner in value.items()}
    return [_replace_one_of(inner) for inner in value] if isinstance(value, list) else value
