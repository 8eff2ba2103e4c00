"""What pages are made of: the entries of a report, of a job's outputs, or of all manifests below a folder.

An entry is what a report says of a shot: id, labels, output, status, and the body of its manifest.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wancli.errors import EntryError, JobError
from wancli.injection import block_map
from wancli.injection.block_map import BlockMap
from wancli.report import batch_report, comparison_metrics
from wancli.storage import manifest

if TYPE_CHECKING:
    from wancli.plan.shot import Plan

Entry = dict[str, Any]
MANIFEST = ".manifest.json"


@dataclass
class ReportInputs:
    """Shots with the name of the job of each, what lies beside them, and what could not be read. `scores` are
    the figures of comparisons, by the paths of the videos."""

    name: str
    entries: list[tuple[str, Entry]] = field(default_factory=list)
    reports: list[Mapping[str, Any]] = field(default_factory=list)
    maps: list[BlockMap] = field(default_factory=list)
    comparisons: dict[str, comparison_metrics.JsonObject] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def collect_report(path: Path) -> ReportInputs:
    """What a render just wrote. Raises JobError if it is no report."""
    report = batch_report.read_report(path)
    if report is None:
        raise JobError("is not a report of wancli", where=str(path))
    found = ReportInputs(report["job"], [(report["job"], entry) for entry in report["shots"]], [report])
    _collect_sidecars(found, {path.parent, *(Path(entry["output"]).parent for entry in report["shots"])})
    return found


def collect_plan(plan: Plan, report: Path) -> ReportInputs:
    """What the outputs of a job are now, and what its last report says; its videos are not hashed."""
    found = ReportInputs(plan.name)
    found.reports = [last] if (last := batch_report.read_report(report)) else []
    for shot in sorted((*plan.shots, *plan.unselected), key=lambda shot: shot.index):
        entry = _read_entry(shot.manifest, found)
        if entry is None or entry.get("key") != shot.key:
            status = "another job's" if entry else "damaged" if shot.manifest.exists() else "not started"
            entry = {"id": shot.id, "labels": shot.labels, "output": str(shot.output), "status": status}
        found.entries.append((plan.name, entry))
    _collect_sidecars(found, {shot.output.parent for shot in (*plan.shots, *plan.unselected)})
    return found


def collect_folder(folder: Path) -> ReportInputs:
    """Every manifest below a folder, by the reports that lie there told which job it is of, and what those
    say of shots without one. Raises JobError where there is none, EntryError where all are damaged."""
    folder = folder.absolute()
    found = ReportInputs(folder.resolve().name)
    manifests = sorted(folder.rglob(f"*{MANIFEST}"))
    reported: dict[Path, tuple[str, Entry]] = {}
    for path in sorted(folder.rglob("*report.json")):
        if report := batch_report.read_report(path):
            found.reports.append(report)
            reported |= {
                place: (report["job"], entry) for place, entry in _locate_outputs(path, report["shots"])
            }
    for path in manifests:
        if entry := _read_entry(path, found):
            job, _ = reported.pop(Path(entry["output"]), (path.parent.name, None))
            found.entries.append((job, entry))
    found.entries += [(job, _entry_without_manifest(entry)) for job, entry in reported.values()]
    if not found.entries:
        if found.problems:
            raise EntryError("no manifest is whole", where=str(folder), hint="\n".join(found.problems[:8]))
        hint = "Render something there first."
        raise JobError("no manifest is in or below it", where=str(folder), hint=hint)
    _collect_sidecars(found, {folder, *(path.parent for path in manifests)})
    return found


def _locate_outputs(report: Path, shots: Sequence[Entry]) -> Iterator[tuple[Path, Entry]]:
    """Where the outputs of a report are, if its folder was moved: as they were from the one they share."""
    shared = os.path.commonpath([Path(entry["output"]).parent for entry in shots]) if shots else ""
    for entry in shots:
        yield report.parent / Path(entry["output"]).relative_to(shared), entry


def _entry_without_manifest(entry: Entry) -> Entry:
    """What a report said of a shot whose manifest is gone."""
    status = "gone" if "shot" in entry else entry["status"]
    return {key: entry[key] for key in ("id", "labels", "output", "error") if key in entry} | {
        "status": status
    }


def _read_entry(path: Path, found: ReportInputs) -> Entry | None:
    """The entry of a manifest; None where there is none, or a damaged one, which becomes a problem."""
    try:
        body = manifest.read(path)
        if body is None:
            return None
        shot = body["shot"]
        output = path.parent / shot["output"]
        status = "rendered" if output.exists() else "video gone"
        return body | {"id": shot["id"], "labels": shot["labels"], "output": str(output), "status": status}
    except (EntryError, KeyError, TypeError) as error:
        found.problems.append(str(error) if isinstance(error, EntryError) else f"{path}: lacks {error}")
        return None


def _collect_sidecars(found: ReportInputs, folders: Iterable[Path]) -> None:
    for folder in sorted(folders):
        for path in sorted(folder.glob("*.map.*.json")):
            if one := block_map.read(path):
                found.maps.append(one)
            else:
                found.problems.append(f"{path}: not {block_map.SCHEMA}")
        for path in sorted(folder.glob("*.compare.json")):
            shots = comparison_metrics.read_comparison(path)
            if shots is None:
                found.problems.append(f"{path}: not {comparison_metrics.SCHEMA}")
            else:
                found.comparisons |= {absolute_path(path.parent / shot["output"]): shot for shot in shots}


def absolute_path(path: Path) -> str:
    """The one spelling of where a video is."""
    return os.path.abspath(path)  # noqa: PTH100 - which keeps `..`
