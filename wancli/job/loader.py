"""Load a job file: its shots, each with the source of every key.

All problems of a file are reported at once, each with file, line, key, value and a way out.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from wancli.errors import JobError
from wancli.job import extends, images_from, matrix, plain_shots, prompts_from
from wancli.job.cli_overrides import NO_OVERRIDES, CliOverrides
from wancli.job.overrides import Layer, Merged, Source, Sources, merge_layers
from wancli.job.problems import sort_by_line
from wancli.job.prompt_job import prompt_values
from wancli.job.schema import Job
from wancli.job.validation import EXPANSION_KEYS, describe_problems, takes_text
from wancli.job.yaml_reader import Key
from wancli.storage import disk
from wancli.units import quote

_LISTS = {"prompts_from": prompts_from.read, "images_from": images_from.read}


@dataclass(frozen=True)
class Item:
    """One shot of a job file, and where each of its keys was set. `id` is its number if the job sets none;
    `entry_id` is that of its entry of `items`."""

    id: str
    job: Job
    sources: Sources
    entry_id: str
    combination: matrix.Combination  # what a sweep sets in it
    is_added: bool = False  # as the baseline of other shots

    @property
    def linked_id(self) -> str | None:
        """The id of the shot whose frame begins this one."""
        image = self.job.image_options
        return image.shot if image else None

    def location(self, *path: Key) -> str:
        """Name the file and line of a key, for an error."""
        return self.sources.location(*path)

    def base_dir(self, *path: Key) -> Path:
        """Return the folder that a relative path at this key starts from: that of the file which set it."""
        return self.sources.owner(path).base_dir


@dataclass(frozen=True)
class JobFile:
    """A job file: its name, the folder of its outputs, its shots, and the indices of the shots to render.

    `warnings` name values that the file may not mean.
    """

    name: str
    directory: Path
    items: tuple[Item, ...]
    selected: tuple[int, ...]
    warnings: tuple[str, ...] = ()


def load(path: Path, overrides: CliOverrides = NO_OVERRIDES) -> JobFile:
    """Read a job file. Raises JobError with every problem in it."""
    directory = disk.resolve(path).parent
    file = extends.load_merged(extends.read_file(path), str(path), path, directory)
    return _build_job_file(file, path.stem, directory, overrides)


def parse(
    data: bytes, file: str, name: str, directory: Path, overrides: CliOverrides = NO_OVERRIDES
) -> JobFile:
    """Read a job that did not come from a file. Raises JobError with every problem in it."""
    return _build_job_file(extends.load_merged(data, file, None, directory), name, directory, overrides)


def build_prompt_job(
    prompt: str, image: str | None, output: str, overrides: CliOverrides = NO_OVERRIDES
) -> JobFile:
    """Build a job that sets only a prompt, an output and perhaps a picture. Raises JobError."""
    layer = Layer(Source("the command line", Path.cwd()), prompt_values(prompt, image, output))
    return _build_job_file(merge_layers([layer]), "prompt", Path.cwd(), overrides)


def _build_job_file(file: Merged, name: str, directory: Path, overrides: CliOverrides) -> JobFile:
    items = tuple(plain_shots.add_plain_shots(_expand(file, overrides)))
    _refuse_too_many(len(items), file.sources)
    _refuse_same_ids(items)
    selected = overrides.select_shots([item.id for item in items], find_chain_starts(items))
    return JobFile(name, directory, items, selected, tuple(_warn_of_comments(file.sources)))


def find_chain_starts(items: Sequence[Item]) -> list[int]:
    """Return for each item the index of the first shot of its chain; its own if it continues no shot."""
    index_by_id = {item.id: index for index, item in enumerate(items)}
    parents = [index_by_id.get(item.linked_id or "") for item in items]
    starts = []
    for start in range(len(items)):
        seen = {start}  # a circle is reported when the job is planned
        while (parent := parents[start]) is not None and parent not in seen:
            seen.add(start := parent)
        starts.append(start)
    return starts


def _expand(file: Merged, overrides: CliOverrides) -> list[Item]:
    """Make a shot of every item and every combination. Raises JobError with the problems of all shots."""
    expansion = {key: file.values[key] for key in EXPANSION_KEYS if key in file.values}
    common = replace(file, values={key: v for key, v in file.values.items() if key not in expansion})
    items = _read_items(expansion, file.sources)
    sweeps, settings = overrides.parse_axes(), overrides.parse_settings()
    axes = matrix.build_axes(expansion.get("matrix", {}), expansion.get("zip", {}), file.sources, sweeps)
    excluded = matrix.Exclusions(expansion.get("exclude", []), file.sources)
    item_keys = {key for item in items for key in item.value}
    _refuse_too_many(len(items) * matrix.count_combinations(axes), file.sources)
    _refuse_set_and_swept(settings, axes)
    result: list[Item] = []
    problems: list[str] = []
    skips = matrix.Skips()
    for index, item in enumerate(items):
        base = common.merge(item)
        number = f"{index:04d}" if len(items) > 1 else ""
        made: set[str] = set()
        for combination in matrix.combinations(axes):
            try:
                shot, combination = skips.apply(combination, base)
                if excluded.excludes(shot.values) or combination.settings_key in made:
                    continue
                made.add(combination.settings_key)
                shot = replace(shot, values=_add_sweep_id(shot.values, number, combination))
                shot = _apply(settings, shot)
                job = plain_shots.adapt_output(_validate(shot, item.source, item_keys), combination)
                entry_id = str(base.values.get("id") or number)
                id = job.id or f"{len(result):04d}"
                result.append(Item(id, job, shot.sources, entry_id, combination))
            except JobError as error:
                problems += str(error).splitlines()
    swept = [sweep[0][0].key for sweep in sweeps]
    if problems := [*problems, *skips.problems()] or [*excluded.problems(swept)]:
        raise JobError("\n".join(sort_by_line(problems)))
    if not result:
        raise JobError("leaves out every shot", where=file.sources.location("exclude"))
    return result


def _warn_of_comments(sources: Sources) -> Iterator[str]:
    """Warn about each unquoted text that ends before `#1`, which is the beginning of a comment."""
    files = {source.file: source for source in (sources.job_file, *sources.entries.values())}
    for file in files.values():
        place = replace(file, prefix=())
        for path, comment in file.comments.items():
            if takes_text(_path_in_shot(path)) and re.match("#[^ #!]", comment):
                cut = f"{quote(comment)} is read as a comment, not as part of the text"
                yield f"{place.location(*path)}: {cut}; if it belongs to the text, put the text in quotes"


def _path_in_shot(path: tuple[Key, ...]) -> list[str]:
    """Return the key of a shot that a path in a job file sets."""
    match path:
        case ("items", int(), *below):
            return [str(part) for part in below]
        case ("matrix" | "zip", str() as key, int(), *below):
            return [*key.split("."), *map(str, below)]
    return [str(part) for part in path]


def _read_items(expansion: dict[str, Any], sources: Sources) -> list[Layer]:
    """Read the items of a job file. A file that lists none has one item without keys."""
    given = [key for key in ("items", *_LISTS) if key in expansion]
    if len(given) > 1:
        location = sources.location(given[1])
        raise JobError(f"{given[0]} and {given[1]} both list shots; use one", where=location)
    for key, read in _LISTS.items():
        if key in expansion:
            owner, name = sources.owner((key,)), expansion[key]
            if not isinstance(name, str) or not name:
                raise JobError("must be the name of a file", where=owner.location())
            return read(name, owner)
    if "items" not in expansion:
        return [Layer(sources.job_file, {})]
    items, owner = expansion["items"], sources.owner(("items",))
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise JobError("must be a list of mappings, one per shot", where=owner.location())
    return [Layer(owner.at(index), item) for index, item in enumerate(items)]


def _apply(settings: Sequence[matrix.Setting], shot: Merged) -> Merged:
    for setting in settings:
        shot = setting.apply(shot)
    return shot


def _add_sweep_id(values: dict[str, Any], number: str, combination: matrix.Combination) -> dict[str, Any]:
    """Add an id and labels that name the values of the sweep; a label that the user set stays."""
    if not combination.settings:
        return values
    own_labels, own_id = values.get("labels", {}), values.get("id")
    labels = {**combination.labels, **own_labels} if isinstance(own_labels, dict) else own_labels
    if any(setting.key == "id" for setting in combination.settings) or not isinstance(own_id, str | None):
        return {**values, "labels": labels}
    return {**values, "labels": labels, "id": matrix.make_shot_id(own_id, number, combination)}


def _validate(shot: Merged, item: Source, item_keys: Container[Key]) -> Job:
    """Check the keys of a shot. Raises JobError with every problem.

    If some item sets a key (`item_keys`) and this one does not, the key is missing in this item.
    """

    def locate(path: tuple[Key, ...], of_key: bool) -> str:
        source = shot.sources.find(path)
        if source is None:
            source = (item if path[0] in item_keys else shot.sources.job_file).at(*path)
        return source.key_location() if of_key else source.location()

    try:
        return Job.model_validate(shot.values)
    except ValidationError as error:
        raise JobError("\n".join(describe_problems(error, locate))) from None


def _refuse_set_and_swept(settings: Sequence[matrix.Setting], axes: Sequence[matrix.Axis]) -> None:
    for setting in settings:
        if any(setting.key == s.key for axis in axes for s in axis[0]):
            raise JobError(
                "has one value in each shot of a sweep", where=f"--set {setting.key}",
                hint=f"Write --sweep {setting.key}=VALUE.",
            )  # fmt: skip


def _refuse_too_many(count: int, sources: Sources) -> None:
    if count > matrix.MAX_SHOTS:
        raise JobError(
            f"makes {count:,} shots of one file; the limit is {matrix.MAX_SHOTS:,}",
            where=sources.location("matrix"),
        )


def _refuse_same_ids(items: Sequence[Item]) -> None:
    seen: dict[str, int] = {}
    for index, item in enumerate(items):
        if item.id in seen:
            raise JobError(
                f"shots {seen[item.id]} and {index} both have the id {item.id!r}",
                where=item.location("id"),
                hint="Give each item an `id`.",
            )
        seen[item.id] = index
