"""One shot of a report: its outcome, and the record that its manifest has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wancli.errors import EntryError
from wancli.storage.manifest_schema import Manifest
from wancli.storage.report_schema import EntryRecord


@dataclass(frozen=True)
class ShotEntry:
    """A shot of a report. `record` is None if the shot has no manifest; `error` says why it failed.

    `unread` keeps the keys of a record that cannot be used, so that a rewritten report still has them.
    """

    id: str
    labels: dict[str, Any]
    output: str
    status: str
    error: dict[str, Any] | None = None
    record: Manifest | None = None
    unread: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON of the entry: its own keys, then those of the record."""
        own = {"id": self.id, "labels": self.labels, "output": self.output, "status": self.status}
        error = {"error": self.error} if self.error else {}
        return own | error | (self.record.as_dict() if self.record else dict(self.unread))

    @classmethod
    def from_record(cls, entry: EntryRecord, path: Path) -> ShotEntry:
        """Convert an entry of the report at `path`."""
        error = entry.error.as_dict() if entry.error else None
        rest = dict(entry.model_extra or {})
        own = cls(entry.id, entry.labels, entry.output, entry.status, error)
        try:
            return replace(own, record=Manifest.parse(rest, path)) if rest else own
        except EntryError:
            return replace(own, unread=rest)
