"""Read a job file and the files that it extends, and merge them: later files over earlier, the job last."""

from __future__ import annotations

import os
from pathlib import Path

from wancli.errors import JobError
from wancli.job.overrides import Layer, Merged, Source, merge_layers
from wancli.job.yaml_reader import MAX_BYTES, read_yaml
from wancli.storage import disk
from wancli.storage.paths import expand_home

MAX_DEPTH, MAX_FILES = 8, 64


def read_file(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Read a file, at most one byte more than `limit`. Raises JobError."""
    with disk.reading_for_job(str(path)):
        if disk.is_folder(path):
            raise JobError("is a folder, not a job file", where=str(path))
        with disk.opened(path, pipes=True) as file:
            return file.read(limit + 1)


def read_referenced(name: str, source: Source, limit: int = MAX_BYTES) -> tuple[bytes, Path, str]:
    """Read the file that a key of a job names. Returns its bytes, its path, and its name for messages.

    The name for messages starts from where that of the job starts. Raises JobError if it cannot be read.
    """
    relative = expand_home(name, source.location(), source.base_dir)
    with disk.reading_for_job(source.location(), name):
        path = disk.resolve(source.base_dir / relative)
        with disk.opened(path, pipes=True) as file:
            data = file.read(limit + 1)
    return data, path, os.path.normpath(Path(source.file).parent / relative)


def load_merged(data: bytes, file: str, path: Path | None, directory: Path) -> Merged:
    """Merge the job file that has these bytes over those it extends. `path` is None for a job from a pipe.

    Raises JobError if a file is not a mapping, if files extend one another in a circle, and for more than
    8 levels or 64 files.
    """
    return merge_layers(
        _read_layers(data, Source(file, directory), (disk.resolve(path),) if path else (), [])
    )


def _read_layers(data: bytes, source: Source, chain: tuple[Path, ...], opened: list[Path]) -> list[Layer]:
    raw, lines, comments = read_yaml(data, source.file)
    source = Source(source.file, source.base_dir, lines, comments)
    if not isinstance(raw, dict):
        hint = "Start with: prompt: ..."
        raise JobError("a job is a mapping of keys to values", where=source.file, hint=hint)
    value = raw.pop("extends", [])
    key = source.at("extends")
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise JobError("must be the name of a job file, or a list of names", where=key.location())
    layers: list[Layer] = []
    for index, name in enumerate(names):
        layers += _read_extended(name, key if isinstance(value, str) else key.at(index), chain, opened)
    return [*layers, Layer(source, raw)]


def _read_extended(name: str, source: Source, chain: tuple[Path, ...], opened: list[Path]) -> list[Layer]:
    data, path, display_name = read_referenced(name, source)
    if path in chain:
        circle = " -> ".join(str(p.name) for p in (*chain[chain.index(path) :], path))
        raise JobError(f"goes in a circle: {circle}", where=source.location())
    if len(chain) > MAX_DEPTH:
        raise JobError(f"more than {MAX_DEPTH} files extend one another", where=source.location())
    opened.append(path)
    if len(opened) > MAX_FILES:
        raise JobError(f"more than {MAX_FILES} files", where=source.location())
    return _read_layers(data, Source(display_name, path.parent), (*chain, path), opened)
