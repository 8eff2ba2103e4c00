"""A job file and the files that it extends, as layers: the job over them, a later one over an earlier one."""

from __future__ import annotations

import os
from pathlib import Path

from wancli.errors import JobError
from wancli.job.overrides import Layer, Layers, Source
from wancli.job.yaml_reader import MAX_BYTES, read_yaml

MAX_DEPTH, MAX_FILES = 8, 64


def content(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The bytes of a file, at most one more than `limit`. Raises JobError."""
    try:
        with path.open("rb") as file:
            return file.read(limit + 1)
    except IsADirectoryError:
        raise JobError("is a folder, not a job file", where=str(path)) from None
    except OSError as error:
        raise JobError(f"cannot be read: {error.strerror}", where=str(path)) from None


def named(name: str, by: Layer, where: str, limit: int = MAX_BYTES) -> tuple[bytes, Path, str]:
    """The file that a layer names: its bytes, where it is, and how to show it, as the layer's own is.

    Raises JobError for what is not there.
    """
    try:
        said = Path(name).expanduser()
        path = (by.directory / said).resolve()
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        hint = f"Looked for {by.directory / said}."
        raise JobError(f"{name!r} cannot be read: {error.strerror}", where=where, hint=hint) from None
    except (RuntimeError, ValueError) as error:  # no such user, or a symbolic link to itself
        raise JobError(f"{name!r}: {error}", where=where) from None
    return data, path, os.path.normpath(Path(by.source.file).parent / said)


def layers(data: bytes, file: str, path: Path | None, directory: Path) -> Layers:
    """The layers of a job file with these bytes; `path` is where it is, unless it came from a pipe.

    Raises JobError for what is no mapping, a circle, and more than 8 levels or 64 files.
    """
    stack = tuple(_read(data, file, directory, (path.resolve(),) if path else (), []))
    return Layers(stack, stack[-1])


def _read(
    data: bytes, file: str, directory: Path, chain: tuple[Path, ...], opened: list[Path]
) -> list[Layer]:
    raw, lines = read_yaml(data, file)
    source = Source(file, lines)
    if not isinstance(raw, dict):
        raise JobError("a job is a mapping of keys to values", where=file, hint="Start with: prompt: ...")
    said = raw.pop("extends", [])
    names = [said] if isinstance(said, str) else said
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise JobError("must be the name of a job file, or a list of names", where=source.where("extends"))
    below: list[Layer] = []
    own = Layer(source, directory, raw)
    for index, name in enumerate(names):
        where = source.where("extends", *(() if isinstance(said, str) else (index,)))
        below += _extended(name, where, own, chain, opened)
    return [*below, own]


def _extended(name: str, where: str, file: Layer, chain: tuple[Path, ...], opened: list[Path]) -> list[Layer]:
    data, path, shown = named(name, file, where)
    if path in chain:
        circle = " -> ".join(str(p.name) for p in (*chain[chain.index(path) :], path))
        raise JobError(f"goes in a circle: {circle}", where=where)
    if len(chain) > MAX_DEPTH:
        raise JobError(f"more than {MAX_DEPTH} files extend one another", where=where)
    opened.append(path)
    if len(opened) > MAX_FILES:
        raise JobError(f"more than {MAX_FILES} files", where=where)
    return _read(data, shown, path.parent, (*chain, path), opened)
