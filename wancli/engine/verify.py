"""What is on disk held against the records beside it: `wancli check`. Reads everything, changes nothing.

A video verifies when its manifest does, lists it, and has its bytes; a latent and a state when their own
checksums do. What the report of a batch has as finished must be there. What wancli did not make, or does not
need any more, is listed and no problem.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wancli.errors import EntryError, FfmpegError
from wancli.sampling import state_file
from wancli.storage import claim_file, manifest, tensor_file
from wancli.storage.claims import claim_path
from wancli.video import mp4

if TYPE_CHECKING:
    from wancli.plan.shot import Shot

_MANIFEST, _LATENT, _STATE, _VIDEO = ".manifest.json", ".latents.safetensors", ".state.safetensors", ".mp4"
_KINDS = (_MANIFEST, _LATENT, _STATE, _VIDEO)
_MOVED_ASIDE = re.compile(r"\.(old|damaged)-\d+\.[a-z0-9]+$")
_COMPARISON = re.compile(r"\.compare(-\d+)?\.mp4$")  # shots side by side
_TEMP_FILE = re.compile(r"\.wancli-.*\.tmp$")

InScope = Callable[[Path], bool]  # whether an output is one to be looked at


@dataclass
class Verdict:
    """What was found: how much verifies, what does not and why, and what is there besides."""

    videos: int = 0
    latents: int = 0
    states: int = 0
    problems: list[tuple[Path, str]] = field(default_factory=list)
    missing: list[Path] = field(default_factory=list)  # of a job: what was not rendered yet
    orphans: list[Path] = field(default_factory=list)  # videos without a manifest
    aside: list[Path] = field(default_factory=list)  # what --force, or damage, moved aside
    debris: list[Path] = field(default_factory=list)  # what dead processes left, claims among it

    def as_dict(self) -> dict[str, Any]:
        """`wancli check --json`."""
        return {
            "schema": "wancli/check/1",
            "verified": {"videos": self.videos, "latents": self.latents, "states": self.states},
            "problems": [{"path": str(path), "problem": problem} for path, problem in self.problems],
            **{name: [*map(str, getattr(self, name))] for name in ("missing", "orphans", "aside", "debris")},
        }


def check_folder(root: Path, *, deep: bool = False) -> Verdict:
    """Everything below a folder. `deep` also decodes every video, and counts its frames."""
    root = root.resolve()
    verdict = _check_paths(list(_list_files(root)), {}, lambda path: path.is_relative_to(root), deep)
    verdict.debris += _stale_claims(sorted(root.rglob(".wancli/claims/*.json")))
    return verdict


def check_shots(shots: Iterable[Shot], *, deep: bool = False) -> Verdict:
    """The outputs of a job, which also must be those of the job as it is now; and what else is in their
    folders."""
    expected = {shot.output: shot for shot in shots}
    folders = sorted({output.parent for output in expected})
    # The report is in the folder that all of them share.
    folders_to_list = {Path(os.path.commonpath(folders)), *folders}
    paths = sorted(
        {path for one in folders_to_list if one.is_dir() for path in one.iterdir() if path.is_file()}
    )
    verdict = _check_paths(paths, expected, lambda path: path in expected, deep)
    verdict.debris += _stale_claims(map(claim_path, expected.values()))
    return verdict


def _stale_claims(claims: Iterable[Path]) -> list[Path]:
    """Those whose workers are known to be gone: of this host."""
    return [path for path in claims if (seen := claim_file.read_claim(path)) and claim_file.is_dead(seen)]


def _list_files(root: Path) -> Iterator[Path]:
    for place, inner, names in os.walk(root):
        inner[:] = sorted(name for name in inner if name != ".wancli")
        yield from (Path(place, name) for name in sorted(names))


def _check_paths(paths: list[Path], expected: Mapping[Path, Shot], in_scope: InScope, deep: bool) -> Verdict:
    verdict = Verdict()
    outputs = set()
    for path in paths:
        if _COMPARISON.search(path.name):
            continue
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
    broken = {path for path, _ in verdict.problems}
    for output in sorted(outputs):
        _check_video(output, expected.get(output), broken, deep, verdict)
    verdict.missing += [output for output in expected if output not in outputs | broken]
    verdict.problems = sorted(dict.fromkeys(verdict.problems))
    return verdict


def _check_video(output: Path, shot: Shot | None, broken: set[Path], deep: bool, verdict: Verdict) -> None:
    if not _has_manifest(output):
        verdict.orphans += [output] if manifest.manifest_path(output) not in broken else []
    elif problems := _video_problems(output, shot, deep):
        verdict.problems += problems
    else:
        verdict.videos += 1


def _check_tensors(path: Path, kind: str, output: Path, shot: Shot | None, verdict: Verdict) -> None:
    if (
        problem := _latent_problem(path, output, shot)
        if kind == _LATENT
        else _state_problem(path, output, shot)
    ):
        verdict.problems.append((path, problem))
    elif kind == _LATENT:
        verdict.latents += 1
    else:
        verdict.states += 1


def _has_manifest(output: Path) -> bool:
    return os.path.lexists(manifest.manifest_path(output))


def _video_problems(output: Path, shot: Shot | None, deep: bool) -> list[tuple[Path, str]]:
    path = manifest.manifest_path(output)
    try:
        body = manifest.read(path) or {}
        wrong = manifest.find_problems(output, shot.key if shot else body["key"])
        frames = body["shot"]["frames"]
    except EntryError as error:
        return [(path, error.message)]
    except (KeyError, TypeError):
        return [(path, "the manifest lacks what every manifest has")]
    if deep and not wrong:
        try:
            if (count := mp4.count_frames(output)) != frames:
                wrong = [f"{output}: {count} frames where the manifest has {frames}"]
        except FfmpegError as error:
            wrong = [f"{output}: cannot be decoded: {error.message}"]
    return [_split(line, output, path) for line in wrong]


def _split(line: str, *paths: Path) -> tuple[Path, str]:
    """Which of the files a problem is of, and what it is."""
    path = next((path for path in paths if line.startswith(f"{path}: ")), paths[0])
    return path, line.removeprefix(f"{path}: ")


def _latent_problem(path: Path, output: Path, shot: Shot | None) -> str:
    try:
        record = tensor_file.load_latent(path)[1]
    except EntryError as error:
        return error.message
    if record["shot"]["output"] != output.name:
        return f"the latent of {record['shot']['output']}"
    return "the latent of another job, version or model" if _is_of_another_job(record, shot) else ""


def _state_problem(path: Path, output: Path, shot: Shot | None) -> str:
    try:
        record = state_file.load_state(path)[1]
    except EntryError as error:
        return error.message
    if record.get("output") not in (None, output.name):
        return f"the state of {record['output']}"
    return "the state of another job, version or model" if _is_of_another_job(record, shot) else ""


def _is_of_another_job(record: Mapping[str, Any], shot: Shot | None) -> bool:
    return shot is not None and record.get("latents_key") != shot.latents_key


def _report_problems(path: Path, in_scope: InScope) -> Iterator[tuple[Path, str]]:
    """What a report has as finished and is not there. Of another program's report nothing is known."""
    try:
        report = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        yield path, "is not whole"
        return
    if not isinstance(report, dict) or not str(report.get("schema", "")).startswith("wancli/report/"):
        return
    shots = report.get("shots")
    if not isinstance(shots, list) or not all(map(_is_entry, shots)):
        yield path, "is not whole"
        return
    for entry in shots:
        output = Path(entry["output"])
        if entry["status"] in ("rendered", "already done") and in_scope(output):
            if not output.exists():
                yield output, f"is gone; {path.name} has it as {entry['status']}"
            if not _has_manifest(output):
                yield manifest.manifest_path(output), f"is gone; {path.name} has it as {entry['status']}"


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("output", "status"))
