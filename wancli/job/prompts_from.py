"""`prompts_from`: a text file with a prompt a line, or JSON lines with any keys of a job; each is an item."""

from __future__ import annotations

import json
from typing import Any

from wancli.errors import JobError
from wancli.job.extends import named
from wancli.job.matrix import MAX_SHOTS
from wancli.job.overrides import Layer, Source
from wancli.job.yaml_reader import Key, plain_text

MAX_BYTES = 16 * 1024 * 1024


def read(name: str, by: Layer, where: str) -> list[Layer]:
    """One layer per line of the file that `by` names, comments (#) and empty lines left out.

    Raises JobError with all problems.
    """
    data, path, shown = named(name, by, where, MAX_BYTES)
    if len(data) > MAX_BYTES:
        raise JobError(f"is larger than {MAX_BYTES // 2**20} MiB", where=shown)
    layers: list[Layer] = []
    problems: list[str] = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip() or line.lstrip().startswith(b"#"):
            continue
        try:
            value = _item(line, path.suffix == ".jsonl", f"{shown}:{number}")
        except JobError as error:
            problems.append(str(error))
            continue
        # Also the place of a prompt that is missing.
        lines: dict[tuple[Key, ...], int] = {(key,): number for key in (*value, "prompt")}
        layers.append(Layer(Source(shown, lines), path.parent, value))
    if len(layers) > MAX_SHOTS:
        raise JobError(f"holds {len(layers):,} prompts; {MAX_SHOTS:,} at most", where=shown)
    if problems:
        raise JobError("\n".join(problems))
    if not layers:
        raise JobError("holds no prompts", where=shown)
    return layers


def _item(line: bytes, as_json: bool, where: str) -> dict[str, Any]:
    try:
        text = line.decode().strip()
    except UnicodeDecodeError as error:
        raise JobError(f"byte {error.start} of the line is not UTF-8", where=where) from None
    if not as_json:
        return {"prompt": plain_text(text, f"{where}: prompt")}
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        said = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise JobError(f"is not JSON: {said}", where=where) from None
    if not isinstance(value, dict):
        raise JobError("is no JSON object", where=where, hint='Write {"prompt": "..."}.')
    _check_texts(value, where)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


def _check_texts(value: Any, where: str) -> None:
    """No NUL and no half of a surrogate pair, at any depth."""
    match value:
        case str():
            plain_text(value, where)
        case list():
            for entry in value:
                _check_texts(entry, where)
        case dict():
            for key, entry in value.items():
                plain_text(key, where)
                _check_texts(entry, where)
