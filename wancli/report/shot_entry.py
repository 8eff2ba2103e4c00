"""One shot of a report: its outcome, and the record that its manifest has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wancli.errors import EntryError
from wancli.storage.manifest_schema import Manifest


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
    def parse(cls, data: dict[str, Any], path: Path) -> ShotEntry:
        """Validate an entry of the report at `path`. Raises KeyError if it lacks id, labels, output or
        status."""
        own = {key: data[key] for key in ("id", "labels", "output", "status")}
        rest = {key: value for key, value in data.items() if key not in (*own, "error")}
        entry = cls(**own, error=data.get("error"))
        try:
            return replace(entry, record=Manifest.parse(rest, path)) if rest else entry
        except EntryError:
            return replace(entry, unread=rest)
