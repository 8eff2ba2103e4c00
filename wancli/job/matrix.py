"""`matrix`, `zip` and `exclude`: which combinations of values a sweep renders, and what each is called.

An axis is a list of points; a point sets one key (matrix) or several that are walked together
(zip). Every combination of points is one shot of every item, the last axis fastest.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wancli.errors import JobError
from wancli.job.overrides import Layer, Layers, assign, look_up
from wancli.job.validation import EXPANSION_KEYS
from wancli.job.yaml_reader import Key
from wancli.storage.paths import slugify

MAX_SHOTS = 10_000
ID_BYTES = 24  # of each value in the id of a shot
Label = str | int | float | bool


@dataclass(frozen=True)
class Setting:
    """One key of a shot set to one value, and who said so."""

    key: str
    layer: Layer
    label: Label = ""
    slug: str = ""

    def apply(self, raw: dict[str, Any]) -> tuple[dict[str, Any], Layer]:
        """What the shot says then, and the layer as it lies over that shot. Raises JobError."""
        path = self.key.split(".")
        if path[0] in EXPANSION_KEYS:
            where = self.layer.location((), of_key=True)
            raise JobError("is no key of a shot; it says which shots there are", where=where)
        try:
            result = assign(raw, path, self.layer.value)
        except LookupError as error:
            shot = f", in {raw['id']!r}" if raw.get("id") else ""
            raise JobError(f"{error.args[0]}{shot}", where=self.layer.location((), of_key=True)) from None
        layer = self.layer
        at = look_up(result, path)[0]
        return result, Layer(layer.source, layer.base_dir, layer.value, layer.prefix, at)


Point = tuple[Setting, ...]
Axis = tuple[Point, ...]


@dataclass(frozen=True)
class Combination:
    """One shot of a sweep: its points, and the labels that tell it from the others."""

    settings: Point
    labels: Mapping[str, Label]

    @property
    def slug(self) -> str:
        """`seed1-late`, the values of all axes."""
        return "-".join(setting.slug for setting in self.settings)


def build_axes(matrix: Any, zipped: Any, layers: Layers, sweeps: Sequence[Axis]) -> list[Axis]:
    """The axes of `matrix:`, then that of `zip:`. One of `--sweep` takes the place of that of its key.

    `said` tells where each key stands. Raises JobError with every problem.
    """
    problems: list[str] = []
    columns = list(_read_columns(matrix, "matrix", layers, problems))
    result: list[Axis] = [tuple((setting,) for setting in column) for column in columns]
    for column in columns:
        values = [json.dumps(setting.layer.value) for setting in column]
        problems += [
            f"{setting.layer.location(setting.layer.at)}: is there twice"
            for i, setting in enumerate(column)
            if values[i] in values[:i]
        ]
    together = list(_read_columns(zipped, "zip", layers, problems))
    lengths = {column[0].key: len(column) for column in together}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{key} {count}" for key, count in lengths.items())
        problems.append(
            f"{layers.location('zip')}: lists of different lengths are not walked together: {counts}"
        )
    problems += [
        f"{layers.location('zip', key)}: is in matrix, too"
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
            raise JobError("is walked together with others in zip", where=layers.location("zip", key))
        position = next((i for i, axis in enumerate(result) if axis[0][0].key == key), len(result))
        result[position : position + 1] = [sweep]
    return result


def build_axis(key: str, layers: Sequence[Layer]) -> Axis:
    """The axis of one key, a point for each layer's value."""
    return tuple((setting,) for setting in _make_column(key, layers))


def combinations(axes: Sequence[Axis]) -> Iterator[Combination]:
    """All combinations, the last axis fastest."""
    names = _name_labels([setting.key for axis in axes for setting in axis[0]])
    for points in itertools.product(*axes):
        settings = tuple(itertools.chain(*points))
        yield Combination(settings, {names[setting.key]: setting.label for setting in settings})


def count_combinations(axes: Iterable[Axis]) -> int:
    return math.prod(len(axis) for axis in axes)


class Exclusions:
    """`exclude:`, which counts what it leaves out: an entry that leaves out nothing is a mistake."""

    def __init__(self, entries: Any, layers: Layers) -> None:
        is_list = isinstance(entries, list) and all(isinstance(entry, dict) and entry for entry in entries)
        if not is_list:
            raise JobError("must be a list of mappings of keys to values", where=layers.location("exclude"))
        self._entries: list[list[tuple[list[str], Any]]] = [
            [(key.split("."), value) for key, value in entry.items()] for entry in entries
        ]
        self._layers = layers
        self._hits = [0] * len(entries)

    def excludes(self, raw: Mapping[str, Any]) -> bool:
        """Whether a shot has all values of an entry."""
        matches = [all(_has_value(raw, path, value) for path, value in entry) for entry in self._entries]
        self._hits = [hits + is_out for hits, is_out in zip(self._hits, matches)]
        return any(matches)

    def problems(self, swept: Iterable[str]) -> Iterator[str]:
        """A line for every entry without an effect. One that names a key of `swept` may have none."""
        for index, (hits, entry) in enumerate(zip(self._hits, self._entries)):
            if not hits and not {".".join(path) for path, _ in entry} & set(swept):
                yield f"{self._layers.location('exclude', index)}: leaves out no combination"


def _has_value(raw: Mapping[str, Any], path: Sequence[str], value: Any) -> bool:
    try:
        actual = look_up(raw, path)[1]
    except LookupError:
        return False
    return bool(actual == value) and isinstance(actual, bool) == isinstance(value, bool)


def _read_columns(columns: Any, name: str, layers: Layers, problems: list[str]) -> Iterator[list[Setting]]:
    """The keys of `matrix` or `zip`, each with its settings."""
    if not isinstance(columns, dict):
        problems.append(f"{layers.location(name)}: must be a mapping of keys to lists of values")
        return
    for key, values in columns.items():
        if not all(key.split(".")):
            problems.append(f"{layers.location(name, key)}: is no key; write sampler.steps")
            continue
        if values == []:
            problems.append(f"{layers.location(name, key)}: has no values, so that there would be no shot")
            continue
        if not isinstance(values, list):
            problems.append(f"{layers.location(name, key)}: must be a list of values")
            continue
        owner = layers.owner((name, key))
        parts = key.split(".")
        yield _make_column(
            key,
            [
                Layer(owner.source, owner.base_dir, value, (name, key, index), tuple(parts))
                for index, value in enumerate(values)
            ],
        )


def _make_column(key: str, layers: Sequence[Layer]) -> list[Setting]:
    slugs = _make_slugs(_last_word(key), [layer.value for layer in layers])
    return [Setting(key, layer, _to_label(layer.value), slug) for layer, slug in zip(layers, slugs)]


def _last_word(key: str) -> str:
    """The last part of a key, unless that is a number."""
    last = key.rpartition(".")[2]
    return key if last.isdecimal() else last


def _name_labels(keys: Sequence[str]) -> dict[str, str]:
    """The label of each key: its last part where no other ends so, else all of it."""
    ends = [_last_word(key) for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends)}


def _to_label(value: Any) -> Label:
    if isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _make_slugs(name: str, values: Sequence[Any]) -> list[str]:
    """How each value is written in an id: `seed7`, `late`; by its place where those would not differ."""
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
    """The id of a shot of a sweep: that of its item, then its values."""
    parts: list[Key] = [part for part in (item_id or item_number, combination.slug) if part]
    return "-".join(map(str, parts))
