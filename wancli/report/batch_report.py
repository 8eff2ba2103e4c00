"""Reports as data: the results of a batch, from the manifests of its shots, and the forecast of a plan."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wancli.engine import preflight
from wancli.engine.manifest_body import versions
from wancli.errors import EntryError
from wancli.plan import alternatives, memory_estimate, throughput
from wancli.report.shot_entry import ShotEntry
from wancli.storage import atomic, manifest, sidecars
from wancli.storage.cache import unseal
from wancli.text.embedding import read_tokens

if TYPE_CHECKING:
    from wancli.engine.outcome import Outcome
    from wancli.plan.shot import ModelSpec, Plan, Shot
    from wancli.plan.throughput import Rate
    from wancli.storage.cache import Store
    from wancli.storage.manifest_schema import Manifest, PhaseRecord

SCHEMA = "wancli/report/1"


@dataclass(frozen=True)
class Report:
    """The results of a batch. `totals` are the keys of the JSON that concern no single shot."""

    job: str
    shots: list[ShotEntry]
    totals: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return `{job}.report.json`."""
        own = ("created", "warnings")  # before the shots, as they always were
        head = {key: value for key, value in self.totals.items() if key in own}
        shots = [entry.as_dict() for entry in self.shots]
        return {"schema": SCHEMA, "job": self.job, **head, "shots": shots} | self.totals


def build_report(plan: Plan, outcomes: Sequence[Outcome], rates: Sequence[Rate] = ()) -> Report:
    """Build the report of all shots of a batch, and its totals. A shot that was never reached is
    `not started`. The expected times rest on `rates`, those from before the render."""
    by_index = {outcome.shot.index: outcome for outcome in outcomes}
    shots = [_shot_entry(shot, by_index.get(shot.index)) for shot in plan.shots]
    fresh = [entry.record for entry in shots if entry.status == "rendered" and entry.record]
    sampled = [record for record in fresh if not _resumed_from_latent(record)]
    prompts = {prompt.id: prompt for record in sampled for prompt in record.prompts}
    missing = frozenset(id for id, prompt in prompts.items() if not prompt.cached)
    rendered = [outcome.shot for outcome in outcomes if outcome.status == "rendered"]
    started = [record.first_step_after for record in sampled if record.first_step_after]
    shared = {outcome.shot.index: outcome.shared_steps for outcome in outcomes}
    expected = throughput.predict_phases(rendered, missing, rates, shared)
    totals = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "warnings": list(plan.warnings),
        "memory": _memory_by_phase(fresh, expected),
        "first_step_after": min(started, default=None),
        "process": max((_phases_of_this_run(record)[0].rss_start for record in fresh), default=0),
        "peak": _peak_memory(fresh),
        "cache": {
            "hits": sum(prompt.cached for prompt in prompts.values()),
            "misses": sum(not prompt.cached for prompt in prompts.values()),
            "encoder_loaded": any(record.encoder_loaded for record in sampled),
        },
        "versions": versions(),
    }
    return Report(plan.name, shots, totals)


def _phases_of_this_run(record: Manifest) -> list[PhaseRecord]:
    return [phase for phase in record.phases if not phase.earlier]


def _resumed_from_latent(record: Manifest) -> bool:
    """Return whether an earlier run left the latent, so that this one read no prompt and took no step."""
    return not any(phase.name == "encode" for phase in _phases_of_this_run(record))


def write_report(plan: Plan, report: Report) -> Path:
    """Write `{job}.report.json` into the folder that the outputs of the job share, or that of the first.

    An earlier report is replaced, except for the entries of shots that were not selected. Another program's
    file of that name is moved aside.
    """
    path = report_path(plan)
    earlier = read_report(path)
    if path.exists() and earlier is None:
        atomic.move_aside(path)
    if plan.unselected:
        selected = {entry.output: entry for entry in report.shots}
        known = {entry.output: entry for entry in (earlier.shots if earlier else [])}
        outputs = [(shot, str(shot.output)) for shot in plan.all_shots]
        shots = [selected.get(name) or _unselected_entry(shot, known.get(name)) for shot, name in outputs]
        report = replace(report, shots=shots)
    # Names of files that are not UTF-8 arrive as lone surrogates.
    text = json.dumps(report.as_dict(), ensure_ascii=False, indent=2) + "\n"
    atomic.replace(path, text.encode(errors="backslashreplace"))
    return path


