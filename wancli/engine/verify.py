"""Checks files against the records beside them, for `wancli check`. Reads everything, changes nothing.

A video verifies if its manifest does, lists it, and has its bytes; a latent and a state if their own
checksums do. Shots that a report has as finished must exist. Files that wancli did not make, or does not need
any more, are listed and are not a problem.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wancli.engine import attention_stage, manifest_body, output_diff, shot_state
from wancli.errors import EntryError, FfmpegError, Unreadable
from wancli.storage import claim_file, disk, manifest, records, sidecars
from wancli.storage.claims import claim_path
from wancli.storage.manifest import Problem
from wancli.storage.manifest_schema import Manifest
from wancli.storage.report_schema import COMPARISON_SCHEMA, ComparisonRecord, ReportRecord
from wancli.video import mp4

if TYPE_CHECKING:
    from wancli.plan.shot import Shot

_MANIFEST, _LATENT, _STATE, _VIDEO = ".manifest.json", ".latents.safetensors", ".state.safetensors", ".mp4"
_KINDS = (_MANIFEST, _LATENT, _STATE, _VIDEO)
_MOVED_ASIDE = re.compile(r"\.(old|damaged)-\d+\.[a-z0-9]+$")
_COMPARISON = re.compile(r"\.compare(-\d+)?\.(mp4|png)$")
_OF_VIDEOS = re.compile(r"\.(compare(-\d+)?|attention)\.mp4$")  # made from videos of shots
_TEMP_FILE = re.compile(r"\.wancli-.*\.tmp$")

_GONE = "is gone; "
_OTHERS = ("missing", "orphans", "strays", "aside", "debris")  # files that are listed and no problem
InScope = Callable[[Path], bool]  # whether an output is one to be looked at


@dataclass
class Verdict:
    """How many files verify, what is wrong with the others, and which further files there are."""

    videos: int = 0
    latents: int = 0
    states: int = 0
    problems: list[Problem] = field(default_factory=list)
    unreadable: list[Problem] = field(default_factory=list)  # files and folders that may be sound
    missing: list[Path] = field(default_factory=list)  # outputs of a job that were not rendered yet
    orphans: list[Path] = field(default_factory=list)  # videos without a manifest
    strays: list[Path] = field(default_factory=list)  # pictures that no comparison lists any more
    aside: list[Path] = field(default_factory=list)  # files that --force, or damage, moved aside
    debris: list[Path] = field(default_factory=list)  # files that dead processes left, claims among them

    @contextmanager
    def note_unreadable(self) -> Iterator[None]:
        """Note what the block could not look at, and continue after it."""
        try:
            yield
        except Unreadable as error:
            self.unreadable.append(Problem(Path(error.where), error.message))

    def as_dict(self) -> dict[str, Any]:
        """`wancli check --json`."""
        return {
            "schema": "wancli/check/1",
            "verified": {"videos": self.videos, "latents": self.latents, "states": self.states},
            "problems": [problem.as_dict() for problem in self.problems],
            "unreadable": [problem.as_dict() for problem in self.unreadable],
            **{name: [*map(str, getattr(self, name))] for name in _OTHERS},
        }


def check_folder(root: Path, *, deep: bool = False) -> Verdict:
    """Check everything below a folder. `deep` also decodes every video and counts its frames."""
    root = disk.resolve(root)
    verdict = Verdict()
    files = list(_walk(root, verdict))
    claims = [path for path in files if path.suffix == ".json" and path.parts[-3:-1] == (".wancli", "claims")]
    others = [path for path in files if ".wancli" not in path.relative_to(root).parts[:-1]]
    _check_paths(others, {}, lambda path: path.is_relative_to(root), deep, verdict)
    verdict.debris += _stale_claims(claims)
    return verdict


def check_shots(shots: Iterable[Shot], *, deep: bool = False) -> Verdict:
    """Check the outputs of a job, which must also be those of the job as it is now, and list the other files
    in their folders."""
    expected = {shot.output: shot for shot in shots}
    folders = sorted({output.parent for output in expected})
    # The report is in the folder that all of them share.
    to_list = {Path(os.path.commonpath(folders)), *folders}
    verdict = Verdict()
    paths = sorted({path for folder in to_list for path in _list(folder, verdict)})
    _check_paths(paths, expected, lambda path: path in expected, deep, verdict)
    verdict.debris += _stale_claims(map(claim_path, expected.values()))
    return verdict


def _stale_claims(claims: Iterable[Path]) -> list[Path]:
    """Return the claims of workers on this host that are known to be dead."""
    return [path for path in claims if (claim := claim_file.read_claim(path)) and claim_file.is_dead(claim)]


def _walk(folder: Path, verdict: Verdict) -> Iterator[Path]:
    """Yield every file below a folder. Folders that cannot be listed are noted."""
    inner = []
    for path in _list(folder, verdict):
        with verdict.note_unreadable():
            if disk.is_folder(path) and not disk.is_link(path):
                inner.append(path)
                continue
        yield path
    for path in inner:
        yield from _walk(path, verdict)


def _list(folder: Path, verdict: Verdict) -> list[Path]:
    with verdict.note_unreadable():
        return disk.list_folder(folder)
    return []


def _check_paths(
    paths: list[Path], expected: Mapping[Path, Shot], in_scope: InScope, deep: bool, verdict: Verdict
) -> None:
    outputs: set[Path] = set()
    verdict.strays += _stray_pictures(paths, verdict)
    for path in paths:
        with verdict.note_unreadable():
            _check_path(path, expected, in_scope, outputs, verdict)
    broken = {problem.path for problem in verdict.problems}
    for output in sorted(outputs):
        with verdict.note_unreadable():
            _check_video(output, expected.get(output), broken, deep, verdict)
    hidden = {problem.path for problem in verdict.unreadable}
    verdict.missing += [
        output for output in expected if output not in outputs | broken and output.parent not in hidden
    ]
    verdict.problems = _without_repeats(verdict.problems)
    verdict.unreadable = sorted(dict.fromkeys(verdict.unreadable))


def _without_repeats(problems: Iterable[Problem]) -> list[Problem]:
    """Sort the problems. That a video is gone is told by its manifest and by the report: the latter, which
    names the report, stays."""
    unique = sorted(dict.fromkeys(problems))
    told = {problem.path for problem in unique if problem.text.startswith(_GONE)}
    return [
        one for one in unique if one.path not in told or one.text.startswith(_GONE) or disk.is_taken(one.path)
    ]


def _stray_pictures(paths: Iterable[Path], verdict: Verdict) -> list[Path]:
    """Return the sheets and videos side by side that no comparison beside them lists.

    `wancli compare -o` may have written one under such a name; then it is listed, too.
    """
    pictures = [path for path in paths if _COMPARISON.search(path.name)]
    listed: set[Path] = set()
    for path in paths if pictures else []:
        if path.name.endswith(".compare.json"):
            with verdict.note_unreadable(), suppress(EntryError):
                if record := sidecars.read_document(path, COMPARISON_SCHEMA, ComparisonRecord):
                    listed |= {path.parent / file.path for file in record.files}
    return [path for path in pictures if path not in listed]


def _check_path(
    path: Path, expected: Mapping[Path, Shot], in_scope: InScope, outputs: set[Path], verdict: Verdict
) -> None:
    """Check a file that is not a video, and collect the outputs."""
    if _OF_VIDEOS.search(path.name):
        return
    if _TEMP_FILE.fullmatch(path.name):
        verdict.debris.append(path)
    elif _MOVED_ASIDE.search(path.name):
        verdict.aside.append(path)
    elif path.name.endswith("report.json"):
        verdict.problems += _report_problems(path, in_scope)
    elif kind := next((suffix for suffix in _KINDS if path.name.endswith(suffix)), ""):
        output = path.with_name(path.name.removesuffix(kind) + _VIDEO)
        if expected and output not in expected:
            verdict.orphans += [path] if kind == _VIDEO and not _has_manifest(path) else []
        elif kind in (_MANIFEST, _VIDEO):
            outputs.add(output)
        else:
            _check_tensors(path, kind, output, expected.get(output), verdict)


def _check_video(output: Path, shot: Shot | None, broken: set[Path], deep: bool, verdict: Verdict) -> None:
    if not _has_manifest(output):
        verdict.orphans += [output] if manifest.manifest_path(output) not in broken else []
    elif problems := _video_problems(output, shot, deep):
        verdict.problems += problems
    else:
        verdict.videos += 1


def _check_tensors(path: Path, kind: str, output: Path, shot: Shot | None, verdict: Verdict) -> None:
    try:
        problem = _find_tensor_problem(path, kind, output, shot)
    except EntryError as error:
        problem = error.message
    if problem:
        verdict.problems.append(Problem(path, problem))
    elif kind == _LATENT:
        verdict.latents += 1
    else:
        verdict.states += 1


def _has_manifest(output: Path) -> bool:
    return disk.is_taken(manifest.manifest_path(output))


def _video_problems(output: Path, shot: Shot | None, deep: bool) -> list[Problem]:
    path = manifest.manifest_path(output)
    try:
        proof = manifest.read_proof(path)
    except EntryError as error:
        return [Problem(path, error.message)]
    if proof is None:
        return [Problem(path, "no manifest")]
    if shot and proof.key != shot.key:
        return [Problem(path, f"made by {_other_job(output_diff.describe_differences(shot))}")]
    problems = manifest.check_proof(output, proof, proof.key)
    problems += attention_stage.find_problems(output)
    if deep and not problems:
        try:
            record = Manifest.parse(proof.as_dict(), path)
            if (count := mp4.count_frames(output)) != record.shot.frames:
                text = f"{count} frames where the manifest has {record.shot.frames}"
                problems = [Problem(output, text)]
        except EntryError as error:
            problems = [Problem(path, error.message)]
        except FfmpegError as error:
            problems = [Problem(output, f"cannot be decoded: {error.message}")]
    return problems


def _other_job(differences: str) -> str:
    return f"another job, version or model{f': {differences}' if differences else ''}"


def _find_tensor_problem(path: Path, kind: str, output: Path, shot: Shot | None) -> str:
    """Verify a latent or a state, and that it is of this output and shot. Return what is wrong, or nothing.

    Raises EntryError if it is damaged.
    """
    if kind == _LATENT:
        record = manifest_body.verify_latent(path)
        word, name, latents_key = "latent", record.shot.output, record.latents_key
        differences = output_diff.describe_record(record, shot) if shot else ""
    else:
        saved = shot_state.load_state(path)[1]
        word, name, latents_key, differences = "state", saved.output or output.name, saved.latents_key, ""
    if name != output.name:
        return f"the {word} of {name}"
    if shot is not None and latents_key != shot.latents_key:
        return f"the {word} of {_other_job(differences)}"
    return ""


def _report_problems(path: Path, in_scope: InScope) -> Iterator[Problem]:
    """Yield the finished shots of a report that are gone. Reports of other programs are not judged."""
    try:
        document = records.read_json(path, records.REPORT)
        if not isinstance(document, dict) or not str(document.get("schema", "")).startswith("wancli/report/"):
            return
        shots = ReportRecord.parse(document, path).shots
    except EntryError as error:
        yield Problem(path, error.message)
        return
    for entry in shots:
        output = Path(entry.output)
        if entry.status in ("rendered", "already done") and in_scope(output):
            text = f"{_GONE}{path.name} has it as {entry.status}"
            if not disk.exists(output):
                yield Problem(output, text)
            if not _has_manifest(output):
                yield Problem(manifest.manifest_path(output), text)
