"""The report as data: what a batch did, from the manifests of its shots; what a plan would do."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wancli.engine import preflight
from wancli.engine.manifest_body import versions
from wancli.errors import EntryError
from wancli.plan import alternatives, memory_estimate, throughput
from wancli.storage import atomic, manifest, sidecars
from wancli.storage.cache import unseal
from wancli.text.embedding import read_tokens

if TYPE_CHECKING:
    from wancli.engine.outcome import Outcome
    from wancli.plan.shot import ModelSpec, Plan, Shot
    from wancli.plan.throughput import Rate
    from wancli.storage.cache import Store

SCHEMA = "wancli/report/1"


def build_report(plan: Plan, outcomes: Sequence[Outcome], rates: Sequence[Rate] = ()) -> dict[str, Any]:
    """All shots of a batch, and its totals. A shot that was never reached is `not started`. `known` are the
    rates that what was rendered is expected to take, those from before it began."""
    by_index = {outcome.shot.index: outcome for outcome in outcomes}
    shots = [_shot_entry(shot, by_index.get(shot.index)) for shot in plan.shots]
    fresh = [shot for shot in shots if shot["status"] == "rendered"]
    sampled = [shot for shot in fresh if not _resumed_from_latent(shot)]
    prompts = {prompt["id"]: prompt for shot in sampled for prompt in shot["prompts"]}
    missing = frozenset(id for id, prompt in prompts.items() if not prompt["cached"])
    rendered = [outcome.shot for outcome in outcomes if outcome.status == "rendered"]
    shared = {outcome.shot.index: outcome.shared_steps for outcome in outcomes}
    expected = throughput.predict_phases(rendered, missing, rates, shared)
    return {
        "schema": SCHEMA,
        "job": plan.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "warnings": list(plan.warnings),
        "shots": shots,
        "memory": _memory_by_phase(fresh, expected),
        "first_step_after": min(filter(None, (shot["first_step_after"] for shot in sampled)), default=None),
        "process": max((_phases_of_this_run(shot)[0]["rss_start"] for shot in fresh), default=0),
        "peak": _peak_memory(fresh),
        "cache": {
            "hits": sum(prompt["cached"] for prompt in prompts.values()),
            "misses": sum(not prompt["cached"] for prompt in prompts.values()),
            "encoder_loaded": any(shot["encoder_loaded"] for shot in sampled),
        },
        "versions": versions(),
    }


def _phases_of_this_run(shot: dict[str, Any]) -> list[dict[str, Any]]:
    """What this run did for a shot; what an earlier one did is marked."""
    return [phase for phase in shot["phases"] if not phase.get("earlier")]


def _resumed_from_latent(shot: dict[str, Any]) -> bool:
    """Whether an earlier run left the latent, so that this one read no prompt and took no step."""
    return not any(phase["name"] == "encode" for phase in _phases_of_this_run(shot))


def write_report(plan: Plan, report: dict[str, Any]) -> Path:
    """Puts `{job}.report.json` into the folder that the outputs of the job share, or that of the first.

    An earlier report is replaced, but for the entries of shots that were not asked for; another
    program's file of that name is moved aside.
    """
    shots = plan.all_shots
    path = report_path(plan)
    earlier = read_report(path)
    if path.exists() and earlier is None:
        atomic.move_aside(path)
    if plan.unselected:
        selected = {entry["output"]: entry for entry in report["shots"]}
        known = {entry["output"]: entry for entry in (earlier or {}).get("shots", [])}
        kept = [
            selected.get(str(shot.output)) or _unselected_entry(shot, known.get(str(shot.output)))
            for shot in shots
        ]
        report = report | {"shots": kept}
    # Names of files that are not UTF-8 arrive as lone surrogates.
    text = json.dumps(report, ensure_ascii=False, indent=2) + "\n"
    atomic.replace(path, text.encode(errors="backslashreplace"))
    return path


def _unselected_entry(shot: Shot, entry: dict[str, Any] | None) -> dict[str, Any]:
    """What is known of a shot that was not asked for: what a report said of it as it is now, or its manifest;
    its video is not hashed."""
    if entry and entry.get("key") == shot.key:
        return entry
    with suppress(EntryError):
        body = manifest.read(shot.manifest)
        if body and body.get("key") == shot.key and shot.output.exists():
            return _shot_entry(shot, None) | {"status": "already done"} | body
    return entry or _shot_entry(shot, None)


def report_path(plan: Plan) -> Path:
    """Where the report of a job is."""
    return plan.sidecar_path("report.json")


def read_report(path: Path) -> dict[str, Any] | None:
    """The report that is there, None if there is none."""
    return sidecars.read_document(path, SCHEMA)


def plan_document(
    plan: Plan, states: Sequence[str], store: Store, rates: Sequence[Rate] = ()
) -> dict[str, Any]:
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
                "state": found,
                "size": [shot.width, shot.height],
                "frames": shot.frames,
                "tokens": shot.tokens,
                "seed": shot.seed,
                "solver": shot.solver,
                "timesteps": shot.sigma_schedule.timesteps,
                "sigmas": shot.sigma_schedule.sigmas,
                "shift": shot.shift,
                "guidance": shot.guidance,
                "stages": [stage.as_dict() for stage in shot.stages],
                "sharing": plan.schedule.placement(shot).batch_size,
                "fork": _fork_row(plan, shot),
                "inject": [
                    asdict(rule) | {"cells": len(r)} for rule, r in zip(shot.rules, shot.table.changed_cells)
                ],
                "loras": [
                    {"path": str(use.path), **use.pixel_settings, "coverage": asdict(use.coverage)}
                    for use in shot.loras
                ],
            }
            for shot, found in zip(plan.shots, states, strict=True)
        ],
        "steps": count_steps(plan),
        "prompts": prompt_rows(plan.shots, store),
        "memory": memory_rows(plan),
        "models": [
            {
                "root": str(model.checkpoint.root),
                "device": model.device,
                "dtype": model.dtype,
                "residency": model.residency,
                "text_encoder": model.encoder.residency,
                "chunk": model.kernels.chunk,
                "why": list(model.residency_reasons),
                "limit": model.memory_limit,
                "budget": model.budget,
            }
            for model in dict.fromkeys(shot.model for shot in plan.shots)
        ],
        "alternatives": [
            asdict(option) | {"shot": shot.id}
            for shot in largest_shots(plan)
            for option in alternatives.alternatives(shot)
        ],
        "time": estimate_time(
            shots_to_render(plan.shots, states), store, rates, plan.schedule.shared_steps()
        ),
    }


def _fork_row(plan: Plan, shot: Shot) -> dict[str, int] | None:
    fork = plan.schedule.placement(shot).fork
    return {"of": fork.parent, "step": fork.step} if fork else None


def count_steps(plan: Plan) -> dict[str, int]:
    """Count the steps of all shots, and those that are shared: another shot takes them."""
    shared = plan.schedule.shared_steps().values()
    return {"all": sum(shot.steps for shot in plan.shots), "shared": sum(shared)}


def largest_shots(plan: Plan) -> list[Shot]:
    """Return of each model the shot that needs most memory."""
    largest: dict[ModelSpec, tuple[int, Shot]] = {}
    for shot in plan.shots:
        peak = plan.schedule.peak(shot)
        if shot.model not in largest or peak > largest[shot.model][0]:
            largest[shot.model] = peak, shot
    return [shot for _, shot in largest.values()]


def output_states(shots: Iterable[Shot]) -> list[str]:
    """What a render would find of each: `done`, `to do`, `damaged`, which is made anew, or `in the way`,
    which takes --force or another output. Reads every video that there is."""
    return [preflight.output_status(shot)[0] for shot in shots]


def shots_to_render(shots: Sequence[Shot], states: Sequence[str]) -> list[Shot]:
    """Those that a render would make."""
    return [shot for shot, found in zip(shots, states, strict=True) if found in ("to do", "damaged")]


def prompt_rows(shots: Iterable[Shot], store: Store) -> list[dict[str, Any]]:
    """Every distinct prompt of the shots, and whether stage 1 has it already."""
    texts = {prompt.id: prompt for shot in shots for prompt in shot.prompts}
    return [
        {
            "id": id,
            "text": prompt.tokens.text,
            "tokens": len(prompt.tokens.ids),
            "cached": prompt.file is not None or store.path(id).exists(),
        }
        for id, prompt in texts.items()
    ]


def cache_rows(store: Store) -> list[dict[str, Any]]:
    """`wancli cache ls`: the entries, last used first."""
    rows = []
    for entry in sorted(store.entries(), key=lambda entry: entry.mtime, reverse=True):
        try:  # not `store.get`, which marks the entry as used and sets a damaged one aside
            tokens = read_tokens(unseal(entry.path.read_bytes(), entry.key))[0]
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


def memory_rows(plan: Plan) -> list[dict[str, Any]]:
    """Per phase the prediction of the shot that needs most: `total` of the phase, `peak` of the process."""
    rows: dict[str, dict[str, Any]] = {}
    for shot in plan.shots:
        process = memory_estimate.process_bytes(shot.model)
        for phase in plan.schedule.phases(shot):
            row = asdict(phase) | {"total": phase.total, "process": process, "peak": process + phase.total}
            if phase.name not in rows or row["peak"] > rows[phase.name]["peak"]:
                rows[phase.name] = row
    return list(rows.values())


def estimate_time(
    shots: Sequence[Shot], store: Store, rates: Sequence[Rate], taken: Mapping[int, int]
) -> dict[str, Any]:
    """Seconds that each phase of these shots and all together will take, None where nothing like it was ever
    done here; and the rates they rest on, `rough` where these are of much smaller or larger shots.
    `taken` is by index how many steps of a shot need not be taken any more."""
    texts = {text.id for shot in shots for text in shot.prompts if text.file is None}
    missing = frozenset(id for id in texts if not store.path(id).exists())
    phases = throughput.predict_phases(shots, missing, rates, taken)
    parts = list(phases.values())
    sources = throughput.rates_used(shots, rates) if shots else {}
    return {
        "seconds": None if None in parts else sum(part for part in parts if part is not None),
        "phases": phases,
        "rough": any(
            throughput.is_extrapolated(rate, max(shot.tokens for shot in shots)) for rate in sources.values()
        ),
        "rates": {name: asdict(rate) for name, rate in sources.items()},
    }


def _shot_entry(shot: Shot, outcome: Outcome | None) -> dict[str, Any]:
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


def _peak_memory(shots: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Predicted and measured bytes of the whole process, on CUDA those of the device."""
    measured = [phase["cuda"] or phase["rss"] for shot in shots for phase in _phases_of_this_run(shot)]
    predicted = [phase["peak"] for shot in shots for phase in shot["predicted"]]
    return {"predicted": max(predicted, default=0), "measured": max(measured, default=0)}


def _memory_by_phase(
    shots: Sequence[dict[str, Any]], expected: Mapping[str, float | None]
) -> list[dict[str, Any]]:
    """Per phase: predicted parts and peak, measured peak of the process, seconds expected and taken."""
    rows: dict[str, dict[str, Any]] = {}
    for shot in shots:
        for phase in shot["predicted"]:
            best = rows.setdefault(phase["name"], phase | {"measured": 0, "seconds": 0.0})
            if phase["total"] > best["total"]:
                best |= phase
    counted: set[tuple[Any, ...]] = set()
    for shot in shots:
        for phase in _phases_of_this_run(shot):
            entry = rows.setdefault(phase["name"], {"name": phase["name"], "measured": 0, "seconds": 0.0})
            entry["expected"] = expected.get(phase["name"])
            entry["measured"] = max(entry["measured"], phase["cuda"] or phase["rss"])
            # What served several shots stands in the manifests of all of them, word for word.
            once = (*phase.values(), shot["model"]["root"])
            serves = phase["name"] in ("encode", "load") or phase.get("shots", 1) > 1
            if once not in counted or not serves:
                entry["seconds"] += phase["seconds"]
            counted.add(once)
    return list(rows.values())
