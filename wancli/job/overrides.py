"""How the layers of a shot are merged, and which of them set a key.

Files, an item, axes and flags set the keys of a shot, one over another. Mappings are merged; lists and
values are replaced. The source that set a key last is the one that an error names, and relative paths
start from its folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wancli.job.yaml_reader import Key, join_key
from wancli.units import pluralize

KeyPath = tuple[Key, ...]


@dataclass(frozen=True)
class Source:
    """A place in a file, or in a flag of the command line, that sets keys of a shot."""

    file: str  # or the flag
    base_dir: Path  # where relative paths start
    lines: Mapping[KeyPath, int] = field(default_factory=dict)
    comments: Mapping[KeyPath, str] = field(default_factory=dict)  # right behind unquoted texts
    prefix: KeyPath = ()  # the place, as a path of keys in the file
    is_flag: bool = False
    is_parent: bool = False  # the place sets a key further down, not the whole mapping

    def at(self, *path: Key) -> Source:
        """The place `path` below this one."""
        return replace(self, prefix=(*self.prefix, *path)) if path else self

    def location(self, *path: Key) -> str:
        """Name the place: `job.yaml:12: sampler.steps`. A key the file lacks has its parent's line."""
        path = (*self.prefix, *path)
        if self.is_flag:
            return f"{self.file} {join_key(path)}"
        line = next((self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), None)
        place = f"{self.file}:{line}" if line else self.file
        return f"{place}: {join_key(path)}" if path else place

    def key_location(self) -> str:
        """Name the place; for one of the values of an axis, name the key of the axis."""
        is_value = self.prefix and isinstance(self.prefix[-1], int)
        return replace(self, prefix=self.prefix[:-1]).location() if is_value else self.location()


@dataclass(frozen=True)
class Layer:
    """What a source sets: a mapping of keys of a shot, or the value of one key."""

    source: Source
    value: Any


@dataclass(frozen=True)
class Sources:
    """The source of each key. A key without an entry has the source of its nearest parent with one."""

    job_file: Source  # where a key could be set that no layer sets
    entries: Mapping[KeyPath, Source]

    def find(self, path: KeyPath) -> Source | None:
        """The source that set a key, or a mapping that could hold it; None if no layer set either."""
        for n in range(len(path), 0, -1):
            source = self.entries.get(path[:n])
            if source and (n == len(path) or not source.is_parent):
                return source.at(*path[n:])
        return None

    def owner(self, path: KeyPath) -> Source:
        return self.find(path) or self.job_file.at(*path)

    def location(self, *path: Key) -> str:
        return self.owner(path).location()


# Keys at which a text is short for a mapping with one key. `--set` may add others to it.
_SHORT_FORMS = {("image",): "first", ("model",): "transformer"}


@dataclass(frozen=True)
class Merged:
    """The merged keys of all layers so far, and their sources. Nothing is changed in place."""

    values: dict[str, Any]
    sources: Sources

    def merge(self, layer: Layer) -> Merged:
        """Put a mapping of keys over these."""
        entries = dict(self.sources.entries)
        values = _merge(self.values, layer.value, (), layer.source, entries)
        return Merged(values, replace(self.sources, entries=entries))

    def assign(self, path: Sequence[str], layer: Layer) -> Merged:
        """Put the value of one key over these. Creates missing mappings on the way, but no list entries.

        Raises LookupError with a message if an entry of the path cannot exist.
        """
        entries = dict(self.sources.entries)
        values = _assign(self.values, path, (), layer, entries)
        return Merged(values, replace(self.sources, entries=entries))


def merge_layers(layers: Sequence[Layer]) -> Merged:
    """Merge mappings of keys, the lowest layer first. The last layer is the job file."""
    merged = Merged({}, Sources(layers[-1].source, {}))
    for layer in layers:
        merged = merged.merge(layer)
    return merged


def _merge(
    base: Mapping[str, Any],
    override: Mapping[str, Any],
    path: KeyPath,
    source: Source,
    entries: dict[KeyPath, Source],
) -> dict[str, Any]:
    result = dict(base)
    for key, value in override.items():
        result[key] = _put(result.get(key), value, (*path, key), source.at(key), entries)
    return result


def _put(base: Any, value: Any, path: KeyPath, source: Source, entries: dict[KeyPath, Source]) -> Any:
    """Put a value over that of a key, and record its source."""
    if not isinstance(base, dict) or not isinstance(value, dict):
        for below in [entry for entry in entries if entry[: len(path)] == path]:
            del entries[below]
        entries[path] = source
        return value
    # The keys of the mapping keep their sources, also those that had them from the mapping.
    for n in range(len(path), 0, -1):
        if owner := entries.get(path[:n]):
            for key in base:
                entries.setdefault((*path, key), owner.at(*path[n:], key))
            break
    entries[path] = source
    return _merge(base, value, path, source, entries)


def _assign(
    base: Any, path: Sequence[str], done: KeyPath, layer: Layer, entries: dict[KeyPath, Source]
) -> Any:
    if not path:
        return _put(base, layer.value, done, layer.source, entries)
    head, *rest = path
    if isinstance(base, str) and done in _SHORT_FORMS:
        base = {_SHORT_FORMS[done]: base}
    if isinstance(base, list):
        if not head.isdecimal() or int(head) >= len(base):
            raise LookupError(
                f"{join_key(done)} has {pluralize(len(base), 'entry', 'entries')}, so no entry {head}"
            )
        index = int(head)
        entry = _assign(base[index], rest, (*done, index), layer, entries)
        return [*base[:index], entry, *base[index + 1 :]]
    if not isinstance(base, dict):
        raise LookupError(f"{join_key(done)} is not a mapping, so it has no {head}")
    here = (*done, head)
    if rest and head not in base:
        if rest[0].isdecimal():
            raise LookupError(f"{join_key(here)} has no entries")
        entries[here] = replace(layer.source, is_parent=True)
    return {**base, head: _assign(base.get(head, {}), rest, here, layer, entries)}
