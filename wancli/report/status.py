"""The progress of a batch, for `wancli status`. Loads no model and hashes no video.

Status does not verify as `wancli check` does: a shot is `done` when its manifest has its key and its video
has the recorded size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wancli.engine import output_diff, preflight
from wancli.errors import NoSuchFile, Unreadable
from wancli.plan import throughput
from wancli.report import batch_report, plan_document
from wancli.report.terminal import state_text, wrap
from wancli.storage import claims, disk, manifest, tensor_file
from wancli.storage.manifest_schema import SavedState, ShotRecord
from wancli.units import format_moment, format_ranges, format_seconds, pluralize

if TYPE_CHECKING:
    from wancli.plan.render_plan import Plan
    from wancli.plan.shot import Shot
    from wancli.plan.throughput import Rate
    from wancli.storage.cache import Store

SCHEMA = "wancli/status/1"
STATES = ("done", "claimed", "half done", "latent only", "failed", "in the way", "unreadable", "to do")
UNFINISHED = ("claimed", "half done", "latent only", "to do")  # states that a running render changes
_LINES = 19  # of shots that are shown one by one
_NAMED = 3  # shots to do that are named
_SHOT_LINES = 4  # of a shot: a message can be long
_INDENT = 8 * " "


def status_document(plan: Plan, store: Store, rates: Sequence[Rate] = ()) -> dict[str, Any]:
    """Build `wancli status --json`: the state of every shot, and the time that the rest will take."""
    failed = _read_failures(batch_report.report_path(plan))
    rows = [_look_at_shot(shot, failed.get(str(shot.output))) for shot in plan.shots]
    counts = Counter(row["state"] for row in rows)
    return {
        "schema": SCHEMA,
        "job": plan.name,
        "counts": {state: counts[state] for state in STATES},
        "shots": rows,
        "time": _estimate_remaining(plan, rows, store, rates),
    }


def _look_at_shot(shot: Shot, error: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the row of a shot; `unreadable` if its files cannot be looked at."""
    try:
        return _shot_row(shot, error)
    except Unreadable as why:
        about = {"index": shot.index, "id": shot.id, "labels": shot.labels, "path": str(shot.output)}
        about |= {"key": shot.key, "state": "unreadable", "step": 0, "steps": shot.steps}
        return about | {"saved": None, "claim": None, "why": "", "error": why.as_dict()}


def _shot_row(shot: Shot, error: Mapping[str, Any] | None) -> dict[str, Any]:
    about = {"index": shot.index, "id": shot.id, "labels": shot.labels, "path": str(shot.output)}
    progress: dict[str, Any] = {"step": 0, "steps": shot.steps, "saved": None, "claim": None, "error": None}
    progress["why"] = ""
    holder = claims.find_holder(shot)
    progress["claim"] = asdict(holder) if holder else None
    if _looks_done(shot):
        return about | {"key": shot.key, "state": "done"} | progress | {"step": shot.steps}
    latent = tensor_file.read_record(shot.latents, ShotRecord)
    saved = tensor_file.read_record(shot.state, SavedState)
    has_latent = latent is not None and latent.latents_key == shot.latents_key
    has_state = saved is not None and saved.latents_key == shot.latents_key
    if has_latent or has_state:
        path = shot.latents if has_latent else shot.state
        progress["step"] = shot.steps if has_latent or saved is None else min(saved.step, shot.steps)
        if found := disk.status(path):  # else it is gone since: what it became, the next look tells
            progress["saved"] = datetime.fromtimestamp(found.st_mtime, UTC).isoformat(timespec="seconds")
    progress["error"] = error
    if holder:
        state = "claimed"
    elif _is_in_the_way(shot, has_latent=has_latent):
        state = "in the way"
        progress["why"] = output_diff.describe_differences(shot)
    elif error:
        state = "failed"
    elif has_latent:
        state = "latent only"
    else:
        state = "half done" if has_state else "to do"
    return about | {"key": shot.key, "state": state} | progress


def _is_in_the_way(shot: Shot, *, has_latent: bool) -> bool:
    """Return whether there is a file at the output that a render would not move aside or make once more."""
    if not disk.exists(shot.output) or (has_latent and not disk.exists(shot.manifest)):
        return False
    return not preflight.find_origin(shot)


def _looks_done(shot: Shot) -> bool:
    try:
        size = disk.size(shot.output)
    except NoSuchFile:
        return False
    proof = manifest.read_unverified(shot.manifest)
    done = proof is not None and proof.key == shot.key and proof.has(shot.output.name, size)
    return done and not preflight.lacks_measurements(shot)


