"""Read the items of a list: a prompt (or picture) per line, or keys of a job in JSON lines or a table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from wancli.errors import JobError
from wancli.job.extends import read_referenced
from wancli.job.matrix import MAX_SHOTS
from wancli.job.overrides import Layer, Source
from wancli.job.validation import takes_text
from wancli.job.yaml_reader import Key, normalize_text, read_yaml

MAX_BYTES = 16 * 1024 * 1024


def read(name: str, owner: Source, key: Literal["prompt", "image"] = "prompt") -> list[Layer]:
    """Read a layer from each line or row of a file, except comments (#) and empty lines. `owner` names the
    file.

    A line of a text file is the value of `key`.

    Raises JobError with all problems.
    """
    data, path, display_name = read_referenced(name, owner, MAX_BYTES)
    if len(data) > MAX_BYTES:
        raise JobError(f"is larger than {MAX_BYTES // 2**20} MiB", where=display_name)
    problems: list[str] = []
    data = data.removeprefix(b"\xef\xbb\xbf")
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        items = list(_read_table(data, kind, key, display_name, problems))
    else:
        items = list(_read_lines(data, None if kind == ".jsonl" else key, display_name, problems))
    if len(items) > MAX_SHOTS:
        raise JobError(f"contains {len(items):,} {key}s; the limit is {MAX_SHOTS:,}", where=display_name)
    if problems:
        raise JobError("\n".join(problems))
    if not items:
        raise JobError(f"contains no {key}s", where=display_name)
    layers = []
    for number, value in items:
        # A missing prompt is also reported at this line.
        lines: dict[tuple[Key, ...], int] = {(key,): number for key in (*value, "prompt")}
        layers.append(Layer(Source(display_name, path.parent, lines), value))
    return layers


def _read_lines(
    data: bytes, key: str | None, file: str, problems: list[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the keys of each line. Adds to `problems`."""
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip() or line.lstrip().startswith(b"#"):
            continue
        try:
            yield number, _parse_line(line, key, f"{file}:{number}")
        except JobError as error:
            problems.append(str(error))


def _read_table(
    data: bytes, kind: str, key: str, file: str, problems: list[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the last line of each row of a table, and the keys that it sets. Adds to `problems`."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise JobError(f"byte {error.start} is not UTF-8", where=f"{file}:{line}") from None
    heads = text.partition("\n")[0]
    delimiter = "\t" if kind == ".tsv" else ";" if heads.count(";") > heads.count(",") else ","
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        keys = [head.strip() for head in next(rows, [])]
        if key not in keys:
            hint = "The first row of a table names keys of a job: prompt,seed,sampler.steps"
            raise JobError(f"has no column `{key}`", where=f"{file}:1", hint=hint)
        for cells in rows:
            if not any(cells):
                continue
            try:
                yield rows.line_num, _parse_row(keys, cells, f"{file}:{rows.line_num}")
            except JobError as error:
                problems.append(str(error))
    except csv.Error as error:
        problems.append(f"{file}:{rows.line_num}: is not CSV: {error}")


def _parse_row(keys: Sequence[str], cells: Sequence[str], location: str) -> dict[str, Any]:
    """Return the keys that a row sets: a text as it is, else YAML; an empty cell sets nothing."""
    if len(cells) > len(keys):
        raise JobError(f"{len(cells)} cells, the table has {len(keys)} columns", where=location)
    result: dict[str, Any] = {}
    for key, cell in zip(keys, cells):
        where = f"{location}: {key}"
        if not cell.strip():
            continue
        *parents, last = key.split(".")
        below = result
        for parent in parents:
            below = below.setdefault(parent, {})
        is_text = takes_text(key.split("."))
        below[last] = normalize_text(cell, where) if is_text else read_yaml(cell.encode(), where).value
    return result


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
