"""Reports as data: the results of a batch, from the manifests of its shots, and the forecast of a plan."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wancli.engine.manifest_body import versions
from wancli.errors import EntryError, Unreadable
from wancli.plan import throughput
from wancli.plan.picture_entries import entry_values
from wancli.report import earlier_shots
from wancli.report.shot_entry import ShotEntry
from wancli.storage import atomic, disk, manifest, sidecars
from wancli.storage.report_schema import REPORT_SCHEMA as SCHEMA
from wancli.storage.report_schema import ReportRecord

if TYPE_CHECKING:
    from wancli.engine.outcome import Outcome
    from wancli.plan.render_plan import Plan
    from wancli.plan.shot import Shot
    from wancli.plan.throughput import Rate
    from wancli.storage.manifest_schema import Manifest, PhaseRecord


@dataclass(frozen=True)
class Report:
    """The results of a batch. `totals` are the keys of the JSON that concern no single shot."""

    job: str
    shots: list[ShotEntry]
    totals: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return `{job}.report.json`."""
        own = ("created", "warnings")  # before the shots, as they always were
        head = {key: value for key, value in self.totals.items() if key in own}
        shots = [entry.as_dict() for entry in self.shots]
        return {"schema": SCHEMA, "job": self.job, **head, "shots": shots} | self.totals


def build_report(plan: Plan, outcomes: Sequence[Outcome], rates: Sequence[Rate] = ()) -> Report:
    """Build the report of all shots of a batch, and its totals. A shot that was never reached is
    `not started`. The expected times rest on `rates`, those from before the render."""
    by_index = {outcome.shot.index: outcome for outcome in outcomes}
    shots = [_shot_entry(shot, by_index.get(shot.index)) for shot in plan.shots]
    fresh = [entry.record for entry in shots if entry.status == "rendered" and entry.record]
    sampled = [record for record in fresh if not _resumed_from_latent(record)]
    prompts = {prompt.id: prompt for record in sampled for prompt in record.prompts}
    entries = [
        key for outcome in outcomes if _encoded_pictures(outcome) for key in entry_values(outcome.shot)
    ]
    missing = frozenset([*(id for id, prompt in prompts.items() if not prompt.cached), *entries])
    rendered = [outcome.shot for outcome in outcomes if outcome.status == "rendered"]
    started = [record.first_step_after for record in sampled if record.first_step_after]
    shared = {outcome.shot.index: outcome.shared_steps for outcome in outcomes}
    expected = throughput.predict_phase_seconds(rendered, missing, rates, shared)
    totals = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "warnings": list(plan.warnings),
        "memory": _memory_by_phase(fresh, expected),
        "first_step_after": min(started, default=None),
        "process": max((_phases_of_this_run(record)[0].rss_start for record in fresh), default=0),
        "peak": _peak_memory(fresh),
        "cache": {
            "hits": sum(prompt.cached for prompt in prompts.values()),
            "misses": sum(not prompt.cached for prompt in prompts.values()),
            "encoder_loaded": any(record.encoder_loaded for record in sampled),
        },
        "versions": versions(),
    }
    return Report(plan.name, shots, totals)


def _encoded_pictures(outcome: Outcome) -> bool:
    """Return whether pictures of this shot were encoded in this run."""
    record = outcome.record if outcome.status == "rendered" else None
    if record is None or _resumed_from_latent(record):
        return False
    return not all(picture.cached for picture in record.pictures)


def _phases_of_this_run(record: Manifest) -> list[PhaseRecord]:
    return [phase for phase in record.phases if not phase.earlier]


def _resumed_from_latent(record: Manifest) -> bool:
    """Return whether an earlier run left the latent, so that this one read no prompt and took no step."""
    return not any(phase.name == "encode" for phase in _phases_of_this_run(record))


