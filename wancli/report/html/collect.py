"""Collect the inputs of a page: the entries of a report, of a job's outputs, or of the manifests in a folder.

An entry has the id, labels, output and status of a shot, and the record in its manifest.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from wancli.errors import EntryError, JobError, Unreadable
from wancli.injection import block_map
from wancli.injection.block_map import BlockMap
from wancli.report import batch_report, comparison_metrics
from wancli.report.batch_report import Report
from wancli.report.shot_entry import ShotEntry
from wancli.storage import disk, manifest

if TYPE_CHECKING:
    from wancli.plan.render_plan import Plan

MANIFEST = ".manifest.json"


@dataclass
class ReportInputs:
    """The shots of a page, each with the name of its job, and what belongs to them. `comparisons` are rows of
    `*.compare.json` by the paths of the videos, `comparison_files` their sheets and side-by-sides; `problems`
    name files that could not be read."""

    name: str
    entries: list[tuple[str, ShotEntry]] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    maps: list[BlockMap] = field(default_factory=list)
    comparisons: dict[str, comparison_metrics.JsonObject] = field(default_factory=dict)
    comparison_files: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def collect_report(path: Path) -> ReportInputs:
    """Collect a report that a render just wrote. Raises JobError if it is not a report."""
    report = batch_report.read_report(path)
    if report is None:
        raise JobError("is not a report of wancli", where=str(path))
    inputs = ReportInputs(report.job, [(report.job, entry) for entry in report.shots], [report])
    _collect_sidecars(inputs, {path.parent, *(Path(entry.output).parent for entry in report.shots)})
    return inputs


def collect_plan(plan: Plan, report: Path) -> ReportInputs:
    """Collect the outputs of a job as they are now, and its last report. Videos are not hashed."""
    inputs = ReportInputs(plan.name)
    with _noting_damage(inputs):
        inputs.reports = [last] if (last := batch_report.read_report(report)) else []
    for shot in sorted((*plan.shots, *plan.unselected), key=lambda shot: shot.index):
        entry = _read_entry(shot.manifest, inputs)
        if entry is None or entry.record is None or entry.record.key != shot.key:
            status = "another job's" if entry else "damaged" if disk.exists(shot.manifest) else "not started"
            entry = ShotEntry(shot.id, shot.labels, str(shot.output), status)
        inputs.entries.append((plan.name, entry))
    _collect_sidecars(inputs, {shot.output.parent for shot in (*plan.shots, *plan.unselected)})
    return inputs


def collect_folder(folder: Path) -> ReportInputs:
    """Collect every manifest below a folder. Reports in it say which job a shot is of, and name the shots
    without a manifest.

    Raises JobError if there is no manifest, EntryError if all are damaged.
    """
    folder = folder.absolute()
    inputs = ReportInputs(disk.resolve(folder).name)
    with disk.reading_for_job(str(folder)):
        files = [*disk.walk(folder)]
    manifests = [path for path in files if path.name.endswith(MANIFEST)]
    reported: dict[Path, tuple[str, ShotEntry]] = {}
    for path in [path for path in files if path.name.endswith("report.json")]:
        with _noting_damage(inputs):
            if report := batch_report.read_report(path):
                inputs.reports.append(report)
                located = _locate_outputs(path, report.shots)
                reported |= {output: (report.job, entry) for output, entry in located}
    for path in manifests:
        if entry := _read_entry(path, inputs):
            job, _ = reported.pop(Path(entry.output), (path.parent.name, None))
            inputs.entries.append((job, entry))
    inputs.entries += [(job, _entry_without_manifest(entry)) for job, entry in reported.values()]
    if not inputs.entries:
        if inputs.problems:
            raise EntryError("no manifest is whole", where=str(folder), hint="\n".join(inputs.problems[:8]))
        hint = "Render something there first."
        raise JobError("no manifest is in or below it", where=str(folder), hint=hint)
    _collect_sidecars(inputs, {folder, *(path.parent for path in manifests)})
    return inputs


def _locate_outputs(report: Path, shots: Sequence[ShotEntry]) -> Iterator[tuple[Path, ShotEntry]]:
    """Yield where each output of a report is now. If the folder was moved, outputs moved with the report."""
    absolute = [entry for entry in shots if Path(entry.output).is_absolute()]
    shared = os.path.commonpath([Path(entry.output).parent for entry in absolute]) if absolute else ""
    for entry in absolute:
        yield report.parent / os.path.relpath(entry.output, shared), entry


def _entry_without_manifest(entry: ShotEntry) -> ShotEntry:
    """Return the entry of a report without its record, because the manifest is gone."""
    return replace(entry, record=None, status="gone" if entry.record else entry.status)


def _read_entry(path: Path, inputs: ReportInputs) -> ShotEntry | None:
    """Read a manifest as an entry. Returns None if there is none or if it is damaged, which is a problem."""
    record = None
    with _noting_damage(inputs):
        record = manifest.read(path)
    if record is None:
        return None
    output = path.parent / record.shot.output
    status = "rendered" if disk.exists(output) else "video gone"
    return ShotEntry(record.shot.id, record.shot.labels, str(output), status, record=record)


def _collect_sidecars(inputs: ReportInputs, folders: Iterable[Path]) -> None:
    """Read the block maps and comparisons in these folders."""
    for folder in sorted(folders):
        for path in _matching(folder, "*.map.*.json"):
            with _noting_damage(inputs):
                inputs.maps += [measured] if (measured := block_map.read(path)) else []
        for path in _matching(folder, "*.compare.json"):
            with _noting_damage(inputs):
                if found := comparison_metrics.read_comparison(path):
                    rows = [shot.as_dict() for shot in found.shots]
                    inputs.comparisons |= {absolute_path(folder / row["output"]): row for row in rows}
                    files = [folder / file.path for file in found.files]
                    inputs.comparison_files += [file for file in files if disk.exists(file)]


def _matching(folder: Path, pattern: str) -> list[Path]:
    return [path for path in disk.list_folder(folder) if fnmatch.fnmatchcase(path.name, pattern)]


@contextmanager
def _noting_damage(inputs: ReportInputs) -> Iterator[None]:
    """Note that a record is damaged or cannot be read, instead of raising it."""
    try:
        yield
    except (EntryError, Unreadable) as error:
        inputs.problems.append(str(error))


def absolute_path(path: Path) -> str:
    """Return the one spelling of the path of a video."""
    return os.path.abspath(path)  # noqa: PTH100 - resolve() follows links
