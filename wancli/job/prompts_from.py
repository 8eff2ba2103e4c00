"""Read the items of a list: a text file with a prompt (or picture) per line, or JSON lines of job keys."""

from __future__ import annotations

import json
from typing import Any, Literal

from wancli.errors import JobError
from wancli.job.extends import read_referenced
from wancli.job.matrix import MAX_SHOTS
from wancli.job.overrides import Layer, Source
from wancli.job.yaml_reader import Key, normalize_text

MAX_BYTES = 16 * 1024 * 1024


def read(name: str, owner: Source, key: Literal["prompt", "image"] = "prompt") -> list[Layer]:
    """Read a layer from each line of a file, except comments (#) and empty lines. `owner` names the file.

    A line of a text file is the value of `key`.

    Raises JobError with all problems.
    """
    data, path, display_name = read_referenced(name, owner, MAX_BYTES)
    if len(data) > MAX_BYTES:
        raise JobError(f"is larger than {MAX_BYTES // 2**20} MiB", where=display_name)
    layers: list[Layer] = []
    problems: list[str] = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip() or line.lstrip().startswith(b"#"):
            continue
        try:
            value = _parse_line(line, None if path.suffix == ".jsonl" else key, f"{display_name}:{number}")
        except JobError as error:
            problems.append(str(error))
            continue
        # A missing prompt is also reported at this line.
        lines: dict[tuple[Key, ...], int] = {(key,): number for key in (*value, "prompt")}
        layers.append(Layer(Source(display_name, path.parent, lines), value))
    if len(layers) > MAX_SHOTS:
        raise JobError(f"contains {len(layers):,} {key}s; the limit is {MAX_SHOTS:,}", where=display_name)
    if problems:
        raise JobError("\n".join(problems))
    if not layers:
        raise JobError(f"contains no {key}s", where=display_name)
    return layers


def _parse_line(line: bytes, key: str | None, location: str) -> dict[str, Any]:
    """Parse a line as the value of `key`, or without one as JSON."""
    try:
        text = line.decode().strip()
    except UnicodeDecodeError as error:
        raise JobError(f"byte {error.start} of the line is not UTF-8", where=location) from None
    if key:
        return {key: normalize_text(text, f"{location}: {key}")}
    try:
        value = json.loads(text, object_pairs_hook=_refuse_duplicate_keys)
    except (ValueError, RecursionError) as error:
        problem = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise JobError(f"is not JSON: {problem}", where=location) from None
    if not isinstance(value, dict):
        raise JobError("is not a JSON object", where=location, hint='Write {"prompt": "..."}.')
    _check_texts(value, location)
    return value


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} appears twice")
    return result


def _check_texts(value: Any, location: str) -> None:
    """Refuse NUL and halves of surrogate pairs, at any depth. Raises JobError."""
    match value:
        case str():
            normalize_text(value, location)
        case list():
            for entry in value:
                _check_texts(entry, location)
        case dict():
            for key, entry in value.items():
                normalize_text(key, location)
                _check_texts(entry, location)
