"""Describe what is wrong with a job: a line for every problem, with a way out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from wancli.job.foreign_words import explain_word
from wancli.job.schema import (
    AreaSize,
    Compare,
    ExpertGuidance,
    ImageOptions,
    Job,
    Memory,
    ModelFiles,
    Sampler,
    TextOptions,
    Video,
)
from wancli.job.schema_cache import CacheOptions
from wancli.job.schema_rules import Attention, EmphasisEntry, InjectPrompt, LoraEntry, SteerEntry
from wancli.job.schema_values import CurveSpec, EmbeddingFile, PromptOverTime, Segment, SigmaRange
from wancli.job.yaml_reader import Key
from wancli.units import quote

# Keys of a job file that expand it into shots. A shot has none of them.
EXPANSION_KEYS = ("items", "matrix", "zip", "exclude", "prompts_from", "images_from", "extends")


def describe_problems(error: ValidationError, locate: Callable[[tuple[Key, ...], bool], str]) -> list[str]:
    """Describe every problem in a line. `locate(path, of_key)` names the place of a key, or of its value."""
    problems = [(_key_path(problem), problem) for problem in error.errors()]
    # A misspelt key is not also reported as missing.
    intended = {(*path[:-1], _nearest_key(path)) for path, p in problems if p["type"] == "extra_forbidden"}
    return [
        f"{locate(path, problem['type'] == 'extra_forbidden')}: "
        + (_describe_seed(problem) if path == ("seed",) else _describe(path, problem))
        for path, problem in problems
        if problem["type"] != "missing" or path not in intended
    ]


def _key_path(problem: Any) -> tuple[Key, ...]:
    """Return pydantic's location of a problem, without the tags of unions."""
    *parents, last = problem["loc"]
    tagged = str(last).startswith("<") and problem["type"] != "extra_forbidden"
    return (*(p for p in parents if not str(p).startswith("<")), *(() if tagged else (last,)))


def _nearest_key(path: tuple[Key, ...]) -> str | None:
    """Return the known key that is most similar to an unknown one."""
    known = [key for key in known_keys(path[:-1]) if key != path[-1]]
    return next(iter(difflib.get_close_matches(str(path[-1]), known, 1, 0.6)), None)


def _describe(path: tuple[Key, ...], problem: Any) -> str:
    """Describe what is wrong with one value, and what to write instead."""
    value, kind, ctx = problem["input"], problem["type"], problem.get("ctx", {})
    shown = _format_value(value)
    match kind:
        case "missing":
            return "is missing"
        case "extra_forbidden":
            return _describe_extra(path)
        case "literal_error":
            instead = explain_word(str(value)) if path[-2:] == ("video", "codec") else None
            return f"{shown} is {_describe_expected(str(ctx['expected']))}" + (
                f"; {instead}" if instead else ""
            )
        case "int_type" | "int_from_float":
            return f"expected a whole number, got {shown}{_unquote(value)}"
        case "float_type" | "finite_number":
            return f"expected a number, got {shown}{_unquote(value)}"
        case "string_type":
            quote = "; put it in quotes" if isinstance(value, bool | int | float) else ""
            return f"expected text, got {shown}{quote}"
        case "bool_type":
            return f"expected true or false, got {shown}"
        case "model_type" | "dict_type":
            return f"expected a mapping of keys to values, got {shown}"
        case "list_type":
            return f"expected a list, got {shown}"
        case "too_short":
            return f"expected at least {ctx['min_length']} values, got {ctx['actual_length']}"
        case "too_long":
            return f"expected at most {ctx['max_length']} values, got {ctx['actual_length']}"
    return f"{problem['msg'].lower().removeprefix('input ').removeprefix('value error, ')}, got {shown}"


def _unquote(value: Any) -> str:
    """Show a number without the quotes that make it a text; empty if the text is no number."""
    is_number = isinstance(value, str) and len(value) < 20 and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", value)
    return f"; write {value} without quotes" if is_number else ""


def _describe_extra(path: tuple[Key, ...]) -> str:
    known = known_keys(path[:-1])
    if len(path) > 1 and path[-1] in known:
        return "does not go with the other keys here"
    if instead := explain_word(str(path[-1])):
        return f"unknown key; {instead}"
    near = _nearest_key(path)
    return "unknown key; " + (f"did you mean {near!r}?" if near else f"known: {', '.join(known)}")


def _describe_seed(problem: Any) -> str:
    """Describe what is wrong with a seed; other programs take -1 and seeds of 64 bits."""
    value = problem["input"]
    match problem["type"]:
        case "greater_than_equal":
            return f"{value} is not a seed, and seeds are never random; write matrix: {{seed: [0, 1]}}"
        case "less_than":
            same = f"; with `noise: cpu`, seed {value % 2**32} draws the same noise" if value < 2**64 else ""
            return f"{value} is too large, the last seed is 2^63-1{same}"
    return _describe(("seed",), problem)


def _describe_expected(words: str) -> str:
    """Describe pydantic's `'a', 'b' or 'c'`. A single word is an alternative to a number."""
    several = " or " in words
    return f"not one of {words.replace(' or ', ', ')}" if several else f"neither a number nor {words}"


def _format_value(value: Any) -> str:
    kinds = {type(None): "nothing", dict: "a mapping", list: "a list"}
    if type(value) in kinds:
        return kinds[type(value)]
    if isinstance(value, bool):
        return str(value).lower()
    return quote(value)


def takes_text(path: Sequence[str]) -> bool:
    """Whether a text, and no number, is the value of this key of a shot."""
    kinds: set[Any] = {Job}
    for part in path:
        kinds = {member for kind in kinds for member in _members(_type_below(kind, part))}
    return str in kinds and not kinds & {int, float, bool}


def _type_below(kind: Any, part: str) -> Any:
    """Return the type that a type of a job has at a key or at an entry of a list; None if it has none."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(part)
        return field.annotation if field else None
    return get_args(kind)[0] if get_origin(kind) is list and part.isdecimal() else None


def _members(kind: Any) -> set[Any]:
    """Return the types that a value may have, without what annotates them."""
    if get_origin(kind) in (Union, UnionType):
        return {member for part in get_args(kind) for member in _members(part)}
    return _members(get_args(kind)[0]) if get_origin(kind) is Annotated else {kind}


def known_keys(path: tuple[Key, ...]) -> list[str]:
    """List the keys that a job file may have below `path`."""
    model: type[BaseModel] = Job
    nested: dict[Key, type[BaseModel]] = {
        "sampler": Sampler, "text": TextOptions, "inject": InjectPrompt, "loras": LoraEntry, "video": Video,
        "memory": Memory, "attention": Attention, "compare": Compare, "image": ImageOptions, "size": AreaSize,
        "emphasis": EmphasisEntry, "steer": SteerEntry, "toward": EmbeddingFile, "away": EmbeddingFile,
        "prompt": EmbeddingFile, "negative": EmbeddingFile, "strength": CurveSpec, "step_strength": CurveSpec,
        "steps": SigmaRange, "guidance": ExpertGuidance, "model": ModelFiles,
        "cache": CacheOptions,
    }  # fmt: skip
    for parent, key in zip(("", *path), path):
        is_segment = parent in ("prompt", "segments") and isinstance(key, int)
        model = Segment if is_segment else nested.get(key, model)
    others = {Job: EXPANSION_KEYS, InjectPrompt: ("image",)}
    if path == ("prompt",):
        return [*EmbeddingFile.model_fields, *PromptOverTime.model_fields]
    return [*model.model_fields, *others.get(model, ())]
