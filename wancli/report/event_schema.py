"""The JSON Schema of the events of `render --json-stream`, as `wancli schema --events` prints it."""

from __future__ import annotations

from typing import Any

SCHEMA = "wancli/event/1"

_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_SECONDS = {"type": "number", "minimum": 0}
_IDS = {"type": "array", "items": _TEXT, "description": "The ids of shots."}
_HASH = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_SHOT = {
    "index": _COUNT | {"description": "The position in the job, as `--items` counts."},
    "id": _TEXT,
    "key": _HASH | {"description": "Hash of everything that changes the pixels."},
    "path": _TEXT | {"description": "The path of the video."},
}
_LABELS = {"type": "object", "description": "The labels of the job, unchanged."}
_ERROR = {
    "code": _TEXT | {"description": "One of the codes that `wancli errors` lists."},
    "message": _TEXT,
    "where": _TEXT | {"description": "A file, or a line and key of a job; may be empty."},
    "hint": _TEXT | {"description": "The next thing to try; may be empty."},
    "retryable": {"type": "boolean", "description": "Whether the same command may succeed next time."},
}
_PHASE = {"enum": ["encode", "pictures", "sample", "decode", "compare", "draw"]}
_COUNTS = ("shots", "rendered", "already_done", "failed", "stopped", "elsewhere", "not_started")


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties]}


def _with_status(*of: str) -> dict[str, Any]:
    return _SHOT | {
        "labels": _LABELS,
        "seconds": {
            "type": ["number", "null"],
            "minimum": 0,
            "description": "Since shot-started; null without that event.",
        },
        "status": {"enum": list(of)},
    }


_EVENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plan": (
        "The plan of the batch; the first event, unless planning fails.",
        {
            "job": _TEXT,
            "steps": _COUNT | {"description": "Steps of all shots together."},
            "shared_steps": _COUNT | {"description": "Steps that are shared with another shot."},
            "shots": {"type": "array", "items": _object(**_SHOT, labels=_LABELS, steps=_COUNT)},
        },
    ),
    "shot-started": ("The first phase of a shot begins.", _SHOT),
    "phase": (
        "Encoding prompts or pictures, sampling, decoding, comparing or drawing begins or ends.",
        {
            "name": _PHASE,
            "shots": _IDS,
            "total": _COUNT | {"description": "Prompts, steps, frames, videos or files."},
            "state": {"enum": ["begin", "end"]},
            "done": _COUNT | {"description": "Less than `total` at the end of a phase that stopped early."},
            "seconds": _SECONDS,
        },
    ),
    "step": (
        "Progress of a phase; at most ten a second.",
        {"name": _PHASE, "shots": _IDS, "done": _COUNT, "total": _COUNT},
    ),
    "shot-finished": (
        "The video and the manifest of a shot are on disk.",
        _with_status("rendered", "already done") | {"sha256": _HASH, "bytes": _COUNT},
    ),
    "shot-failed": (
        "A shot failed; other shots continue.",
        _with_status("failed") | {"error": _object(**_ERROR)},
    ),
    "shot-left": (
        "A shot is not finished here: its state or latent is on disk, or another worker claimed it.",
        _with_status("stopped", "elsewhere"),
    ),
    "note": ("Something worth knowing; nothing is wrong.", {"message": _TEXT}),
    "warning": ("Something that may be wrong, and does not stop the work.", {"message": _TEXT}),
    "gap": (
        "Lines of type step stood here; they were dropped because the reader did not read. Its `time` is "
        "later than that of the next lines.",
        {"lines": _COUNT},
    ),
    "envelope": (
        "How the command ended; always the last event, exactly one.",
        {
            "ok": {"type": "boolean"},
            "command": _TEXT,
            "version": _TEXT,
            "exit_code": {"type": "integer", "minimum": 0, "maximum": 255},
            "data": {
                "anyOf": [
                    {"type": "null"},
                    _object(
                        job={"type": ["string", "null"]},
                        counts=_object(**dict.fromkeys(_COUNTS, _COUNT)),
                        report={"type": ["string", "null"]},
                        seconds=_SECONDS,
                    ),
                ]
            },
            "error": {"anyOf": [{"type": "null"}, _object(**_ERROR)]},
        },
    ),
}


def build_event_schema() -> dict[str, Any]:
    """Build the JSON Schema 2020-12 of one line. Later versions only add types and keys under its name."""
    head = {"schema": {"const": SCHEMA}, "time": {"type": "string", "format": "date-time"}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "wancli event",
        "description": "One line of `wancli render --json-stream`.",
        "oneOf": [
            _object(type={"const": kind}, **head, **properties) | {"title": kind, "description": meaning}
            for kind, (meaning, properties) in _EVENTS.items()
        ],
    }
