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
from wancli.injection.block_map import Map
from wancli.report import batch_report, comparison_metrics
from wancli.storage import manifest

if TYPE_CHECKING:
    from wancli.plan.shot import Plan

Entry = dict[str, Any]
MANIFEST = ".manifest.json"


@dataclass
class Found:
    """Shots with the name of the job of each, what lies beside them, and what could not be read. `scores` are
    the figures of comparisons, by the paths of the videos."""

    name: str
    entries: list[tuple[str, Entry]] = field(default_factory=list)
    reports: list[Mapping[str, Any]] = field(default_factory=list)
    maps: list[Map] = field(default_factory=list)
    scores: dict[str, comparison_metrics.Record] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def of_report(path: Path) -> Found:
    """What a render just wrote. Raises JobError if it is no report."""
    report = batch_report.read(path)
    if report is None:
        raise JobError("is no report of wancli", where=str(path))
    found = Found(report["job"], [(report["job"], entry) for entry in report["shots"]], [report])
    _beside(found, {path.parent, *(Path(entry["output"]).parent for entry in report["shots"])})
    return found


def of_plan(plan: Plan, report: Path) -> Found:
    """What the outputs of a job are now, and what its last report says; its videos are not hashed."""
    found = Found(plan.name)
    found.reports = [last] if (last := batch_report.read(report)) else []
    for shot in sorted((*plan.shots, *plan.unselected), key=lambda shot: shot.index):
        entry = _read(shot.manifest, found)
        if entry is None or entry.get("key") != shot.key:
            status = "another job's" if entry else "damaged" if shot.manifest.exists() else "not started"
            entry = {"id": shot.id, "labels": shot.labels, "output": str(shot.output), "status": status}
        found.entries.append((plan.name, entry))
    _beside(found, {shot.output.parent for shot in (*plan.shots, *plan.unselected)})
    return found


def of_folder(folder: Path) -> Found:
    """Every manifest below a folder, by the reports that lie there told which job it is of, and what those
    say of shots without one. Raises JobError where there is none, EntryError where all are damaged."""
    folder = folder.absolute()
    found = Found(folder.resolve().name)
    manifests = sorted(folder.rglob(f"*{MANIFEST}"))
    said: dict[Path, tuple[str, Entry]] = {}
    for path in sorted(folder.rglob("*report.json")):
        if report := batch_report.read(path):
            found.reports.append(report)
            said |= {place: (report["job"], entry) for place, entry in _places(path, report["shots"])}
    for path in manifests:
        if entry := _read(path, found):
            job, _ = said.pop(Path(entry["output"]), (path.parent.name, None))
            found.entries.append((job, entry))
    found.entries += [(job, _without_record(entry)) for job, entry in said.values()]
    if not found.entries:
        if found.problems:
            raise EntryError("no manifest is whole", where=str(folder), hint="\n".join(found.problems[:8]))
        hint = "Render something there first."
        raise JobError("no manifest is in or below it", where=str(folder), hint=hint)
    _beside(found, {folder, *(path.parent for path in manifests)})
    return found


def _places(report: Path, shots: Sequence[Entry]) -> Iterator[tuple[Path, Entry]]:
    """Where the outputs of a report are, if its folder was moved: as they were from the one they share."""
    shared = os.path.commonpath([Path(entry["output"]).parent for entry in shots]) if shots else ""
    for entry in shots:
        yield report.parent / Path(entry["output"]).relative_to(shared), entry


def _without_record(entry: Entry) -> Entry:
    """What a report said of a shot whose manifest is gone."""
    status = "gone" if "shot" in entry else entry["status"]
    return {key: entry[key] for key in ("id", "labels", "output", "error") if key in entry} | {
        "status": status
    }


def _read(path: Path, found: Found) -> Entry | None:
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


def _beside(found: Found, folders: Iterable[Path]) -> None:
    for folder in sorted(folders):
        for path in sorted(folder.glob("*.map.*.json")):
            if one := block_map.read(path):
                found.maps.append(one)
            else:
                found.problems.append(f"{path}: not {block_map.SCHEMA}")
        for path in sorted(folder.glob("*.compare.json")):
            shots = comparison_metrics.read(path)
            if shots is None:
                found.problems.append(f"{path}: not {comparison_metrics.SCHEMA}")
            else:
                found.scores |= {located(path.parent / shot["output"]): shot for shot in shots}


def located(path: Path) -> str:
    """The one spelling of where a video is."""
    return os.path.abspath(path)  # noqa: PTH100 - which keeps `..`
