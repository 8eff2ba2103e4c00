"""Expand `matrix`, `zip` and `exclude`: which combinations of values a sweep renders, and their ids.

An axis is a list of points. A point sets one key (matrix) or several keys that vary together (zip).
Every combination of points is one shot of every item; the last axis varies fastest.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wancli.errors import JobError
from wancli.job.overrides import Layer, Merged, Sources
from wancli.job.validation import EXPANSION_KEYS
from wancli.job.yaml_reader import Key
from wancli.storage.paths import slugify

MAX_SHOTS = 10_000
ID_BYTES = 24  # of each value in the id of a shot
_PICTURE_KEYS = ("image", "image.first", "image.last")
Label = str | int | float | bool


@dataclass(frozen=True)
class Setting:
    """One key of a shot set to one value, and the source that sets it."""

    key: str
    layer: Layer
    label: Label = ""
    slug: str = ""

    def apply(self, shot: Merged) -> Merged:
        """Set the key of a shot. Raises JobError if the shot cannot have the key."""
        path = self.key.split(".")
        if path[0] in EXPANSION_KEYS:
            message = "is not a key of a shot; it lists or varies the shots of a file"
            raise JobError(message, where=self.layer.source.key_location())
        try:
            return shot.assign(path, self.layer)
        except LookupError as error:
            id = shot.values.get("id")
            message = f"{error.args[0]}, in {id!r}" if id else error.args[0]
            raise JobError(message, where=self.layer.source.key_location()) from None

    def applies_to(self, shot: Merged) -> bool:
        """Whether a shot has the rule or the LoRA that the key reaches into; True for all other keys."""
        head, *rest = self.key.split(".")
        entries = shot.values.get(head, [])
        if head not in ("inject", "loras") or not rest or not rest[0].isdecimal():
            return True
        return not isinstance(entries, list) or int(rest[0]) < len(entries)


Point = tuple[Setting, ...]
Axis = tuple[Point, ...]


@dataclass(frozen=True)
class Combination:
    """One shot of a sweep: its settings, and the name of the label of each key that the sweep varies."""

    settings: Point = ()
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def labels(self) -> dict[str, Label]:
        """The labels that distinguish the shot from the others."""
        return {self.names[setting.key]: setting.label for setting in self.settings}

    @property
    def absent_labels(self) -> set[str]:
        """The labels of axes that do not apply to the shot."""
        return {*self.names.values()} - {*self.labels}

    def select(self, keep: Callable[[Setting], bool]) -> Combination:
        """Return the combination with some of its settings."""
        return replace(self, settings=tuple(setting for setting in self.settings if keep(setting)))

    @property
    def settings_key(self) -> str:
        """A text that is the same for the same settings."""
        return repr([(setting.key, setting.layer.value) for setting in self.settings])

    @property
    def slug(self) -> str:
        """`seed1-late`, the values of all axes."""
        return "-".join(setting.slug for setting in self.settings)


def build_axes(matrix: Any, zipped: Any, sources: Sources, sweeps: Sequence[Axis]) -> list[Axis]:
    """Build the axes of `matrix:`, then that of `zip:`. An axis of `--sweep` replaces that of the same key.

    Raises JobError with every problem.
    """
    problems: list[str] = []
    columns = list(_read_columns(matrix, "matrix", sources, problems))
    result: list[Axis] = [tuple((setting,) for setting in column) for column in columns]
    for column in columns:
        values = [json.dumps(setting.layer.value) for setting in column]
        problems += [
            f"{setting.layer.source.location()}: appears twice"
            for i, setting in enumerate(column)
            if values[i] in values[:i]
        ]
    together = list(_read_columns(zipped, "zip", sources, problems))
    lengths = {column[0].key: len(column) for column in together}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{key} {count}" for key, count in lengths.items())
        problems.append(f"{sources.location('zip')}: lists of different lengths cannot be zipped: {counts}")
    problems += [
        f"{sources.location('zip', key)}: is also in matrix"
        for key in lengths
        if any(key == axis[0][0].key for axis in result)
    ]
    if problems:
        raise JobError("\n".join(problems))
    if together:
        result.append(tuple(zip(*together)))
    for sweep in sweeps:
        key = sweep[0][0].key
        if key in lengths:
            raise JobError("varies together with other keys in zip", where=sources.location("zip", key))
        position = next((i for i, axis in enumerate(result) if axis[0][0].key == key), len(result))
        result[position : position + 1] = [sweep]
    return result


def build_axis(key: str, layers: Sequence[Layer]) -> Axis:
    """Build the axis of one key, with a point for the value of each layer."""
    return tuple((setting,) for setting in _make_column(key, layers))


def combinations(axes: Sequence[Axis]) -> Iterator[Combination]:
    """Yield all combinations; the last axis varies fastest."""
    names = _name_labels([setting.key for axis in axes for setting in axis[0]])
    for points in itertools.product(*axes):
        yield Combination(tuple(itertools.chain(*points)), names)


def count_combinations(axes: Iterable[Axis]) -> int:
    return math.prod(len(axis) for axis in axes)


class Skips:
    """The axes that do not apply to some shots, because these lack the rule or the LoRA that they vary.

    An axis that applies to no shot at all is a mistake."""

    def __init__(self) -> None:
        self._problems: dict[str, str] = {}
        self._applied: set[str] = set()

    def apply(self, combination: Combination, shot: Merged) -> tuple[Merged, Combination]:
        """Set the values of a combination that apply to a shot; also return the combination of these alone.

        Raises JobError if the shot cannot have one of the keys."""
        applied: list[Setting] = []
        for setting in combination.settings:
            try:
                shot = setting.apply(shot)
            except JobError as error:
                if setting.applies_to(shot):
                    raise
                self._problems.setdefault(setting.key, str(error))
            else:
                applied.append(setting)
        self._applied |= {setting.key for setting in applied}
        return shot, replace(combination, settings=tuple(applied))

    def problems(self) -> list[str]:
        """Return a line for every axis that applies to no shot."""
        return [problem for key, problem in self._problems.items() if key not in self._applied]


class Exclusions:
    """The entries of `exclude:`, with counts: an entry that leaves out no combination is a mistake."""

    def __init__(self, entries: Any, sources: Sources) -> None:
        is_list = isinstance(entries, list) and all(isinstance(entry, dict) and entry for entry in entries)
        if not is_list:
            raise JobError("must be a list of mappings of keys to values", where=sources.location("exclude"))
        self._entries: list[list[tuple[list[str], Any]]] = [
            [(key.split("."), value) for key, value in entry.items()] for entry in entries
        ]
        self._sources = sources
        self._hits = [0] * len(entries)

    def excludes(self, raw: Mapping[str, Any]) -> bool:
        """Whether a shot has all values of some entry."""
        matches = [all(_has_value(raw, path, value) for path, value in entry) for entry in self._entries]
        self._hits = [hits + is_out for hits, is_out in zip(self._hits, matches)]
        return any(matches)

    def problems(self, swept: Iterable[str]) -> Iterator[str]:
        """Yield a line for every entry without an effect, except entries with a key of `swept`."""
        for index, (hits, entry) in enumerate(zip(self._hits, self._entries)):
            if not hits and not {".".join(path) for path, _ in entry} & set(swept):
                yield f"{self._sources.location('exclude', index)}: leaves out no combination"


def _has_value(values: Any, path: Sequence[str], value: Any) -> bool:
    """Whether the key at a path exists and has this value."""
    for part in path:
        if isinstance(values, list) and part.isdecimal() and int(part) < len(values):
            values = values[int(part)]
        elif isinstance(values, dict) and part in values:
            values = values[part]
        else:
            return False
    return bool(values == value) and isinstance(values, bool) == isinstance(value, bool)


def _read_columns(columns: Any, name: str, sources: Sources, problems: list[str]) -> Iterator[list[Setting]]:
    """Read the keys of `matrix` or `zip`, each as a list of settings. Adds to `problems`."""
    if not isinstance(columns, dict):
        problems.append(f"{sources.location(name)}: must be a mapping of keys to lists of values")
        return
    for key, values in columns.items():
        if not all(key.split(".")):
            problems.append(f"{sources.location(name, key)}: is not a key; write for example sampler.steps")
            continue
        if values == []:
            problems.append(f"{sources.location(name, key)}: has no values, so there would be no shot")
            continue
        if not isinstance(values, list):
            problems.append(f"{sources.location(name, key)}: must be a list of values")
            continue
        source = sources.owner((name, key))
        yield _make_column(key, [Layer(source.at(index), value) for index, value in enumerate(values)])


def _make_column(key: str, layers: Sequence[Layer]) -> list[Setting]:
    values = [layer.value for layer in layers]
    if key in _PICTURE_KEYS:
        values = _name_pictures(values)
    slugs = _make_slugs(_last_word(key), values)
    return [Setting(key, layer, _to_label(value), slug) for layer, value, slug in zip(layers, values, slugs)]


def _name_pictures(values: Sequence[Any]) -> list[Any]:
    """Return the file names of pictures, which tell them apart better than their paths; the values if two
    pictures have the same name, or if a value is no single picture."""
    firsts = [
        value["first"] if isinstance(value, dict) and [*value] == ["first"] else value for value in values
    ]
    if not all(isinstance(first, str) for first in firsts):
        return [*values]
    names = [Path(first).name for first in firsts]
    return names if len({*names}) == len({*firsts}) else firsts


def _last_word(key: str) -> str:
    """Return the last part of a key, or the whole key if that part is a number."""
    last = key.rpartition(".")[2]
    return key if last.isdecimal() else last


def _name_labels(keys: Sequence[str]) -> dict[str, str]:
    """Name the label of each key: its last part, or the whole key if another one ends in the same part."""
    ends = [_last_word(key) for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends)}


def _to_label(value: Any) -> Label:
    if isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _make_slugs(name: str, values: Sequence[Any]) -> list[str]:
    """Write each value for an id: `seed7`, `late`; by its index if two values would look the same."""
    slugs = [_make_slug(name, value) for value in values]
    if all(slugs) and len(set(slugs)) == len({json.dumps(value) for value in values}):
        return slugs
    return [f"{name}{index}" for index in range(len(values))]


def _make_slug(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"{name}-{str(value).lower()}"
    if isinstance(value, int | float):
        return f"{name}{value:g}" if isinstance(value, float) else f"{name}{value}"
    if isinstance(value, str) and any(char.isalnum() for char in value):
        return slugify(value, ID_BYTES)
    return ""


def make_shot_id(item_id: str | None, item_number: str, combination: Combination) -> str:
    """Make the id of a shot of a sweep: the id or number of its item, then its values."""
    parts: list[Key] = [part for part in (item_id or item_number, combination.slug) if part]
    return "-".join(map(str, parts))
