"""A job file: its shots, each with the layers that it was said in.

Every problem of a file is reported at once, each with file, line, key, value and a way out.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from wancli.errors import JobError
from wancli.job import extends, matrix, prompts_from
from wancli.job.cli_overrides import NO_OVERRIDES, CliOverrides
from wancli.job.overrides import Layer, Layers, Source, merge
from wancli.job.schema import Job
from wancli.job.validation import EXPANSION_KEYS, describe_problems
from wancli.job.yaml_reader import Key


@dataclass(frozen=True)
class Item:
    """One shot of a job file: what was said, and where."""

    job: Job
    layers: Layers

    def location(self, *path: Key) -> str:
        return self.layers.location(*path)

    def base_dir(self, *path: Key) -> Path:
        """Where a relative path at this key starts: the folder of the file that says it."""
        return self.layers.owner(path).base_dir


@dataclass(frozen=True)
class JobFile:
    """A job file: its name, the folder its outputs start from, its shots, and those to work on."""

    name: str
    directory: Path
    items: tuple[Item, ...]
    selected: tuple[int, ...]


def load(path: Path, overrides: CliOverrides = NO_OVERRIDES) -> JobFile:
    """Reads a job file. Raises JobError with every problem in it."""
    directory = path.resolve().parent
    layers = extends.load_layers(extends.read_file(path), str(path), path, directory)
    return _build_job_file(layers, path.stem, directory, overrides)


def parse(
    data: bytes, file: str, name: str, directory: Path, overrides: CliOverrides = NO_OVERRIDES
) -> JobFile:
    """A job that came from elsewhere than a file. Raises JobError with every problem in it."""
    return _build_job_file(extends.load_layers(data, file, None, directory), name, directory, overrides)


def build_prompt_job(prompt: str, output: str, overrides: CliOverrides = NO_OVERRIDES) -> JobFile:
    """A job that says nothing but its prompt. Raises JobError."""
    own = Layer(Source("the command line"), Path.cwd(), {"prompt": prompt, "output": output})
    return _build_job_file(Layers((own,), own), "prompt", Path.cwd(), overrides)


def _build_job_file(layers: Layers, name: str, directory: Path, overrides: CliOverrides) -> JobFile:
    items = tuple(_expand(layers, overrides))
    _refuse_same_ids(items)
    return JobFile(name, directory, items, overrides.select_shots(len(items)))


def _expand(layers: Layers, overrides: CliOverrides) -> Iterator[Item]:
    """Every item x every combination. Raises JobError with all problems of all shots."""
    raw = layers.merged
    expansion = {key: raw.pop(key) for key in EXPANSION_KEYS if key in raw}
    items = _read_items(expansion, layers)
    sweeps, settings = overrides.parse_axes(), overrides.parse_settings()
    axes = matrix.build_axes(expansion.get("matrix", {}), expansion.get("zip", {}), layers, sweeps)
    excluded = matrix.Exclusions(expansion.get("exclude", []), layers)
    item_keys = {key for item in items for key in item.value}
    _refuse_too_many(len(items) * matrix.count_combinations(axes), layers)
    for setting in settings:
        if any(setting.key == s.key for axis in axes for s in axis[0]):
            raise JobError(
                "has one value in each shot of a sweep", where=f"--set {setting.key}",
                hint=f"Write --sweep {setting.key}=VALUE.",
            )  # fmt: skip
    result: list[Item] = []
    problems: dict[str, None] = {}
    for index, item in enumerate(items):
        base = merge(raw, item.value)
        number = f"{index:04d}" if len(items) > 1 else ""
        for combination in matrix.combinations(axes):
            try:
                values, added = _apply_settings(base, combination.settings)
                if excluded.excludes(values):
                    continue
                values = _add_sweep_id(values, number, combination)
                values, above = _apply_settings(values, settings)
                result.append(_validate(values, layers.with_layers(item, *added, *above), item, item_keys))
            except JobError as error:
                problems |= dict.fromkeys(str(error).splitlines())
    swept = [sweep[0][0].key for sweep in sweeps]
    if problems := problems or dict.fromkeys(excluded.problems(swept)):
        raise JobError("\n".join(problems))
    if not result:
        raise JobError("leaves out every shot", where=layers.location("exclude"))
    return iter(result)


def _read_items(expansion: dict[str, Any], layers: Layers) -> list[Layer]:
    """The items of a job file; one that says nothing where it lists none."""
    if "prompts_from" in expansion:
        location, name = layers.location("prompts_from"), expansion["prompts_from"]
        if "items" in expansion:
            raise JobError("items and prompts_from both list shots; say one", where=location)
        if not isinstance(name, str) or not name:
            raise JobError("must be the name of a file", where=location)
        return prompts_from.read(name, layers.owner(("prompts_from",)), location)
    if "items" not in expansion:
        return [Layer(layers.job_layer.source, layers.job_layer.base_dir, {})]
    overrides, owner = expansion["items"], layers.owner(("items",))
    if not isinstance(overrides, list) or not overrides or not all(isinstance(o, dict) for o in overrides):
        raise JobError("must be a list of mappings, one per shot", where=owner.location(("items",)))
    return [
        Layer(owner.source, owner.base_dir, override, ("items", index))
        for index, override in enumerate(overrides)
    ]


def _apply_settings(
    raw: dict[str, Any], settings: Sequence[matrix.Setting]
) -> tuple[dict[str, Any], list[Layer]]:
    layers = []
    for setting in settings:
        raw, layer = setting.apply(raw)
        layers.append(layer)
    return raw, layers


def _add_sweep_id(raw: dict[str, Any], number: str, combination: matrix.Combination) -> dict[str, Any]:
    """With an id and labels that tell what was swept; a label that the user gave stays."""
    if not combination.settings:
        return raw
    own_labels, own_id = raw.get("labels", {}), raw.get("id")
    labels = {**combination.labels, **own_labels} if isinstance(own_labels, dict) else own_labels
    if any(setting.key == "id" for setting in combination.settings) or not isinstance(own_id, str | None):
        return {**raw, "labels": labels}
    return {**raw, "labels": labels, "id": matrix.make_shot_id(own_id, number, combination)}


def _validate(raw: dict[str, Any], layers: Layers, item_layer: Layer, item_keys: Container[Key]) -> Item:
    """`listed` are the keys that some item says: one without them is where they are missing."""

    def locate(path: tuple[Key, ...], of_key: bool) -> str:
        owner = layers.owner(path)
        unsaid = not owner.reach(path)[0]
        return (item_layer if unsaid and path[0] in item_keys else owner).location(path, of_key=of_key)

    try:
        return Item(Job.model_validate(raw), layers)
    except ValidationError as error:
        raise JobError("\n".join(describe_problems(error, locate))) from None


def _refuse_too_many(count: int, layers: Layers) -> None:
    if count > matrix.MAX_SHOTS:
        raise JobError(
            f"makes {count:,} shots of one file; {matrix.MAX_SHOTS:,} at most",
            where=layers.location("matrix"),
        )


def _refuse_same_ids(items: Sequence[Item]) -> None:
    seen: dict[str, int] = {}
    for index, item in enumerate(items):
        name = item.job.id or f"{index:04d}"
        if name in seen:
            raise JobError(
                f"shots {seen[name]} and {index} both have the id {name!r}",
                where=item.location("id"),
                hint="Give each item an `id`.",
            )
        seen[name] = index
