"""Where a model is: a path, a name of models.yaml, or files named one by one; decided to a Location.

models.yaml is a mapping from names to what `model:` of a job may be; its paths start from its own
folder. It is $WANCLI_MODELS, else models.yaml in the user's config folder.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from pydantic import ValidationError

from wancli import wan_mini
from wancli.errors import JobError
from wancli.job.loader import Item
from wancli.job.overrides import Source
from wancli.job.schema import ModelFiles, ModelOnly
from wancli.job.validation import problems_of
from wancli.job.yaml_reader import Key, read_yaml
from wancli.weights.checkpoint import Location
from wancli.weights.single_files import Files

Where = Callable[..., str]
Folder = Callable[..., Path]


def resolve(said: str | ModelFiles, folder: Folder, where: Where) -> Location:
    """The folder, file or files that a model is. `where` names the place of a key below `model`, and
    `folder` tells where the relative path at that key starts.

    A name of models.yaml, or wan-mini, wins over a folder of that name, which is `./NAME`. Raises
    JobError for what is not there.
    """
    if isinstance(said, ModelFiles):
        return _files(said, folder, where)
    if said == wan_mini.NAME:
        return wan_mini.FOLDER
    known = presets() if _may_be_name(said) else {}
    if said in known:
        return known[said]
    path = resolved(folder(), said, where())
    if not os.path.lexists(path):
        raise JobError(f"{said!r} is not there", where=where(), hint=_hint(said, path))
    return path


class Locations:
    """Where the model of an item is; looked for once for all items that say the same."""

    def __init__(self) -> None:
        self._found: dict[object, Location] = {}

    def __call__(self, item: Item) -> Location:
        said = item.job.model
        keys = [()] if isinstance(said, str) else [(key,) for key in ModelFiles.model_fields]
        key = (said, *(item.folder("model", *below) for below in keys))
        if key not in self._found:
            folder, where = partial(item.folder, "model"), partial(item.where, "model")
            self._found[key] = resolve(said, folder, where)
        return self._found[key]


def presets() -> dict[str, Location]:
    """The models that models.yaml names. Raises JobError with every problem in it."""
    path = models_file()
    try:
        return _loaded(path, path.stat().st_mtime_ns)
    except FileNotFoundError:
        if "WANCLI_MODELS" in os.environ:
            raise JobError("is not there", where=f"$WANCLI_MODELS: {path}") from None
        return {}
    except OSError as error:
        raise JobError(f"cannot be read: {error.strerror}", where=str(path)) from None


def models_file() -> Path:
    from platformdirs import user_config_path

    said = os.environ.get("WANCLI_MODELS")
    return (Path(said) if said else user_config_path("wancli") / "models.yaml").expanduser().resolve()


def resolved(directory: Path, said: str, where: str) -> Path:
    """A path that was said, from the folder of its file. Raises JobError for one that can be none."""
    try:
        return (directory / Path(said).expanduser()).resolve()
    except RuntimeError as error:  # no such user, or a symbolic link to itself
        raise JobError(f"{said!r}: {error}", where=where) from None


@cache
def _loaded(path: Path, _changed: int) -> dict[str, Location]:
    raw, lines = read_yaml(path.read_bytes(), str(path))
    source = Source(str(path), lines)
    if not isinstance(raw, dict):
        raise JobError("is no mapping of names to models", where=str(path), hint="Write NAME: FOLDER.")
    found: dict[str, Location] = {}
    problems: list[str] = []
    for name, entry in raw.items():

        def where(*below: Key, name: str = name) -> str:
            return source.where(name, *below)

        try:
            model = ModelOnly.model_validate({"model": entry}).model
            if isinstance(model, ModelFiles):
                found[name] = _files(model, lambda *_: path.parent, where, must_exist=False)
            else:
                found[name] = resolved(path.parent, model, where())
        except ValidationError as error:
            problems += problems_of(error, lambda at, _, where=where: where(*at[1:]))  # type: ignore[misc]
        except JobError as error:
            problems += str(error).splitlines()
    if problems:
        raise JobError("\n".join(problems))
    return found


def _files(said: ModelFiles, folder: Folder, where: Where, *, must_exist: bool = True) -> Files:
    """The mapping with its paths made absolute. Raises JobError for a contradiction or an absent file."""
    if said.transformer and (said.high_noise or said.low_noise):
        raise JobError("says transformer and an expert; say one or two experts", where=where())
    if not (said.transformer or said.high_noise or said.low_noise):
        raise JobError("names no transformer", where=where(), hint="Add transformer: FILE.")
    paths: dict[str, Path] = {}
    for key, text in said.model_dump(exclude_none=True, exclude={"heads"}).items():
        paths[key] = resolved(folder(key), text, where(key))
        if must_exist and not os.path.lexists(paths[key]):
            raise JobError(f"{text!r} is not there", where=where(key), hint=f"Looked for {paths[key]}.")
    return Files(**paths, heads=said.heads)


def _may_be_name(said: str) -> bool:
    return "/" not in said and not said.startswith((".", "~"))


def _hint(said: str, path: Path) -> str:
    """Where it was looked for and, for what may be a name, which names there are."""
    looked = f"Looked for {path}"
    if not _may_be_name(said):
        return f"{looked}."
    known = sorted(presets())
    if not known:
        return f"{looked}; {models_file()} names no models."
    near = next(iter(difflib.get_close_matches(said, known, 1, 0.6)), None)
    meant = f"; did you mean {near!r}?" if near else "."
    return f"{looked}; {models_file()} names {', '.join(known)}{meant}"
