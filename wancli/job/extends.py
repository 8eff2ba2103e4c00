"""A job file and the files that it extends, as layers: the job over them, a later one over an earlier one."""

from __future__ import annotations

import os
from pathlib import Path

from wancli.errors import JobError
from wancli.job.overrides import Layer, Layers, Source
from wancli.job.yaml_reader import MAX_BYTES, read_yaml

MAX_DEPTH, MAX_FILES = 8, 64


def read_file(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The bytes of a file, at most one more than `limit`. Raises JobError."""
    try:
        with path.open("rb") as file:
            return file.read(limit + 1)
    except IsADirectoryError:
        raise JobError("is a folder, not a job file", where=str(path)) from None
    except OSError as error:
        raise JobError(f"cannot be read: {error.strerror}", where=str(path)) from None


def read_referenced(
    name: str, layer: Layer, location: str, limit: int = MAX_BYTES
) -> tuple[bytes, Path, str]:
    """The file that a layer names: its bytes, where it is, and how to show it, as the layer's own is.

    Raises JobError for what is not there.
    """
    try:
        relative = Path(name).expanduser()
        path = (layer.base_dir / relative).resolve()
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        hint = f"Looked for {layer.base_dir / relative}."
        raise JobError(f"{name!r} cannot be read: {error.strerror}", where=location, hint=hint) from None
    except (RuntimeError, ValueError) as error:  # no such user, or a symbolic link to itself
        raise JobError(f"{name!r}: {error}", where=location) from None
    return data, path, os.path.normpath(Path(layer.source.file).parent / relative)


def load_layers(data: bytes, file: str, path: Path | None, directory: Path) -> Layers:
    """The layers of a job file with these bytes; `path` is where it is, unless it came from a pipe.

    Raises JobError for what is no mapping, a circle, and more than 8 levels or 64 files.
    """
    stack = tuple(_read_layers(data, file, directory, (path.resolve(),) if path else (), []))
    return Layers(stack, stack[-1])


def _read_layers(
    data: bytes, file: str, directory: Path, chain: tuple[Path, ...], opened: list[Path]
) -> list[Layer]:
    raw, lines = read_yaml(data, file)
    source = Source(file, lines)
    if not isinstance(raw, dict):
        raise JobError("a job is a mapping of keys to values", where=file, hint="Start with: prompt: ...")
    value = raw.pop("extends", [])
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise JobError("must be the name of a job file, or a list of names", where=source.location("extends"))
    below: list[Layer] = []
    own = Layer(source, directory, raw)
    for index, name in enumerate(names):
        location = source.location("extends", *(() if isinstance(value, str) else (index,)))
        below += _read_extended(name, location, own, chain, opened)
    return [*below, own]


def _read_extended(
    name: str, location: str, layer: Layer, chain: tuple[Path, ...], opened: list[Path]
) -> list[Layer]:
    data, path, display_name = read_referenced(name, layer, location)
    if path in chain:
        circle = " -> ".join(str(p.name) for p in (*chain[chain.index(path) :], path))
        raise JobError(f"goes in a circle: {circle}", where=location)
    if len(chain) > MAX_DEPTH:
        raise JobError(f"more than {MAX_DEPTH} files extend one another", where=location)
    opened.append(path)
    if len(opened) > MAX_FILES:
        raise JobError(f"more than {MAX_FILES} files", where=location)
    return _read_layers(data, display_name, path.parent, (*chain, path), opened)
