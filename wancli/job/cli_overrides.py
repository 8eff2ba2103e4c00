"""Options that change a job (--set, --sweep) and select from its shots (--items, --pick, --shard)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wancli.errors import JobError
from wancli.job.matrix import Axis, Setting, build_axis
from wancli.job.overrides import Layer, Source
from wancli.job.validation import takes_text
from wancli.job.yaml_reader import normalize_text, read_yaml


@dataclass(frozen=True)
class CliOverrides:
    """The values of the options, as typed."""

    sets: tuple[str, ...] = ()
    sweeps: tuple[str, ...] = ()
    items: str | None = None
    shard: str | None = None
    picks: tuple[str, ...] = ()

    def parse_settings(self) -> list[Setting]:
        """Parse each `--set KEY=VALUE`. A text is taken as it is, else it is YAML. Raises JobError."""
        return [_parse_setting(*_split_assignment(text, "--set")) for text in self.sets]

    def parse_axes(self) -> list[Axis]:
        """Parse each `--sweep KEY=VALUE,VALUE`. The values are read as those of `--set`. Raises JobError."""
        axes = [_parse_axis(*_split_assignment(text, "--sweep")) for text in self.sweeps]
        keys = [axis[0][0].key for axis in axes]
        for key in (*keys, *(setting.key for setting in self.parse_settings())):
            if keys.count(key) > 1 or (key in keys and any(s.key == key for s in self.parse_settings())):
                raise JobError("is given twice", where=f"--sweep {key}")
        return axes

    def select_shots(self, ids: Sequence[str], starts: Sequence[int]) -> tuple[int, ...]:
        """Return the indices of the shots to render: those of --items or --pick, then of these the --shard.

        `ids` are the ids of all shots of the job. `starts` has for each shot the first shot of its chain, or
        the shot itself; a shard has whole chains. Raises JobError if a shot does not exist, or if none is
        left.
        """
        if self.items is not None and self.picks:
            raise JobError("both choose shots; give one of them", where="--items, --pick")
        selected = list(range(len(ids)))
        if self.items is not None:
            selected = sorted(_parse_indices(self.items, len(ids)))
        elif self.picks:
            selected = sorted(_find_picked(self.picks, ids))
        if self.shard is None:
            return tuple(selected)
        match = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", self.shard)
        if not match or int(match[1]) >= int(match[2]):
            raise JobError(
                f"{self.shard!r} is not a shard", where="--shard", hint="Write 0/8 to 7/8 for eight shards."
            )
        part, parts = int(match[1]), int(match[2])
        units = list(dict.fromkeys(starts[index] for index in selected))
        chosen = {*units[part * len(units) // parts : (part + 1) * len(units) // parts]}
        selected = [index for index in selected if starts[index] in chosen]
        if not selected:
            raise JobError(f"{self.shard} contains no shot", where="--shard")
        return tuple(selected)


NO_OVERRIDES = CliOverrides()


def _split_assignment(text: str, flag: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        example = "sampler.steps=20" if flag == "--set" else "seed=1,2,3"
        raise JobError(f"{text!r} sets nothing", where=flag, hint=f"Write {flag} {example}.")
    if not value.strip():
        raise JobError("has no value", where=f"{flag} {key}", hint=f"For an empty text: {flag} {key}='\"\"'")
    return key, value


def _parse_setting(key: str, value: str) -> Setting:
    source = Source("--set", Path.cwd(), prefix=tuple(key.split(".")), is_flag=True)
    read = _read_text if takes_text(key.split(".")) else _read_value
    return Setting(key, Layer(source, read(value, f"--set {key}")))


def _parse_axis(key: str, value: str) -> Axis:
    where = f"--sweep {key}"
    if takes_text(key.split(".")):
        values = [_read_text(text, where) for text in _split_texts(value)]
    else:
        values = _read_value(f"[{value}]", where)
    if not values:
        raise JobError("has no value", where=where)
    source = Source("--sweep", Path.cwd(), prefix=(key,), is_flag=True)
    return build_axis(key, [Layer(source.at(index), value) for index, value in enumerate(values)])


def _read_value(text: str, where: str) -> Any:
    return read_yaml(text.encode(errors="surrogateescape"), where).value


def _read_text(text: str, where: str) -> Any:
    """Read the value of a key that takes a text: as it is, `#` and `: ` included.

    A value in quotes, a mapping such as `{embedding: FILE}`, and null, are read as YAML.
    """
    text = text.strip()
    if text == "null" or text[:1] in ("'", '"', "{"):
        with suppress(JobError):
            value = _read_value(text, where)
            if not isinstance(value, dict) or None not in value.values():  # `{circle}` is no mapping
                return value
    try:
        return normalize_text(text.encode(errors="surrogateescape").decode(), where)
    except UnicodeDecodeError as error:
        raise JobError(f"byte {error.start} is not UTF-8", where=where) from None


def _split_texts(texts: str) -> list[str]:
    """Split texts at commas, except those inside quotes or braces."""
    entry = re.compile(r"""\s*("(?:\\.|[^"\\])*"|'(?:''|[^'])*'|\{[^{}]*\}|[^,]*)\s*(?:,|$)""", re.DOTALL)
    return [match[1] for match in entry.finditer(texts) if match[1].strip()]


def _parse_indices(text: str, count: int) -> set[int]:
    """Parse `0-9,12`, `1-9:2` or `9-1:-2`: ranges as OpenJD writes them."""
    selected: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:\s*-\s*(\d{1,9})(?:\s*:\s*(-?[1-9]\d{0,8}))?)?\s*", part)
        if not match:
            raise JobError(f"{part!r} is not a range", where="--items", hint="Write 0-9,12 or 1-9:2.")
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        if max(first, last) >= count:
            past = max(first, last)
            raise JobError(f"{past} is past the last shot ({count - 1})", where="--items")
        indices: Sequence[int] = range(first, last + (1 if step > 0 else -1), step)
        if not indices:
            raise JobError(f"{part!r} is empty", where="--items")
        selected.update(indices)
    return selected


def _find_picked(picks: Sequence[str], ids: Sequence[str]) -> set[int]:
    """Find the shots of `ID` or `ID,ID`. An id may contain a comma. Raises JobError with every unknown id."""
    index_by_id = {id: index for index, id in enumerate(ids)}
    wanted: list[str] = []
    for text in picks:
        wanted += [text] if text in index_by_id else [part.strip() for part in text.split(",")]
    unknown = [id for id in dict.fromkeys(wanted) if id not in index_by_id]
    if unknown:
        hints = []
        for id in unknown:
            near = difflib.get_close_matches(id, ids, 3, 0.5)
            hints.append(
                f"{id!r}: did you mean {' or '.join(map(repr, near))}?"
                if near
                else f"ids: {', '.join(ids[:8])}"
            )
        names = ", ".join(map(repr, unknown))
        raise JobError(f"no shot has the id {names}", where="--pick", hint="\n".join(dict.fromkeys(hints)))
    return {index_by_id[id] for id in wanted}
