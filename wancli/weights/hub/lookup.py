"""What a name of the hub means on this machine: a path in the cache, or an error with the way to fetch it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from wancli.errors import CheckpointError, JobError
from wancli.storage import disk
from wancli.weights.hub import cache
from wancli.weights.hub.models import find_known
from wancli.weights.hub.name import HubName, parse_name


def require_name(text: str, where: str) -> HubName:
    """Parse a name. Raises JobError."""
    if name := parse_name(text):
        return name
    hint = "Write ORG/NAME, ORG/NAME@REVISION or ORG/NAME:FILE; `wancli fetch --list` has examples."
    raise JobError(f"{text!r} is not a name on the Hugging Face hub", where=where, hint=hint)


def list_parts(name: HubName) -> list[HubName]:
    """List the name, and the files of other repositories that the table says it needs."""
    known = find_known(name)
    return [name, *(part for part in known.files.values() if part != known.hub_name)] if known else [name]


def find_files(name: HubName, where: str) -> Mapping[str, Path] | None:
    """Return the files of a checkpoint that the table names file by file, by role; None for other names.

    Raises JobError if one is not in the cache.
    """
    known = find_known(name)
    if known is None or not known.files:
        return None
    return {
        role: require_path(name if part == known.hub_name else part, where, whole=name)
        for role, part in known.files.items()
    }


def require_path(name: HubName, where: str, *, whole: HubName | None = None) -> Path:
    """Return the path of a name in the cache. Raises JobError that says what to fetch, and how large it is.

    `whole` is the model that the name is a part of.
    """
    path = cache.find_path(name)
    if path is None:
        what = f"{str(name)!r} is not in the Hugging Face cache"
        raise JobError(what, where=where, hint=fetch_hint(whole or name))
    return path


def fetch_hint(name: HubName) -> str:
    """Say where the name was looked for, how to fetch it and, if that is known, how large it is."""
    known = find_known(name)
    size = f" fetches {known.gigabytes:g} GB ({known.licence})" if known else " fetches it"
    exact = "" if known else f", `wancli fetch {name} --dry-run` says how large it is"
    return f"Looked in {cache.cache_folder()}; `wancli fetch {name}`{size}{exact}."


def resolve_argument(path: Path) -> Path:
    """Return a path of the command line, or what it means in the cache if it is a name of the hub."""
    name = parse_name(str(path))
    return path if name is None or disk.is_taken(path) else require_path(name, "")


@contextmanager
def explaining_gaps(path: Path | None) -> Iterator[None]:
    """Add to a CheckpointError about a missing file of a snapshot how to fetch it."""
    try:
        yield
    except CheckpointError as error:
        name = cache.name_of(path) if path else None
        if name is None or (error.hint and "download" not in error.hint):
            raise
        hint = "\n".join(filter(None, (error.hint, f"`wancli fetch {name}` fetches what is missing.")))
        raise CheckpointError(error.message, where=error.where, hint=hint) from error
