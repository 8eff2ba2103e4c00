"""Bytes, seconds, frame rates, counts, ranges and quoted values as people write them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from fractions import Fraction

from wancli.errors import JobError

# NTSC slowed these rates by 1/1001; people write them as rounded decimals.
_NTSC_RATES = {base: Fraction(base * 1000, 1001) for base in (24, 30, 48, 60, 120, 240)}
_MAX_FRAME_RATE = 240
_MAX_RATE_TERM = 1_001_000  # ffmpeg approximates fractions with larger numbers


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


def parse_frame_rate(value: float | str) -> int | str:
    """Return frames a second exactly: an int, else a fraction as text, `24000/1001`.

    Rounded NTSC rates, which people write with two digits or more, mean the fraction: 23.976 and 23.98 are
    24000/1001, 29.97 is 30000/1001. Raises ValueError, whose message ends with an example.
    """
    match = re.fullmatch(r"(\d{1,7})(?:\.(\d{1,6})|/([1-9]\d{0,6}))?", str(value))
    if not match:
        raise ValueError("not a frame rate; write 24, 12.5, 23.976 or 24000/1001")
    whole, decimals, denominator = match.groups()
    rate = Fraction(int(whole), int(denominator)) if denominator else Fraction(str(value))
    if decimals and len(decimals) >= 2:
        rounded = (exact for exact in _NTSC_RATES.values() if round(exact, len(decimals)) == rate)
        rate = next(rounded, rate)
    if not 1 <= rate <= _MAX_FRAME_RATE:
        raise ValueError(f"not between 1 and {_MAX_FRAME_RATE} frames a second")
    if max(rate.numerator, rate.denominator) > _MAX_RATE_TERM:
        raise ValueError("too many digits to be kept exactly; write a fraction, like 24000/1001")
    return rate.numerator if rate.denominator == 1 else str(rate)


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


def format_moment(moment: datetime) -> str:
    """Format a time with its date, in the zone of this machine: `2026-11-30 23:37:20 JST`."""
    return f"{moment.astimezone():%Y-%m-%d %H:%M:%S %Z}"


def pluralize(count: int, singular: str, plural: str = "") -> str:
    """Format a count and its noun: `1 shot`, `2,000 shots`. `plural` defaults to the singular with an s."""
    return f"{count:,} {singular if count == 1 else plural or f'{singular}s'}"


def list_some(texts: Sequence[str], limit: int) -> str:
    """List texts, at most `limit` of them, and count the others: `a, b and 57 more`."""
    rest = f" and {len(texts) - limit:,} more" if len(texts) > limit else ""
    return f"{', '.join(texts[:limit])}{rest}"


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
