"""Resolve `model:` to a Location: from a path, a name in models.yaml or on the hub, or single files.

models.yaml maps names to values that `model:` of a job may have. Its paths start from its own folder. It is
$WANCLI_MODELS, or else models.yaml in the user's config folder.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from wancli import wan_mini
from wancli.errors import JobError
from wancli.job.loader import Item
from wancli.job.overrides import Source
from wancli.job.schema import ModelEntry, ModelFiles
from wancli.job.validation import describe_problems
from wancli.job.yaml_reader import Key, read_yaml
from wancli.storage import disk, links
from wancli.storage.paths import expand_home, user_folder
from wancli.weights.checkpoint import Location
from wancli.weights.hub import cache as cache_of_hub
from wancli.weights.hub import lookup
from wancli.weights.hub.name import HubName, parse_name
from wancli.weights.single_files import SingleFiles

Locate = Callable[..., str]
BaseDir = Callable[..., Path]


def resolve_model(spec: str | ModelFiles, base_dir: BaseDir, locate: Locate) -> Location:
    """Resolve a model to its folder, file or files.

    `locate` names the place of a key below `model`, and `base_dir` returns the folder that a relative path at
    that key starts from. `wan-mini` and the names in models.yaml win over a folder of the same name; write
    `./NAME` for the folder. Raises JobError if a file or folder does not exist.
    """
    if isinstance(spec, ModelFiles):
        return _resolve_files(spec, base_dir, locate)
    if spec == wan_mini.NAME:
        return wan_mini.FOLDER
    known = registered_models() if _may_be_name(spec) else {}
    if spec in known:
        found = known[spec]
        return _find_on_hub(found, locate()) if isinstance(found, HubName) else found
    path = _find_path(spec, base_dir(), locate())
    if path is not None:
        return path
    searched = resolve_path(base_dir(), spec, locate())
    if name := parse_name(spec):
        try:
            return _find_on_hub(name, locate())
        except JobError as error:
            hint = f"{error.hint} There is no {searched}, either."
            raise JobError(f"{spec!r} not found", where=error.where, hint=hint) from None
    raise JobError(f"{spec!r} not found", where=locate(), hint=_not_found_hint(spec, searched))


def resolve_file(text: str, base_dir: Path, location: str) -> Path:
    """Resolve a file of weights: a path, which need not exist, or a name of the hub.

    Raises JobError for a name of the hub that is not in the cache.
    """
    name = parse_name(text)
    if name is None or _find_path(text, base_dir, location):
        return resolve_path(base_dir, text, location)
    with disk.reading_for_job(location, text):
        return lookup.require_path(name, location)


def _resolve_unchecked(text: str, base_dir: Path, location: str) -> Path:
    """Resolve a file of models.yaml, which need not exist; a name of the hub if it is in the cache."""
    name = parse_name(text)
    on_hub = cache_of_hub.find_path(name) if name and not _find_path(text, base_dir, location) else None
    return on_hub or resolve_path(base_dir, text, location)


def _find_path(text: str, base_dir: Path, location: str) -> Path | None:
    path = resolve_path(base_dir, text, location)
    with disk.reading_for_job(location, text):
        return path if disk.is_taken(path) else None


def _find_on_hub(name: HubName, location: str) -> Location:
    """Return the folder or files of a name in the Hugging Face cache. Raises JobError."""
    with disk.reading_for_job(location, str(name)):
        path = lookup.require_path(name, location)
        named: dict[str, Any] = {**(lookup.find_files(name, location) or {})}
    return SingleFiles(**named) if named else path


class ModelLocations:
    """Resolves the model of an item, once for all items with the same `model:`."""

    def __init__(self) -> None:
        self._locations: dict[object, Location] = {}

    def __call__(self, item: Item) -> Location:
        spec = item.job.model
        keys = [()] if isinstance(spec, str) else [(key,) for key in ModelFiles.model_fields]
        key = (spec, *(item.base_dir("model", *below) for below in keys))
        if key not in self._locations:
            base_dir, locate = partial(item.base_dir, "model"), partial(item.location, "model")
            self._locations[key] = resolve_model(spec, base_dir, locate)
        return self._locations[key]


def registered_models() -> dict[str, Location | HubName]:
    """Read the models in models.yaml. Raises JobError with every problem in it."""
    path = models_file()
    with disk.reading_for_job(str(path)):
        if path is not None and (found := disk.status(path)):
            return _read_models_file(path, found.st_mtime_ns)
    if "WANCLI_MODELS" in os.environ:
        raise JobError("not found", where=f"$WANCLI_MODELS: {path}")
    return {}


def models_file() -> Path | None:
    """Return the path of models.yaml, None if there is neither $WANCLI_MODELS nor a home folder."""
    if custom := os.environ.get("WANCLI_MODELS"):
        return disk.resolve(expand_home(custom, "$WANCLI_MODELS"))
    folder = user_folder("config")
    return disk.resolve(folder / "models.yaml") if folder else None


def resolve_path(base_dir: Path, text: str, location: str) -> Path:
    """Resolve a path of a file from that file's folder; a link to a file keeps its name.

    Raises JobError if it cannot be resolved.
    """
    with disk.reading_for_job(location, text):
        return links.resolve_path(base_dir / expand_home(text, location, base_dir))


@cache
def _read_models_file(path: Path, _changed: int) -> dict[str, Location | HubName]:
    raw, lines, _ = read_yaml(disk.read_bytes(path), str(path))
    source = Source(str(path), path.parent, lines)
    if not isinstance(raw, dict):
        raise JobError("is not a mapping of names to models", where=str(path), hint="Write NAME: FOLDER.")
    locations: dict[str, Location | HubName] = {}
    problems: list[str] = []
    for name, entry in raw.items():

        def where(*below: Key, name: str = name) -> str:
            return source.location(name, *below)

        try:
            model = ModelEntry.model_validate({"model": entry}).model
            if isinstance(model, ModelFiles):
                locations[name] = _resolve_files(model, lambda *_: path.parent, where, must_exist=False)
            else:
                on_hub = None if _find_path(model, path.parent, where()) else parse_name(model)
                locations[name] = on_hub or resolve_path(path.parent, model, where())
        except ValidationError as error:
            problems += describe_problems(error, lambda at, _, where=where: where(*at[1:]))  # type: ignore[misc]
        except JobError as error:
            problems += str(error).splitlines()
    if problems:
        raise JobError("\n".join(problems))
    return locations


def _resolve_files(
    files: ModelFiles, base_dir: BaseDir, locate: Locate, *, must_exist: bool = True
) -> SingleFiles:
    """Resolve the paths of a mapping of files. Raises JobError for a contradiction or a missing file."""
    if files.transformer and (files.high_noise or files.low_noise):
        raise JobError("names a transformer and an expert; use one or the other", where=locate())
    if not (files.transformer or files.high_noise or files.low_noise):
        raise JobError("names no transformer", where=locate(), hint="Add transformer: FILE.")
    paths: dict[str, Path] = {}
    for key, text in files.model_dump(exclude_none=True, exclude={"heads", "variant"}).items():
        resolve = resolve_file if must_exist else _resolve_unchecked
        paths[key] = resolve(text, base_dir(key), locate(key))
        with disk.reading_for_job(locate(key), text):
            is_found = not must_exist or disk.is_taken(paths[key])
        if not is_found:
            raise JobError(f"{text!r} not found", where=locate(key), hint=f"Looked for {paths[key]}.")
    return SingleFiles(**paths, heads=files.heads, variant=files.variant)


def _may_be_name(text: str) -> bool:
    return "/" not in text and not text.startswith((".", "~"))


def _not_found_hint(name: str, path: Path) -> str:
    """Build the hint: the path that was looked for, and the known names if it may be a name."""
    searched = f"Looked for {path}"
    if not _may_be_name(name):
        return f"{searched}."
    known = sorted(registered_models())
    if not known:
        return f"{searched}; {models_file()} names no models."
    near = next(iter(difflib.get_close_matches(name, known, 1, 0.6)), None)
    meant = f"; did you mean {near!r}?" if near else "."
    return f"{searched}; {models_file()} names {', '.join(known)}{meant}"