def write_report(plan: Plan, report: Report) -> Path:
    """Write `{job}.report.json` into the folder that the outputs of the job share, or that of the first.

    An earlier report is replaced, except for the entries of shots that were not selected, or that the job has
    no more while their videos are there. Another program's
    file of that name is moved aside, and so is one that cannot be read, with a warning.
    """
    path, earlier = report_path(plan), None
    try:
        earlier = read_report(path)
        if earlier is None:
            atomic.move_aside(path)
    except Unreadable as error:
        sidecars.set_aside_unread(path, error)
    if plan.unselected:
        selected = {entry.output: entry for entry in report.shots}
        known = {entry.output: entry for entry in (earlier.shots if earlier else [])}
        outputs = [(shot, str(shot.output)) for shot in plan.all_shots]
        shots = [selected.get(name) or _unselected_entry(shot, known.get(name)) for shot, name in outputs]
        report = replace(report, shots=shots)
    ids, outputs_now = {shot.id for shot in plan.all_shots}, {str(shot.output) for shot in plan.all_shots}
    kept = earlier_shots.earlier_entries(earlier.shots if earlier else [], ids, outputs_now)
    report = replace(report, shots=[*report.shots, *kept])
    # Names of files that are not UTF-8 arrive as lone surrogates.
    text = json.dumps(report.as_dict(), ensure_ascii=False, indent=2) + "\n"
    atomic.replace(path, text.encode(errors="backslashreplace"))
    return path


def _unselected_entry(shot: Shot, entry: ShotEntry | None) -> ShotEntry:
    """Return the entry of a shot that was not selected: that of an earlier report if it is of the shot as it
    is now, else one from its manifest. Its video is not hashed."""
    if entry and entry.record and entry.record.key == shot.key:
        return entry
    with suppress(EntryError, Unreadable):
        record = manifest.read(shot.manifest)
        if record and record.key == shot.key and disk.exists(shot.output):
            return replace(_shot_entry(shot, None), status="already done", record=record)
    return entry or _shot_entry(shot, None)


def report_path(plan: Plan) -> Path:
    """Return the path of a job's report."""
    return plan.sidecar_path("report.json")


def read_report(path: Path) -> Report | None:
    """Read a report. Returns None if there is none, or none that can be used."""
    with suppress(EntryError):
        if record := sidecars.read_document(path, SCHEMA, ReportRecord):
            shots = [ShotEntry.from_record(entry, path) for entry in record.shots]
            totals = {k: v for k, v in record.as_dict().items() if k not in ("schema", "job", "shots")}
            return Report(record.job, shots, totals)
    return None


def _shot_entry(shot: Shot, outcome: Outcome | None) -> ShotEntry:
    error = outcome.error if outcome else None
    return ShotEntry(
        id=shot.id,
        labels=shot.labels,
        output=str(shot.output),
        status=outcome.status if outcome else "not started",
        error={"code": error.code, "message": str(error), "hint": error.hint} if error else None,
        record=outcome.record if outcome else None,
    )


def _peak_memory(records: Sequence[Manifest]) -> dict[str, int]:
    """Return the predicted and measured bytes of the whole process, on CUDA of the device."""
    measured = [phase.peak for record in records for phase in _phases_of_this_run(record)]
    predicted = [phase.peak for record in records for phase in record.predicted]
    return {"predicted": max(predicted, default=0), "measured": max(measured, default=0)}


def _memory_by_phase(
    records: Sequence[Manifest], expected: Mapping[str, float | None]
) -> list[dict[str, Any]]:
    """Return per phase: predicted parts and peak, measured peak, expected and measured seconds."""
    rows: dict[str, dict[str, Any]] = {}
    for predicted in (phase for record in records for phase in record.predicted):
        best = rows.setdefault(predicted.name, predicted.as_dict() | {"measured": 0, "seconds": 0.0})
        if predicted.total > best["total"]:
            best |= predicted.as_dict()
    counted: set[str] = set()  # a phase that served several shots is in the records of all of them
    for phase in (phase for record in records for phase in _phases_of_this_run(record)):
        row = rows.setdefault(phase.name, {"name": phase.name, "measured": 0, "seconds": 0.0})
        row["expected"] = expected.get(phase.name)
        row["measured"] = max(row["measured"], phase.peak)
        if phase.identity not in counted:
            row["seconds"] += phase.seconds
        counted.add(phase.identity)
    return list(rows.values())
