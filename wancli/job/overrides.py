"""A shot is said in layers, by files, an item, axes and flags: how they merge, and who said a key.

Mappings are merged, lists and values replaced. Whoever said a key last is who an error names, and
in whose folder its relative path starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

from wancli.job.yaml_reader import Key, join_key


@dataclass(frozen=True)
class Source:
    """Where each key of a file, or of a flag, stands, so that any later error can name its line."""

    file: str
    lines: Mapping[tuple[Key, ...], int] = field(default_factory=dict)
    flag: bool = False

    def location(self, *path: Key) -> str:
        """`job.yaml:12: sampler.steps`; a key that was never written gets the line of its parent."""
        if self.flag:
            return f"{self.file} {join_key(path)}"
        line = next((self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), None)
        place = f"{self.file}:{line}" if line else self.file
        return f"{place}: {join_key(path)}" if path else place


@dataclass(frozen=True)
class Layer:
    """What one place says of a shot: a mapping of its keys, or the value of the key `at`."""

    source: Source
    base_dir: Path  # where its relative paths start
    value: Any
    prefix: tuple[Key, ...] = ()  # where the value stands in its source
    at: tuple[Key, ...] = ()

    def location(self, path: tuple[Key, ...], *, of_key: bool = False) -> str:
        """The place of a key of the shot; `of_key` that of the key of an axis, not of one of its values."""
        is_axis = self.at and of_key and len(path) <= len(self.at) and isinstance(self.prefix[-1], int)
        prefix = self.prefix[:-1] if is_axis else self.prefix
        return self.source.location(*prefix, *path[len(self.at) :])

    def reach(self, path: tuple[Key, ...]) -> tuple[float, bool]:
        """How many parts of `path` are said here, and whether that hides what lower layers say of it.

        A mapping that is only made on the way to `at` counts half a part less than one that is said.
        """
        if path != self.at and path == self.at[: len(path)]:
            return len(path) - 0.5, False
        if path[: len(self.at)] != self.at:
            return 0, False
        value, count, listed = self.value, len(self.at), False
        for part in path[len(self.at) :]:
            if isinstance(value, dict) and part in value:
                value = value[part]
            elif isinstance(value, list) and isinstance(part, int) and part < len(value):
                value, listed = value[part], True
            else:
                break
            count += 1
        return count, listed or count == len(path) or not isinstance(value, dict)


@dataclass(frozen=True)
class Layers:
    """The layers of a shot, lowest first. `job_layer` is the job file: it owns keys that no layer sets."""

    stack: tuple[Layer, ...]
    job_layer: Layer

    def owner(self, path: tuple[Key, ...]) -> Layer:
        found, most = self.job_layer, 0.0
        for layer in reversed(self.stack):
            count, hides = layer.reach(path)
            if count > most:
                found, most = layer, count
            if hides:
                break
        return found

    def location(self, *path: Key) -> str:
        return self.owner(path).location(path)

    def with_layers(self, *above: Layer) -> Layers:
        return Layers((*self.stack, *above), self.job_layer)

    @property
    def merged(self) -> dict[str, Any]:
        """What the layers that are mappings say together."""
        return reduce(merge, (layer.value for layer in self.stack if not layer.at), {})


def merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """`override` over `base`, mapping by mapping; a list is replaced whole."""
    result = dict(base)
    for key, value in override.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if both else value
    return result


def assign(base: Any, path: Sequence[str], value: Any, done: tuple[str, ...] = ()) -> Any:
    """`base` with `value` put, or merged, at a path; nothing is changed in place.

    Mappings on the way are made, entries of lists are not: LookupError says which is not there.
    """
    if not path:
        return merge(base, value) if isinstance(base, dict) and isinstance(value, dict) else value
    head, *rest = path
    here = ".".join(done)
    if isinstance(base, list):
        if not head.isdecimal() or int(head) >= len(base):
            raise LookupError(f"{here} has {len(base)} entries, and no {head}")
        index = int(head)
        entry = assign(base[index], rest, value, (*done, head))
        return [*base[:index], entry, *base[index + 1 :]]
    if not isinstance(base, dict):
        raise LookupError(f"{here} is no mapping, so there is no {head} in it")
    if rest and rest[0].isdecimal() and head not in base:
        raise LookupError(f"{'.'.join((*done, head))} has no entries")
    return {**base, head: assign(base.get(head, {}), rest, value, (*done, head))}


def look_up(value: Any, path: Sequence[str]) -> tuple[tuple[Key, ...], Any]:
    """The path as the value has it, numbers where lists are, and what is there. Raises LookupError."""
    keys: list[Key] = []
    for part in path:
        if isinstance(value, list) and part.isdecimal():
            keys.append(int(part))
            value = value[int(part)]
        elif isinstance(value, dict):
            keys.append(part)
            value = value[part]
        else:
            raise LookupError(part)
    return tuple(keys), value
