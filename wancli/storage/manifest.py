"""Manifests: the record beside each output of what made it, and the proof that it is intact.

NAME.manifest.json beside NAME.mp4 is JSON for people and programs, sealed by the SHA-256 of its
canonical form, written last: it refers only to files that are already durable. A shot is done if
and only if its manifest verifies, carries the shot's key, and every file it lists is there with
the listed bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from wancli.errors import EntryError, NoSuchFile, Unreadable
from wancli.storage import atomic, disk, records
from wancli.storage.manifest_schema import Manifest, ManifestKey, ManifestProof
from wancli.storage.schema import FileRecord

SCHEMA = "wancli/manifest/1"


def manifest_path(output: Path) -> Path:
    """Return NAME.manifest.json for NAME.mp4."""
    return output.with_suffix(".manifest.json")


def file_record(path: Path, folder: Path) -> dict[str, str | int]:
    """Build an item of "files": path relative to `folder`, the manifest's, digest and size."""
    relative = path.relative_to(folder).as_posix()
    return {"path": relative, "sha256": disk.sha256(path), "bytes": disk.size(path)}


def canonical_json(body: Mapping[str, Any]) -> bytes:
    """Encode JSON data in the one spelling that is hashed: sorted, without blanks, UTF-8, finite.

    Bytes of a file name that are not UTF-8 are escaped as the halves of surrogate pairs.
    """
    separators = (",", ":")
    text = json.dumps(body, sort_keys=True, separators=separators, ensure_ascii=False, allow_nan=False)
    return text.encode(errors="backslashreplace")


def write(path: Path, body: Mapping[str, Any]) -> None:
    """Seal a manifest and write it durably, replacing an older one.

    `body` is plain JSON data. Raises NoSpace or MachineError.
    """
    # through JSON once, so that what is sealed is what will be read: text keys, lists
    atomic.replace(path, _serialize(records.parse_json(json.dumps(dict(body)))))


def read(path: Path) -> Manifest | None:
    """Read and validate a manifest. Returns None if the file does not exist.

    Raises EntryError if the manifest is damaged or of another version.
    """
    body = read_json(path)
    return None if body is None else Manifest.parse(body, path)


def read_proof(path: Path) -> ManifestProof | None:
    """Read what a manifest proves. Returns None if the file does not exist.

    Raises EntryError if the seal, the key or the list of files is damaged.
    """
    body = read_json(path)
    return None if body is None else ManifestProof.parse(body, path)


def read_if_usable(path: Path) -> Manifest | None:
    """Read a manifest for its figures. Returns None if there is none that can be read and used."""
    with suppress(EntryError, Unreadable):
        return read(path)
    return None


def read_json(path: Path) -> dict[str, Any] | None:
    """Read the body of a manifest as it is in the file, and verify the seal, not the keys.

    Returns None if the file does not exist. Raises EntryError if it is damaged, Unreadable if the disk
    does not tell.
    """
    data = records.find_bytes(path, records.MANIFEST)
    if data is None:
        return None
    try:
        document = records.parse_json(data)
        body = {name: value for name, value in document.items() if name not in ("schema", "seal")}
        intact = data == _serialize(body)  # also catches damage to blanks, and repeated keys
    except (ValueError, AttributeError):
        intact = False
    if not intact:
        raise records.MANIFEST.damaged(path)
    return body


def peek_key(path: Path) -> str | None:
    """Read the key in a manifest without verifying it. Returns None if it cannot be read."""
    with suppress(EntryError):
        return ManifestKey.parse(records.read_json(path, records.MANIFEST), path).key
    return None


def read_unverified(path: Path) -> ManifestProof | None:
    """Read what a manifest proves without verifying its seal. Returns None if it cannot be read."""
    with suppress(EntryError):
        return ManifestProof.parse(records.read_json(path, records.MANIFEST), path)
    return None


@dataclass(frozen=True, order=True)
class Problem:
    """Something wrong with a file."""

    path: Path
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"

    def as_dict(self) -> dict[str, str]:
        return {"path": str(self.path), "problem": self.text}


def find_problems(output: Path, key: str) -> list[Problem]:
    """Find why `output` is not the finished work of the shot with this key. Empty if it is.

    Raises Unreadable if the disk does not tell: then nothing is known to be wrong.
    """
    path = manifest_path(output)
    try:
        proof = read_proof(path)
    except EntryError as error:
        return [Problem(path, error.message)]
    if proof is None:
        return [Problem(path, "no manifest")]
    return check_proof(output, proof, key)


def check_proof(output: Path, proof: ManifestProof, key: str) -> list[Problem]:
    """As `find_problems`, with the manifest already read. Hashes every file that it lists."""
    if proof.key != key:
        return [Problem(manifest_path(output), "made by another job, version or model")]
    problems = [problem for file in proof.files for problem in check_file(output.parent, file)]
    if all(file.path != output.name for file in proof.files):
        problems.append(Problem(manifest_path(output), f"does not list {output.name}"))
    return problems


def is_done(output: Path, key: str) -> bool:
    """Return whether the manifest of `output` verifies against the shot's key and all listed files."""
    return not find_problems(output, key)


def check_file(folder: Path, record: FileRecord) -> Iterator[Problem]:
    """Yield what is wrong with a recorded file in `folder`. Hashes it."""
    path = folder / PurePosixPath(record.path)
    try:
        size = disk.size(path)
        if size != record.bytes:
            yield Problem(path, f"{size} bytes where the manifest has {record.bytes}")
        elif disk.sha256(path) != record.sha256:
            yield Problem(path, "content does not match the manifest")
    except NoSuchFile as error:
        yield Problem(path, error.message)


def _serialize(body: Mapping[str, Any]) -> bytes:
    content = {"schema": SCHEMA, **body}
    content["seal"] = hashlib.sha256(canonical_json(content)).hexdigest()
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode(errors="backslashreplace")
