"""The report as data: what a batch did, from the manifests of its shots; what a plan would do."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wancli import files, manifest
from wancli.encode import describe
from wancli.errors import EntryError
from wancli.record import versions
from wancli.store import unseal

if TYPE_CHECKING:
    from wancli.memory import Phase
    from wancli.pipeline import Outcome
    from wancli.shot import Plan, Shot
    from wancli.store import Store

SCHEMA = "wancli/report/1"


def build(plan: Plan, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """All shots of a batch, and its totals. A shot that was never reached is `not started`."""
    by_index = {outcome.shot.index: outcome for outcome in outcomes}
    shots = [_shot(shot, by_index.get(shot.index)) for shot in plan.shots]
    fresh = [shot for shot in shots if shot["status"] == "rendered"]
    prompts = {prompt["id"]: prompt for shot in fresh for prompt in shot["prompts"]}
    return {
        "schema": SCHEMA,
        "job": plan.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "warnings": list(plan.warnings),
        "shots": shots,
        "memory": _memory(fresh),
        "first_step_after": min((shot["first_step_after"] for shot in fresh), default=None),
        "process": max((shot["phases"][0]["rss_start"] for shot in fresh), default=0),
        "cache": {
            "hits": sum(prompt["cached"] for prompt in prompts.values()),
            "misses": sum(not prompt["cached"] for prompt in prompts.values()),
            "encoder_loaded": any(shot["encoder_loaded"] for shot in fresh),
        },
        "versions": versions(),
    }


def write(plan: Plan, report: dict[str, Any]) -> Path:
    """Puts `report.json` into the folder that the outputs of the job share, or that of the first.

    An earlier report is replaced, but for the entries of shots that were not asked for; another
    program's file of that name is moved aside.
    """
    shots = sorted((*plan.shots, *plan.others), key=lambda shot: shot.index)
    folder = Path(os.path.commonpath([shot.output.parent for shot in shots]))
    if folder == folder.parent:  # they share nothing but the root of the file system
        folder = shots[0].output.parent
    path = folder / "report.json"
    earlier = _read(path)
    if path.exists() and earlier is None:
        files.set_aside(path)
    if plan.others:
        known = {entry["output"]: entry for entry in (*(earlier or {}).get("shots", []), *report["shots"])}
        kept = [known.get(str(shot.output)) or _shot(shot, None) for shot in shots]
        report = report | {"shots": kept}
    # Names of files that are not UTF-8 arrive as lone surrogates.
    text = json.dumps(report, ensure_ascii=False, indent=2) + "\n"
    files.replace(path, text.encode(errors="backslashreplace"))
    return path


def _read(path: Path) -> dict[str, Any] | None:
    """The report that is there, None if there is none."""
    try:
        found = json.loads(path.read_bytes())
        return found if found["schema"] == SCHEMA else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def of_plan(plan: Plan, store: Store) -> dict[str, Any]:
    """`wancli plan --json`."""
    return {
        "schema": "wancli/plan/1",
        "job": plan.name,
        "warnings": list(plan.warnings),
        "shots": [
            {
                "index": shot.index,
                "id": shot.id,
                "labels": shot.labels,
                "output": str(shot.output),
                "key": shot.key,
                "state": state(shot),
                "size": [shot.width, shot.height],
                "frames": shot.frames,
                "tokens": shot.tokens,
                "seed": shot.seed,
                "solver": shot.solver,
                "timesteps": shot.schedule.timesteps,
                "sigmas": shot.schedule.sigmas,
                "shift": shot.shift,
                "guidance": shot.guidance,
                "stages": [stage.as_dict() for stage in shot.stages],
                "sharing": shot.sharing,
                "inject": [
                    asdict(rule) | {"cells": len(r)} for rule, r in zip(shot.rules, shot.table.reached)
                ],
                "loras": [
                    {"path": str(use.path), **use.decided, "coverage": asdict(use.coverage)}
                    for use in shot.loras
                ],
            }
            for shot in plan.shots
        ],
        "prompts": cached(plan, store),
        "memory": [row(phase) for phase in largest(shot.phases for shot in plan.shots)],
    }


def state(shot: Shot) -> str:
    """What a render would find: `done`, `to do`, or `in the way`, which takes --force or another output."""
    if manifest.done(shot.output, shot.key):
        return "done"
    return "in the way" if shot.output.exists() else "to do"


def cached(plan: Plan, store: Store) -> list[dict[str, Any]]:
    """Every distinct prompt of a plan, and whether stage 1 has it already."""
    texts = {prompt.id: prompt for shot in plan.shots for prompt in shot.texts}
    return [
        {
            "id": id,
            "text": prompt.tokens.text,
            "tokens": len(prompt.tokens.ids),
            "cached": prompt.file is not None or store.path(id).exists(),
        }
        for id, prompt in texts.items()
    ]


def of_cache(store: Store) -> list[dict[str, Any]]:
    """`wancli cache ls`: the entries, last used first."""
    rows = []
    for entry in sorted(store.entries(), key=lambda entry: entry.mtime, reverse=True):
        try:  # not `store.get`, which marks the entry as used and sets a damaged one aside
            tokens = describe(unseal(entry.path.read_bytes(), entry.key))[0]
        except (OSError, EntryError):
            tokens = None
        rows.append(
            {
                "key": entry.key,
                "bytes": entry.bytes,
                "used": datetime.fromtimestamp(entry.mtime, UTC).isoformat(timespec="seconds"),
                "tokens": len(tokens.ids) if tokens else None,
                "text": tokens.text if tokens else "(damaged; a render computes it again)",
            }
        )
    return rows


def largest(phases: Iterable[Sequence[Phase]]) -> list[Phase]:
    """Per phase the prediction of the shot that needs most."""
    found: dict[str, Phase] = {}
    for phase in (p for several in phases for p in several):
        if phase.name not in found or phase.total > found[phase.name].total:
            found[phase.name] = phase
    return list(found.values())


def row(phase: Phase) -> dict[str, Any]:
    return asdict(phase) | {"total": phase.total}


def _shot(shot: Shot, outcome: Outcome | None) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "id": shot.id,
        "labels": shot.labels,
        "output": str(shot.output),
        "status": outcome.status if outcome else "not started",
    }
    if outcome and outcome.error:
        entry["error"] = {
            "code": outcome.error.code,
            "message": str(outcome.error),
            "hint": outcome.error.hint,
        }
    return entry | (outcome.record or {} if outcome else {})


def _memory(shots: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per phase: predicted parts, the measured peak above the bare process, and seconds over all shots."""
    found: dict[str, dict[str, Any]] = {}
    for shot in shots:
        for phase in shot["predicted"]:
            best = found.setdefault(phase["name"], phase | {"measured": 0, "seconds": 0.0})
            if phase["total"] > best["total"]:
                best |= phase
    counted: set[tuple[Any, ...]] = set()
    for shot in shots:
        for phase in shot["phases"]:
            entry = found.setdefault(phase["name"], {"name": phase["name"], "measured": 0, "seconds": 0.0})
            grown = phase["rss"] - shot["phases"][0]["rss_start"]
            entry["measured"] = max(entry["measured"], phase["cuda"] or grown)
            # What served several shots stands in the manifests of all of them, word for word.
            once = (*phase.values(), shot["model"]["root"])
            serves = phase["name"] in ("encode", "load") or phase.get("shots", 1) > 1
            if once not in counted or not serves:
                entry["seconds"] += phase["seconds"]
            counted.add(once)
    return list(found.values())