def _read_failures(path: Path) -> dict[str, Mapping[str, Any]]:
    """Read the errors of the last report of the job, by output."""
    with suppress(Unreadable):
        report = batch_report.read_report(path)
        entries = report.shots if report else []
        return {entry.output: entry.error for entry in entries if entry.status == "failed" and entry.error}
    return {}


def _estimate_remaining(
    plan: Plan, rows: Sequence[Mapping[str, Any]], store: Store, rates: Sequence[Rate]
) -> dict[str, Any]:
    """Predict the seconds that the remaining work takes one worker; None if no earlier render is like it."""
    todo: list[Shot] = []
    taken = plan.schedule.shared_steps()
    decoding: list[float | None] = []
    for shot, row in zip(plan.shots, rows):
        if row["state"] in ("done", "in the way", "unreadable"):
            continue
        if row["step"] == shot.steps:
            decoding.append(throughput.predict_seconds(throughput.shot_workloads(shot)["decode"], rates))
        else:
            taken[shot.index] = max(row["step"], taken.get(shot.index, 0))
            todo.append(shot)
    parts = [plan_document.estimate_time(todo, store, rates, taken)["seconds"] if todo else 0.0, *decoding]
    return {"seconds": None if None in parts else sum(part for part in parts if part is not None)}


def format_status(status: Mapping[str, Any], now: datetime) -> Iterator[str]:
    """Format the status in 80 columns: counts, time, and the first of the shots that are not done."""
    counts = [f"{n:,} {state_text(state)}" for state, n in status["counts"].items() if n]
    yield f"{status['job']}, {pluralize(len(status['shots']), 'shot')}: {', '.join(counts)}"
    if status["counts"]["done"]:
        yield "done by manifest and size alone; `wancli check` reads the videos"
    seconds = status["time"]["seconds"]
    if seconds is None:
        yield "time left: unknown, nothing like it was rendered here"
    elif seconds:
        yield f"time left: about {format_seconds(seconds)} for one worker, at the rates of earlier renders"
    order = {state: place for place, state in enumerate(STATES)}
    open_ones = [shot for shot in status["shots"] if shot["state"] not in ("done", "to do")]
    listed: list[str] = []
    hidden = 0
    for shot in sorted(open_ones, key=lambda shot: order[shot["state"]]):
        lines = _format_shot(shot, now)
        if hidden or len(listed) + len(lines) > _LINES:
            hidden += 1
        else:
            listed += lines
    yield from listed
    if hidden:
        yield f"      and {hidden:,} more; --json lists all"
    if todo := [shot for shot in status["shots"] if shot["state"] == "to do"]:
        names = f" ({', '.join(shot['id'] for shot in todo)})" if len(todo) <= _NAMED else ""
        yield from wrap(f"to do: {format_ranges([shot['index'] for shot in todo])}{names}", "  ")


def _format_shot(shot: Mapping[str, Any], now: datetime) -> list[str]:
    """Format the number, name and state of a shot, and what is known of it on the same line or below."""
    line = f"{shot['index']:>5} {shot['id']}  {state_text(shot['state'])}"
    about = _describe_shot(shot, now)
    whole = wrap(f"{line}  {about}".rstrip(), _INDENT)
    if len(whole) == 1:
        return whole
    return [*wrap(line, _INDENT), *wrap(f"{_INDENT}{about}", _INDENT)][:_SHOT_LINES]


def _describe_claim(claim: Mapping[str, Any]) -> str:
    worker = f"by {claim['host'].partition('.')[0]}:{claim['pid']}"
    try:
        since = datetime.fromisoformat(claim["since"]).astimezone(UTC)
    except (ValueError, OverflowError):  # of a claim that cannot be read, or is another program's
        return worker
    return f"{worker} since {format_moment(since)}"


def _describe_shot(shot: Mapping[str, Any], now: datetime) -> str:
    parts = []
    if claim := shot["claim"]:
        parts.append(_describe_claim(claim))
    if shot["saved"]:
        age = (now - datetime.fromisoformat(shot["saved"])).total_seconds()
        parts.append(f"step {shot['step']} of {shot['steps']}, saved {format_seconds(max(0.0, age))} ago")
    if shot["state"] == "unreadable":
        reason = shot["error"]["message"].removeprefix("cannot be read: ")
        parts.append(f"{Path(shot['error']['where']).name}: {reason}")
    if shot["why"]:
        parts.append(shot["why"])
    if shot["state"] == "failed":
        parts.append(shot["error"]["message"].partition("\n")[0])
    return "; ".join(parts)
