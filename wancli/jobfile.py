"""A job file: its shots, where each key stands, and every problem in words.

Every problem of a file is reported at once, each with file, line, key, value and a way out.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from wancli.errors import JobError
from wancli.job import (
    CurveSpec,
    EmbeddingFile,
    ExpertGuidance,
    Inject,
    Job,
    LoraEntry,
    Memory,
    ModelFiles,
    Sampler,
    SigmaRange,
    TextOptions,
    Video,
)
from wancli.yamlfile import Key, dotted, read_yaml


@dataclass(frozen=True)
class Source:
    """Where each key of a file stands, so that any later error can name its line."""

    file: str
    lines: Mapping[tuple[Key, ...], int] = field(default_factory=dict)

    def where(self, *path: Key) -> str:
        """`job.yaml:12: sampler.steps`; a key that was never written gets the line of its parent."""
        line = next((self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), None)
        place = f"{self.file}:{line}" if line else self.file
        return f"{place}: {dotted(path)}" if path else place

    def owner(self, prefix: tuple[Key, ...], path: tuple[Key, ...]) -> tuple[Key, ...]:
        """Who wrote the key at `path` of a merged item: the item at `prefix`, or () for the file itself."""
        here = [n for n in range(1, len(path) + 1) if (*prefix, *path[:n]) in self.lines]
        said = path[: max(here, default=0)]
        # Mappings are merged, so what an item does not say below one is the file's; lists are replaced.
        merged = said != path and not any(isinstance(p, int) for p in said)
        return () if not said or (merged and path[: len(said) + 1] in self.lines) else prefix


@dataclass(frozen=True)
class Item:
    """One shot of a job file: what was said, and where."""

    job: Job
    source: Source
    prefix: tuple[Key, ...] = ()

    def where(self, *path: Key) -> str:
        return self.source.where(*self.source.owner(self.prefix, path), *path)


@dataclass(frozen=True)
class JobFile:
    """A job file: its name, the folder its relative paths start from, and its shots."""

    name: str
    directory: Path
    items: tuple[Item, ...]


def load(path: Path) -> JobFile:
    """Reads a job file. Raises JobError with every problem in it."""
    try:
        data = path.read_bytes()
    except IsADirectoryError:
        raise JobError("is a folder, not a job file", where=str(path)) from None
    except OSError as error:
        raise JobError(f"cannot be read: {error.strerror}", where=str(path)) from None
    return parse(data, str(path), path.stem, path.resolve().parent)


def parse(data: bytes, file: str, name: str, directory: Path) -> JobFile:
    raw, lines = read_yaml(data, file)
    source = Source(file, lines)
    if not isinstance(raw, dict):
        raise JobError("a job is a mapping of keys to values", where=file, hint="Start with: prompt: ...")
    if "items" not in raw:
        return JobFile(name, directory, (Item(_validated(raw, (), source), source),))
    overrides = raw.pop("items")
    if not isinstance(overrides, list) or not overrides or not all(isinstance(o, dict) for o in overrides):
        raise JobError("must be a list of mappings, one per shot", where=source.where("items"))
    items, problems = [], []
    for index, override in enumerate(overrides):
        prefix: tuple[Key, ...] = ("items", index)
        try:
            items.append(Item(_validated(merged(raw, override), prefix, source), source, prefix))
        except JobError as error:
            problems += [p for p in str(error).splitlines() if p not in problems]
    if problems:
        raise JobError("\n".join(problems))
    return JobFile(name, directory, tuple(items))


def of_prompt(prompt: str, output: str) -> JobFile:
    """A job of one shot that says nothing but its prompt. Raises JobError."""
    source = Source("the command line")
    job = _validated({"prompt": prompt, "output": output}, (), source)
    return JobFile("prompt", Path.cwd(), (Item(job, source),))


def merged(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """`override` over `base`, mapping by mapping; a list is replaced whole."""
    result = dict(base)
    for key, value in override.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def _validated(raw: dict[str, Any], prefix: tuple[Key, ...], source: Source) -> Job:
    try:
        return Job.model_validate(raw)
    except ValidationError as error:
        problems = problems_of(error, lambda path: source.where(*source.owner(prefix, path), *path))
        raise JobError("\n".join(problems)) from None


def problems_of(error: ValidationError, where: Callable[[tuple[Key, ...]], str]) -> list[str]:
    """A line for every problem; `where` names the place of a key of a job."""
    found = [(_path(problem), problem) for problem in error.errors()]
    # A misspelt key is not also reported as missing.
    meant = {(*path[:-1], _nearest(path)) for path, p in found if p["type"] == "extra_forbidden"}
    return [
        f"{where(path)}: {_sentence(path, problem)}"
        for path, problem in found
        if problem["type"] != "missing" or path not in meant
    ]


def _path(problem: Any) -> tuple[Key, ...]:
    """Where in the file: pydantic's location without the tags of unions, which no key of a job is."""
    *parents, last = problem["loc"]
    tagged = str(last).startswith("<") and problem["type"] != "extra_forbidden"
    return (*(p for p in parents if not str(p).startswith("<")), *(() if tagged else (last,)))


def _nearest(path: tuple[Key, ...]) -> str | None:
    """The known key that an unknown one may have been meant for."""
    known = [key for key in keys_at(path[:-1]) if key != path[-1]]
    return next(iter(difflib.get_close_matches(str(path[-1]), known, 1, 0.6)), None)


def _sentence(path: tuple[Key, ...], problem: Any) -> str:
    """What is wrong with one value, in words that tell what to write instead."""
    value, kind, ctx = problem["input"], problem["type"], problem.get("ctx", {})
    shown = _shown(value)
    match kind:
        case "missing":
            return "is missing"
        case "extra_forbidden":
            near = _nearest(path)
            known = f"known: {', '.join(keys_at(path[:-1]))}"
            return "unknown key; " + (f"did you mean {near!r}?" if near else known)
        case "literal_error":
            return f"{shown} is not one of {str(ctx['expected']).replace(' or ', ', ')}"
        case "int_type" | "int_from_float":
            return f"expected a whole number, got {shown}"
        case "float_type" | "finite_number":
            return f"expected a number, got {shown}"
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
    return f"{problem['msg'].lower().removeprefix('input ')}, got {shown}"


def _shown(value: Any) -> str:
    kinds = {type(None): "nothing", dict: "a mapping", list: "a list"}
    if type(value) in kinds:
        return kinds[type(value)]
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def keys_at(path: tuple[Key, ...]) -> list[str]:
    """The keys that a job file may have below `path`."""
    model: type[BaseModel] = Job
    nested: dict[Key, type[BaseModel]] = {
        "sampler": Sampler, "text": TextOptions, "inject": Inject, "loras": LoraEntry, "video": Video,
        "memory": Memory,
        "prompt": EmbeddingFile, "negative": EmbeddingFile, "strength": CurveSpec, "step_strength": CurveSpec,
        "steps": SigmaRange, "guidance": ExpertGuidance, "model": ModelFiles,
    }  # fmt: skip
    for key in path:
        model = nested.get(key, model)
    return [*model.model_fields, *(["items"] if model is Job else [])]
