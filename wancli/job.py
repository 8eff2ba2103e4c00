"""What the user wrote: strict models of a job file, and where each key of it stands.

Nothing here is decided: fields that depend on the model stay None until `wancli.plan`. Every
problem of a file is reported at once, each with file, line, key, value and a way out.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from wancli import mini
from wancli.errors import JobError
from wancli.inject import Curve
from wancli.yamlfile import Key, dotted, read_yaml


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class EmbeddingFile(Strict):
    """A prompt that `wancli encode --out` has already encoded."""

    embedding: str
    index: int = Field(0, ge=0)


class ModelFiles(Strict):
    """A checkpoint named file by file: `transformer`, or the two experts of Wan 2.2 A14B."""

    transformer: str | None = None
    high_noise: str | None = None
    low_noise: str | None = None
    text_encoder: str | None = None
    tokenizer: str | None = None
    vae: str | None = None
    heads: int | None = Field(None, ge=1, le=1024)


def _text_or_mapping(value: Any) -> str:
    return "<mapping>" if isinstance(value, dict | BaseModel) else "<text>"


Prompt = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[EmbeddingFile, Tag("<mapping>")],
    Discriminator(_text_or_mapping),
]


class ExpertGuidance(Strict):
    """One guidance for each of the two experts of Wan 2.2 A14B."""

    high: float = Field(ge=0, le=100)
    low: float = Field(ge=0, le=100)


def _guidance_kind(value: Any) -> str:
    return "<mapping>" if isinstance(value, dict | ExpertGuidance) else "<number>"


Guidance = Annotated[
    Annotated[float, Field(ge=0, le=100), Tag("<number>")] | Annotated[ExpertGuidance, Tag("<mapping>")],
    Discriminator(_guidance_kind),
]
Model = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[ModelFiles, Tag("<mapping>")],
    Discriminator(_text_or_mapping),
]


class ModelOnly(Strict):
    """What an entry of models.yaml is: a model as a job says it."""

    model: Model


class Sampler(Strict):
    solver: Literal["unipc", "dpm++", "euler", "distill4"] = "unipc"
    steps: int | None = Field(None, ge=1, le=1000)
    shift: float | None = Field(None, gt=0, le=100)
    guidance: Guidance | None = None


class TextOptions(Strict):
    max_tokens: Literal[256, 512] = 256
    truncate: bool = False


class SigmaRange(Strict):
    sigma: list[float] = Field(min_length=2, max_length=2)


class CurveSpec(Strict):
    """A strength over the chosen blocks (or steps); formulas in `wancli.inject.Curve`."""

    curve: Literal["linear", "gaussian", "sine", "step", "random"]
    start: float = Field(0.0, ge=-10, le=10)
    end: float = Field(1.0, ge=-10, le=10)
    center: float = Field(0.5, ge=0, le=1)
    width: float = Field(0.2, ge=0.001)
    periods: float = Field(1.0, gt=0, le=1000)
    every: int = Field(1, ge=1)
    seed: int = Field(0, ge=0)

    def resolved(self) -> Curve:
        return Curve(
            self.curve, self.start, self.end, self.center, self.width, self.periods, self.every, self.seed
        )


def _kind(value: Any) -> str:
    if isinstance(value, dict | BaseModel):
        return "<mapping>"
    return "<list>" if isinstance(value, list) else "<number>"


Number = Annotated[float, Field(ge=-10, le=10)]
Strength = Annotated[
    Annotated[Number, Tag("<number>")]
    | Annotated[list[Number], Tag("<list>")]
    | Annotated[CurveSpec, Tag("<mapping>")],
    Discriminator(_kind),
]


def _steps_kind(value: Any) -> str:
    if isinstance(value, dict | SigmaRange):
        return "<mapping>"
    return "<int>" if isinstance(value, int) else "<text>"


Steps = Annotated[
    Annotated[int, Tag("<int>")] | Annotated[str, Tag("<text>")] | Annotated[SigmaRange, Tag("<mapping>")],
    Discriminator(_steps_kind),
]


def _blocks_kind(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<int>" if isinstance(value, int) else "<text>"


def _scalar_kind(value: Any) -> str:
    kinds = {bool: "<bool>", int: "<int>", float: "<float>"}
    return kinds.get(type(value), "<text>")


Label = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[int, Tag("<int>")]
    | Annotated[float, Tag("<float>")]
    | Annotated[bool, Tag("<bool>")],
    Discriminator(_scalar_kind),
]
BlockSet = Annotated[
    Annotated[int, Tag("<int>")] | Annotated[str, Tag("<text>")], Discriminator(_blocks_kind)
]
Blocks = Annotated[
    Annotated[int, Tag("<int>")]
    | Annotated[str, Tag("<text>")]
    | Annotated[list[BlockSet], Field(min_length=1), Tag("<list>")],
    Discriminator(_blocks_kind),
]


class Inject(Strict):
    """A second prompt for chosen blocks, steps and guidance branches."""

    prompt: Prompt
    blocks: Blocks = "all"
    strength: Strength = 1.0
    steps: Steps = "all"
    step_strength: Strength = 1.0
    branch: Literal["cond", "uncond", "both"] = "cond"
    blend: Literal["context-lerp", "output-mix", "replace", "concat"] = "context-lerp"
    gain: float = Field(1.0, ge=-100, le=100)
    expert: Literal["high", "low", "both"] = "both"


class LoraEntry(Strict):
    """A LoRA, for the whole transformer or for chosen blocks and steps."""

    path: str
    strength: Number = 1.0
    blocks: Blocks = "all"
    steps: Steps = "all"
    expert: Literal["both", "high", "low"] = "both"


class Video(Strict):
    fps: int | None = Field(None, ge=1, le=240)
    crf: int = Field(16, ge=0, le=51)
    codec: Literal["h264", "h265"] = "h264"
    keep_latents: bool = False


class Memory(Strict):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = "auto"
    residency: Literal["auto", "resident", "packed", "streamed"] = "auto"
    decode_chunk: int = Field(1, ge=1, le=64)


class Job(Strict):
    """One shot as the user described it, after `items` were merged over the rest of the file."""

    model: Model = mini.NAME
    prompt: Prompt
    negative: Prompt = "default"
    output: str = "out/{job}/{item:04d}-{slug}.mp4"
    id: str | None = Field(None, min_length=1, max_length=200)
    labels: dict[str, Label] = {}
    size: str | None = None
    frames: int | None = Field(None, ge=1, le=100_001)
    seed: int = Field(0, ge=0, lt=2**63)
    noise: Literal["cpu", "cuda"] = "cpu"
    sampler: Sampler = Sampler()
    text: TextOptions = TextOptions()
    inject: list[Inject] = []
    loras: list[LoraEntry] = []
    video: Video = Video()
    memory: Memory = Memory()
    measure: bool = False


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
