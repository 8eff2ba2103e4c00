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
from wancli.job.cli_overrides import NO_FLAGS, Flags
from wancli.job.overrides import Layer, Layers, Source, merged
from wancli.job.schema import Job
from wancli.job.validation import STRUCTURE, problems_of
from wancli.job.yaml_reader import Key


@dataclass(frozen=True)
class Item:
    """One shot of a job file: what was said, and where."""

    job: Job
    said: Layers

    def where(self, *path: Key) -> str:
        return self.said.where(*path)

    def folder(self, *path: Key) -> Path:
        """Where a relative path at this key starts: the folder of the file that says it."""
        return self.said.owner(path).directory


@dataclass(frozen=True)
class JobFile:
    """A job file: its name, the folder its outputs start from, its shots, and those to work on."""

    name: str
    directory: Path
    items: tuple[Item, ...]
    chosen: tuple[int, ...]


def load(path: Path, flags: Flags = NO_FLAGS) -> JobFile:
    """Reads a job file. Raises JobError with every problem in it."""
    directory = path.resolve().parent
    said = extends.layers(extends.content(path), str(path), path, directory)
    return _job_file(said, path.stem, directory, flags)


def parse(data: bytes, file: str, name: str, directory: Path, flags: Flags = NO_FLAGS) -> JobFile:
    """A job that came from elsewhere than a file. Raises JobError with every problem in it."""
    return _job_file(extends.layers(data, file, None, directory), name, directory, flags)


def of_prompt(prompt: str, output: str, flags: Flags = NO_FLAGS) -> JobFile:
    """A job that says nothing but its prompt. Raises JobError."""
    own = Layer(Source("the command line"), Path.cwd(), {"prompt": prompt, "output": output})
    return _job_file(Layers((own,), own), "prompt", Path.cwd(), flags)


def _job_file(said: Layers, name: str, directory: Path, flags: Flags) -> JobFile:
    items = tuple(_items(said, flags))
    _refuse_same_ids(items)
    return JobFile(name, directory, items, flags.chosen(len(items)))


def _items(said: Layers, flags: Flags) -> Iterator[Item]:
    """Every item x every combination. Raises JobError with all problems of all shots."""
    raw = said.merged
    structure = {key: raw.pop(key) for key in STRUCTURE if key in raw}
    items = _listed(structure, said)
    sweeps, settings = flags.axes(), flags.settings()
    axes = matrix.axes(structure.get("matrix", {}), structure.get("zip", {}), said, sweeps)
    excluded = matrix.Exclusions(structure.get("exclude", []), said)
    listed = {key for item in items for key in item.value}
    _refuse_too_many(len(items) * matrix.count(axes), said)
    for setting in settings:
        if any(setting.key == s.key for axis in axes for s in axis[0]):
            raise JobError(
                "has one value in each shot of a sweep", where=f"--set {setting.key}",
                hint=f"Write --sweep {setting.key}=VALUE.",
            )  # fmt: skip
    found: list[Item] = []
    problems: dict[str, None] = {}
    for index, item in enumerate(items):
        shared = merged(raw, item.value)
        number = f"{index:04d}" if len(items) > 1 else ""
        for combination in matrix.combinations(axes):
            try:
                one, layers = _applied(shared, combination.settings)
                if excluded.leaves_out(one):
                    continue
                one = _named(one, number, combination)
                one, above = _applied(one, settings)
                found.append(_validated(one, said.over(item, *layers, *above), item, listed))
            except JobError as error:
                problems |= dict.fromkeys(str(error).splitlines())
    swept = [sweep[0][0].key for sweep in sweeps]
    if problems := problems or dict.fromkeys(excluded.problems(swept)):
        raise JobError("\n".join(problems))
    if not found:
        raise JobError("leaves out every shot", where=said.where("exclude"))
    return iter(found)


def _listed(structure: dict[str, Any], said: Layers) -> list[Layer]:
    """The items of a job file; one that says nothing where it lists none."""
    if "prompts_from" in structure:
        where, name = said.where("prompts_from"), structure["prompts_from"]
        if "items" in structure:
            raise JobError("items and prompts_from both list shots; say one", where=where)
        if not isinstance(name, str) or not name:
            raise JobError("must be the name of a file", where=where)
        return prompts_from.read(name, said.owner(("prompts_from",)), where)
    if "items" not in structure:
        return [Layer(said.own.source, said.own.directory, {})]
    overrides, owner = structure["items"], said.owner(("items",))
    if not isinstance(overrides, list) or not overrides or not all(isinstance(o, dict) for o in overrides):
        raise JobError("must be a list of mappings, one per shot", where=owner.where(("items",)))
    return [
        Layer(owner.source, owner.directory, override, ("items", index))
        for index, override in enumerate(overrides)
    ]


def _applied(raw: dict[str, Any], settings: Sequence[matrix.Setting]) -> tuple[dict[str, Any], list[Layer]]:
    layers = []
    for setting in settings:
        raw, layer = setting.applied(raw)
        layers.append(layer)
    return raw, layers


def _named(raw: dict[str, Any], number: str, combination: matrix.Combination) -> dict[str, Any]:
    """With an id and labels that tell what was swept; a label that the user gave stays."""
    if not combination.settings:
        return raw
    own, said = raw.get("labels", {}), raw.get("id")
    labels = {**combination.labels, **own} if isinstance(own, dict) else own
    if any(setting.key == "id" for setting in combination.settings) or not isinstance(said, str | None):
        return {**raw, "labels": labels}
    return {**raw, "labels": labels, "id": matrix.shot_id(said, number, combination)}


def _validated(raw: dict[str, Any], said: Layers, item: Layer, listed: Container[Key]) -> Item:
    """`listed` are the keys that some item says: one without them is where they are missing."""

    def where(path: tuple[Key, ...], of_key: bool) -> str:
        owner = said.owner(path)
        unsaid = not owner.reach(path)[0]
        return (item if unsaid and path[0] in listed else owner).where(path, of_key=of_key)

    try:
        return Item(Job.model_validate(raw), said)
    except ValidationError as error:
        raise JobError("\n".join(problems_of(error, where))) from None


def _refuse_too_many(count: int, said: Layers) -> None:
    if count > matrix.MAX_SHOTS:
        raise JobError(
            f"makes {count:,} shots of one file; {matrix.MAX_SHOTS:,} at most", where=said.where("matrix")
        )


def _refuse_same_ids(items: Sequence[Item]) -> None:
    seen: dict[str, int] = {}
    for index, item in enumerate(items):
        name = item.job.id or f"{index:04d}"
        if name in seen:
            raise JobError(
                f"shots {seen[name]} and {index} both have the id {name!r}",
                where=item.where("id"),
                hint="Give each item an `id`.",
            )
        seen[name] = index
