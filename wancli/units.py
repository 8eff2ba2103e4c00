"""Bytes, seconds, counts, ranges and quoted values as people write them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from wancli.errors import JobError


def parse_size(text: str, where: str) -> int:
    """Parse a size: `500MiB` and `1.5G` are binary units, `2GB` is decimal, `64B` is bytes.

    A number without a unit is rejected, because bytes are hardly ever meant. Raises JobError, at `where`.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(B|iB|)|B)", text)
    if not match:
        raise JobError(f"{text!r} is not a size; write 500MiB or 2GiB", where=where)
    base = 1000 if match[3] == "B" else 1024
    return int(float(match[1]) * base ** " KMGT".index(match[2] or " "))


def parse_duration(text: str, where: str) -> float:
    """Parse `30s`, `2.5 min` or `1h` as seconds. Raises JobError, at `where`."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*(s|m|min|h)", text)
    if not match:
        raise JobError(f"{text!r} is not a time; write 30s, 5min or 1h", where=where)
    return float(match[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600}[match[2]]


def format_bytes(count: float) -> str:
    """Format bytes in binary units: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def format_seconds(value: float) -> str:
    """Format seconds: `7.0 s`, `3 min 20 s`, `2.5 h`."""
    if value < 120:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds} s" if value < 7200 else f"{value / 3600:.1f} h"


def pluralize(count: int, singular: str, plural: str = "") -> str:
    """Format a count and its noun: `1 shot`, `2,000 shots`. `plural` defaults to the singular with an s."""
    return f"{count:,} {singular if count == 1 else plural or f'{singular}s'}"


def format_ranges(numbers: Sequence[int]) -> str:
    """Format numbers as ranges: `0-3,7,10-39`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def quote(value: object, limit: int = 60) -> str:
    """Format a value for a message: texts in quotes, long values cut to `limit` characters."""
    if isinstance(value, str):
        return repr(value if len(value) <= limit else f"{value[: limit - 1]}…")
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
