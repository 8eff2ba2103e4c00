"""The table of shots: one row each with its settings and results, for pages and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wancli.report.shot_entry import ShotEntry
from wancli.storage import sidecars
from wancli.storage.injection_schema import RuleRecord
from wancli.storage.prompt_schema import describe_injected
from wancli.units import format_ranges

Row = dict[str, str | int | float | None]
COLUMNS = {
    "job": "job",
    "shot": "shot",
    "status": "status",
    "prompt": "prompt",
    "injected": "injected prompt",
    "difference": "difference %",
    "blocks": "blocks",
    "strength": "strength",
    "steps": "steps",
    "branch": "branch",
    "blend": "blend",
    "effect": "effect %",
    "seed": "seed",
    "size": "size",
    "frames": "frames",
    "solver": "solver",
    "sampler_steps": "of steps",
    "guidance": "guidance",
    "seconds": "seconds",
    "peak_mib": "peak MiB",
    "model": "model",
}
CSV_ONLY_COLUMNS = ("negative", "shift", "hits", "planned", "output", "key", "created_by")
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for the start of a formula


def shot_row(entry: ShotEntry, job: str) -> Row:
    """Build the row of a shot; a value that is not recorded is None.

    `effect` is the mean relative change of the velocity over the measured forwards, `seconds` the sum of the
    phases that the shot took part in.
    """
    values: Row = dict.fromkeys((*COLUMNS, *CSV_ONLY_COLUMNS))
    values |= {"job": job, "shot": entry.id, "status": entry.status, "output": entry.output}
    if entry.record is None:
        return values
    record, shot, rules = entry.record, entry.record.shot, entry.record.injection
    velocities = [100 * effect.velocity for effect in record.effects]
    guidance = "/".join(f"{stage.guidance:g}" for stage in shot.stages)
    return values | {
        "prompt": record.prompt_text,
        "negative": record.negative.text if record.negative else None,
        "injected": _join(describe_injected(other) for other in record.injected),
        "difference": _smallest([rule.difference.verdict.percent for rule in rules if rule.difference], 1),
        "blocks": _join(format_ranges([*rule.blocks]) for rule in rules),
        "strength": _join(_strength_range(rule) for rule in rules),
        "steps": _join(format_ranges([*rule.steps]) for rule in rules),
        "branch": _join("+".join(rule.branches) for rule in rules),
        "blend": _join(rule.blend for rule in rules),
        "effect": _smallest([sum(velocities) / len(velocities)] if velocities else [], 2),
        "seed": shot.seed,
        "size": f"{shot.width}x{shot.height}",
        "frames": shot.frames,
        "solver": shot.solver,
        "sampler_steps": shot.steps,
        "shift": shot.shift,
        "guidance": float(guidance) if "/" not in guidance else guidance,
        "seconds": round(sum(phase.seconds for phase in record.phases), 2),
        "peak_mib": round(max((phase.peak for phase in record.phases), default=0) / 2**20),
        "model": record.model.variant,
        "hits": sum(rule.hits for rule in rules),
        "planned": sum(rule.planned for rule in rules),
        "key": record.key,
        "created_by": f"wancli {record.versions.get('wancli', '')}".rstrip(),
    }


def to_csv(rows: Sequence[Row], labels: Sequence[Mapping[str, Any]]) -> bytes:
    """Write CSV (RFC 4180, UTF-8): a header, then a line per shot. Each label is a column of its own.

    A text that a spreadsheet would take for a formula begins with an apostrophe.
    """
    names = list(dict.fromkeys(name for label in labels for name in label))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    own = (*COLUMNS, *CSV_ONLY_COLUMNS)
    writer.writerow([*own, *(_escape_formula(f"label.{name}") for name in names)])
    for found, label in zip(rows, labels, strict=True):
        writer.writerow([_escape_formula(value) for value in (*map(found.get, own), *map(label.get, names))])
    return out.getvalue().encode(errors="backslashreplace")


def write_csv(path: Path, data: bytes) -> None:
    """Write the table. An older table is replaced; any other file moves aside."""
    header = ",".join((*COLUMNS, *CSV_ONLY_COLUMNS)).encode()
    sidecars.write_sidecar(path, data, header, len(header))


def _escape_formula(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA_STARTS) else value


def _join(parts: Any) -> str | None:
    return " | ".join(parts) or None


def _smallest(values: Sequence[float], digits: int) -> float | None:
    return round(min(values), digits) if values else None


def _strength_range(rule: RuleRecord) -> str:
    values = [strength * factor for strength in rule.blocks.values() for factor in rule.steps.values()]
    low, high = (f"{value:.4g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
