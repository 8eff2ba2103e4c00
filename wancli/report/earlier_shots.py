"""Shots of earlier runs of a job: a partial run (`--sweep`), or an edited job, does not have them.

The report and the pictures of a job also show these as long as their videos are there. A shot whose id the
run has is superseded by that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from wancli.errors import EntryError, Unreadable
from wancli.plan.shot import Shot
from wancli.report.shot_entry import ShotEntry
from wancli.storage import disk, manifest, sidecars
from wancli.storage.manifest_schema import Manifest
from wancli.storage.report_schema import COMPARISON_SCHEMA, ComparisonRecord


class EarlierClip(NamedTuple):
    """A finished video that an earlier comparison shows, and the id of its baseline."""

    id: str
    output: Path
    baseline: str | None
    record: Manifest


def read_earlier_comparison(path: Path) -> ComparisonRecord | None:
    """Read the comparison of an earlier run. Returns None if there is none that can be read."""
    try:
        return sidecars.read_document(path, COMPARISON_SCHEMA, ComparisonRecord)
    except (EntryError, Unreadable):
        return None


def earlier_clips(path: Path, earlier: ComparisonRecord | None, shots: Sequence[Shot]) -> list[EarlierClip]:
    """Return the videos of an earlier comparison at `path` that are of none of these shots, and are finished
    and of their size: others cannot be compared with them."""
    ids, outputs = {shot.id for shot in shots}, {shot.output for shot in shots}
    found = []
    for shot in earlier.shots if earlier else []:
        output = disk.resolve(path.parent / shot.output)
        record = _finished_record(output)
        if record is None or shot.id in ids or output in outputs:
            continue
        if (record.shot.width, record.shot.height, record.shot.frames) in {
            (one.width, one.height, one.frames) for one in shots
        }:
            found.append(EarlierClip(shot.id, output, shot.baseline, record))
    return found


def earlier_entries(
    entries: Sequence[ShotEntry], ids: Collection[str], outputs: Collection[str]
) -> Iterator[ShotEntry]:
    """Yield the entries of an earlier report that are of no shot with these ids and outputs, and whose videos
    are there as they were."""
    for entry in entries:
        if entry.record is None or entry.id in ids or entry.output in outputs:
            continue
        record = _finished_record(Path(entry.output))
        if record is not None and record.key == entry.record.key:
            yield replace(entry, status="already done", record=record)


def _finished_record(output: Path) -> Manifest | None:
    """Return the manifest of a video whose size is the recorded one. The video is not hashed."""
    record = manifest.read_if_usable(manifest.manifest_path(output))
    try:
        file = record.file(output.name) if record else None
        return record if file and disk.size(output) == file.bytes else None
    except Unreadable:
        return None