def _unselected_entry(shot: Shot, entry: ShotEntry | None) -> ShotEntry:
    """Return the entry of a shot that was not selected: that of an earlier report if it is of the shot as it
    is now, else one from its manifest. Its video is not hashed."""
    if entry and entry.record and entry.record.key == shot.key:
        return entry
    with suppress(EntryError):
        record = manifest.read(shot.manifest)
        if record and record.key == shot.key and shot.output.exists():
            return replace(_shot_entry(shot, None), status="already done", record=record)
    return entry or _shot_entry(shot, None)


def report_path(plan: Plan) -> Path:
    """Return the path of a job's report."""
    return plan.sidecar_path("report.json")


def read_report(path: Path) -> Report | None:
    """Read a report. Returns None if there is none, or none that can be used."""
    document = sidecars.read_document(path, SCHEMA)
    if document is None:
        return None
    try:
        shots = [ShotEntry.parse(entry, path) for entry in document["shots"]]
        totals = {key: value for key, value in document.items() if key not in ("schema", "job", "shots")}
        return Report(document["job"], shots, totals)
    except (EntryError, KeyError, TypeError):
        return None


def plan_document(
    plan: Plan, states: Sequence[str], store: Store, rates: Sequence[Rate] = ()
) -> dict[str, Any]:
    """Build `wancli plan --json`."""
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
    """Return, for each model, the shot that needs most memory."""
    largest: dict[ModelSpec, tuple[int, Shot]] = {}
    for shot in plan.shots:
        peak = plan.schedule.peak(shot)
        if shot.model not in largest or peak > largest[shot.model][0]:
            largest[shot.model] = peak, shot
    return [shot for _, shot in largest.values()]


def output_states(shots: Iterable[Shot]) -> list[str]:
    """Return the state of each output: `done`, `to do`, `damaged` (rendered again), or `in the way` (needs
    --force or another output). Reads every existing video."""
    return [preflight.output_status(shot)[0] for shot in shots]


def shots_to_render(shots: Sequence[Shot], states: Sequence[str]) -> list[Shot]:
    """Return the shots that a render would make."""
    return [shot for shot, found in zip(shots, states, strict=True) if found in ("to do", "damaged")]


def prompt_rows(shots: Iterable[Shot], store: Store) -> list[dict[str, Any]]:
    """List every distinct prompt of the shots, and whether its embedding is cached."""
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
    """Build the rows of `wancli cache ls`, the last used entry first."""
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
    """Return, per phase, the prediction of the largest shot: `total` of the phase, `peak` of the process."""
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
    """Predict the seconds of each phase of these shots, and of all; None if no earlier render is like it.

    Also returns the rates that were used; `rough` if they are of much smaller or larger shots. `taken` has,
    by index, how many steps of a shot need not be taken any more."""
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


def _shot_entry(shot: Shot, outcome: Outcome | None) -> ShotEntry:
    error = outcome.error if outcome else None
    return ShotEntry(
        id=shot.id,
        labels=shot.labels,
        output=str(shot.output),
        status=outcome.status if outcome else "not started",
        error={"code": error.code, "message": str(error), "hint": error.hint} if error else None,
        record=outcome.record if outcome else None,
    )


def _peak_memory(records: Sequence[Manifest]) -> dict[str, int]:
    """Return the predicted and measured bytes of the whole process, on CUDA of the device."""
    measured = [phase.peak for record in records for phase in _phases_of_this_run(record)]
    predicted = [phase.peak for record in records for phase in record.predicted]
    return {"predicted": max(predicted, default=0), "measured": max(measured, default=0)}


def _memory_by_phase(
    records: Sequence[Manifest], expected: Mapping[str, float | None]
) -> list[dict[str, Any]]:
    """Return per phase: predicted parts and peak, measured peak, expected and measured seconds."""
    rows: dict[str, dict[str, Any]] = {}
    for predicted in (phase for record in records for phase in record.predicted):
        best = rows.setdefault(predicted.name, predicted.as_dict() | {"measured": 0, "seconds": 0.0})
        if predicted.total > best["total"]:
            best |= predicted.as_dict()
    counted: set[str] = set()  # a phase that served several shots is in the records of all of them
    for phase in (phase for record in records for phase in _phases_of_this_run(record)):
        row = rows.setdefault(phase.name, {"name": phase.name, "measured": 0, "seconds": 0.0})
        row["expected"] = expected.get(phase.name)
        row["measured"] = max(row["measured"], phase.peak)
        if phase.identity not in counted:
            row["seconds"] += phase.seconds
        counted.add(phase.identity)
    return list(rows.values())
