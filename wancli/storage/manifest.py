"""The record beside each output: what made it, and the proof that it is still whole.

NAME.manifest.json beside NAME.mp4 is JSON for people and programs, sealed by the SHA-256 of its
canonical form, written last: it refers only to files that are already durable. A shot is done if
and only if its manifest verifies, carries the shot's key, and every file it lists is there with
the listed bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from wancli.errors import EntryError
from wancli.storage import atomic

SCHEMA = "wancli/manifest/1"


def manifest_path(output: Path) -> Path:
    """NAME.manifest.json for NAME.mp4."""
    return output.with_suffix(".manifest.json")


def file_record(path: Path, folder: Path) -> dict[str, str | int]:
    """An item of a manifest's "files": path relative to `folder`, the manifest's, size and digest."""
    relative = path.relative_to(folder).as_posix()
    return {"path": relative, "sha256": atomic.sha256(path), "bytes": path.stat().st_size}


def canonical_json(body: Mapping[str, Any]) -> bytes:
    """The one spelling of JSON data that is hashed: sorted, without blanks, UTF-8, finite."""
    separators = (",", ":")
    text = json.dumps(body, sort_keys=True, separators=separators, ensure_ascii=False, allow_nan=False)
    return text.encode()


def write(path: Path, body: Mapping[str, Any]) -> None:
    """Seal and durably write a manifest, over an older one if there is one.

    `body` is plain JSON data. Raises NoSpace or MachineError.
    """
    # through JSON once, so that what is sealed is what will be read: text keys, lists
    atomic.replace(path, _serialize(json.loads(json.dumps(dict(body)))))


def read(path: Path) -> dict[str, Any] | None:
    """The body of a manifest, None if there is no such file. Raises EntryError if it is damaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise EntryError(f"cannot read the manifest: {error.strerror}", where=str(path)) from error
    try:
        document = json.loads(data)
        body = {name: value for name, value in document.items() if name not in ("schema", "seal")}
        intact = data == _serialize(body)  # also catches damage to blanks, and repeated keys
    except (ValueError, AttributeError, RecursionError):
        intact = False
    if not intact:
        hint = "delete it, or render again with --force"
        raise EntryError("the manifest is damaged, or of another version", where=str(path), hint=hint)
    return body


def find_problems(output: Path, key: str) -> list[str]:
    """Why `output` is not the finished work of the shot with this key; empty if it is."""
    path = manifest_path(output)
    try:
        body = read(path)
    except EntryError as error:
        return [str(error)]
    if body is None:
        return [f"{path}: no manifest"]
    if body.get("key") != key:
        return [f"{path}: made by another job, version or model"]
    records = body.get("files", [])
    found = [_check_file(output.parent, record) for record in records]
    if output.name not in [record["path"] for record in records]:
        found.append(f"{path}: does not list {output.name}")
    return [problem for problem in found if problem]


def is_done(output: Path, key: str) -> bool:
    """True if the manifest of `output` verifies against the shot's key and all listed files."""
    return not find_problems(output, key)


def _check_file(folder: Path, record: Mapping[str, Any]) -> str:
    path = folder / PurePosixPath(record["path"])
    try:
        size = path.stat().st_size
        if size != record["bytes"]:
            return f"{path}: {size} bytes where the manifest has {record['bytes']}"
        if atomic.sha256(path) != record["sha256"]:
            return f"{path}: content does not match the manifest"
    except OSError as error:
        return f"{path}: {error.strerror}"
    return ""


def _serialize(body: Mapping[str, Any]) -> bytes:
    content = {"schema": SCHEMA, **body}
    content["seal"] = hashlib.sha256(canonical_json(content)).hexdigest()
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
