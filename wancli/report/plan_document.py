"""`wancli plan --json`, and the figures of a plan that its tables show, too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from wancli.engine import attention_stage, picture_stage, preflight
from wancli.errors import EntryError, Unreadable
from wancli.injection.area import count_tokens
from wancli.plan import alternatives, memory_estimate, throughput
from wancli.plan.picture_entries import entry_values
from wancli.plan.pictures import InjectedPicture, PictureFile
from wancli.storage import cache
from wancli.text.embedding import read_tokens

if TYPE_CHECKING:
    from wancli.injection.table import Rule
    from wancli.injection.tuning import EmphasisRule, SteerRule
    from wancli.plan.model_spec import ModelSpec
    from wancli.plan.render_plan import Plan
    from wancli.plan.shot import Prompt, Shot
    from wancli.plan.throughput import Rate
    from wancli.storage.cache import Entry, Store
    from wancli.text.tokenizer import Tokens


def plan_document(
    plan: Plan, outputs: Sequence[OutputState], store: Store, rates: Sequence[Rate] = ()
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
                "state": found.state,
                "why": found.why,
                "size": [shot.width, shot.height],
                "frames": shot.frames,
                "tokens": shot.tokens,
                "seed": shot.seed,
                "timeline": _timeline_row(shot),
                "pictures": _picture_rows(shot),
                "solver": shot.solver,
                "timesteps": shot.sigma_schedule.timesteps,
                "sigmas": shot.sigma_schedule.sigmas,
                "shift": shot.shift,
                "guidance": shot.guidance,
                "stages": [stage.as_dict() for stage in shot.stages],
                **({"cache": shot.cache.as_dict()} if shot.cache else {}),
                "sharing": plan.schedule.placement(shot).batch_size,
                "fork": _fork_row(plan, shot),
                "inject": [
                    _rule_row(rule, shot) | {"cells": len(cells), "picture": _injected_row(other)}
                    for rule, cells, other in zip(shot.rules, shot.planned_cells, shot.injected)
                ],
                "emphasis": [_rule_row(rule, shot) for rule in shot.emphasis],
                "steer": [_rule_row(rule, shot) for rule in shot.steering],
                "loras": [
                    {"path": str(use.path), **use.pixel_settings, "coverage": asdict(use.coverage)}
                    for use in shot.loras
                ],
                "attention": shot.attention and attention_stage.describe_spec(shot.attention),
            }
            for shot, found in zip(plan.shots, outputs, strict=True)
        ],
        "steps": count_steps(plan),
        "prompts": prompt_rows(plan.shots, store),
        "memory": memory_rows(plan),
        "models": [
            {
                "root": str(model.checkpoint.root),
                "variant": model.checkpoint.variant.name,
                "variant_reason": model.checkpoint.variant_reason,
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
            shots_to_render(plan.shots, outputs), store, rates, plan.schedule.shared_steps()
        ),
    }


def _picture_rows(shot: Shot) -> list[dict[str, Any]]:
    """Return for each given frame its picture, or the shot whose frame it is, and how it is fitted."""
    rows = []
    for role, frame in zip(("first", "last"), shot.pictures.frames if shot.pictures else ()):
        source = frame.source
        origin: dict[str, Any] = (
            {
                "path": str(source.path),
                "orient": source.orient,
                "alpha": source.alpha,
                "sha256": source.facts.sha256,
            }
            if isinstance(source, PictureFile)
            else {"shot": source.id, "frame": source.frame, "sha256": source.pixels_key}
        )
        how = {"preprocess": frame.how.method, "fit": frame.how.fit}
        rows.append({"role": role, **origin, "size": list(source.size), **how})
    return rows


def _timeline_row(shot: Shot) -> dict[str, Any] | None:
    """Return the segments of a prompt that changes over the frames, each with its weight by latent frame."""
    if shot.timeline is None:
        return None
    row = asdict(shot.timeline)
    for segment, weights in zip(row["segments"], shot.timeline.frame_weights()):
        segment["weights"] = weights
    return row


def _rule_row(rule: Rule | EmphasisRule | SteerRule, shot: Shot) -> dict[str, Any]:
    row = asdict(replace(rule, area=None))
    if rule.area:
        row["area"] = rule.area.pixel_settings | {"tokens": count_tokens(rule.area, shot.token_grid)}
    return row


def _injected_row(other: Prompt | InjectedPicture) -> dict[str, Any] | None:
    """Return the picture that a rule injects, None for a prompt."""
    if not isinstance(other, InjectedPicture):
        return None
    source = other.source
    return {"path": str(source.path), "size": list(source.size), "sha256": source.pixels_key}


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


class OutputState(NamedTuple):
    """The state of an output: `done`, `to do`, `damaged` (rendered again), `in the way` (needs --force or
    another output), or `unreadable`; and the reason, if there is one."""

    state: str
    why: str = ""


def output_states(shots: Iterable[Shot]) -> list[OutputState]:
    """Return the state of each output. Reads every existing video."""
    return [_output_state(shot) for shot in shots]


def unreadable_outputs(shots: Sequence[Shot], outputs: Sequence[OutputState]) -> Iterator[str]:
    """Warn of the outputs that cannot be looked at."""
    paths = [shot.output for shot, found in zip(shots, outputs, strict=True) if found.state == "unreadable"]
    if paths:
        others = f" and {len(paths) - 1:,} more" if len(paths) > 1 else ""
        yield f"{paths[0]}{others} cannot be looked at; `wancli status` says why, and `render` would fail"


def _output_state(shot: Shot) -> OutputState:
    try:
        state, why = preflight.output_status(shot)
        if state == "done" and preflight.lacks_measurements(shot):
            return OutputState("to do", "its video is done, without the measurements that the job asks for")
        return OutputState(state, "" if state == "to do" else why)
    except Unreadable as error:
        return OutputState("unreadable", str(error))


def shots_to_render(shots: Sequence[Shot], outputs: Sequence[OutputState]) -> list[Shot]:
    """Return the shots that a render would make."""
    return [shot for shot, found in zip(shots, outputs, strict=True) if found.state in ("to do", "damaged")]


def prompt_rows(shots: Iterable[Shot], store: Store) -> list[dict[str, Any]]:
    """List every distinct prompt of the shots, and whether its embedding is cached."""
    texts = {prompt.id: prompt for shot in shots for prompt in shot.prompts}
    return [
        {
            "id": id,
            "text": prompt.tokens.text,
            "tokens": len(prompt.tokens.ids),
            "cached": prompt.file is not None or store.has(id),
        }
        for id, prompt in texts.items()
    ]


def cache_rows(store: Store) -> list[dict[str, Any]]:
    """Build the rows of `wancli cache ls`, the last used entry first."""
    rows = []
    for entry in sorted(store.entries(), key=lambda entry: entry.mtime, reverse=True):
        tokens, text = _describe_entry(entry)
        rows.append(
            {
                "key": entry.key,
                "bytes": entry.bytes,
                "used": datetime.fromtimestamp(entry.mtime, UTC).isoformat(timespec="seconds"),
                "tokens": len(tokens.ids) if tokens else None,
                "text": text,
            }
        )
    return rows


def _describe_entry(entry: Entry) -> tuple[Tokens | None, str]:
    """Return the tokens of an encoded prompt, and the text that names any entry."""
    try:  # not `store.get`, which marks the entry as used and sets a damaged one aside
        payload = cache.read_entry(entry.path, entry.key)
        if label := picture_stage.read_label(payload):
            return None, label
        tokens = read_tokens(payload)[0]
    except (Unreadable, EntryError):
        return None, "(damaged; a render computes it again)"
    return tokens, tokens.text


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

    `range` has the times at the fastest and at the slowest of the renders that are remembered. Also returns
    the rates that were used; `rough` if they are of much smaller or larger shots. `taken` has,
    by index, how many steps of a shot need not be taken any more."""
    texts = {text.id for shot in shots for text in shot.prompts if text.file is None}
    entries = {key for shot in shots for key in entry_values(shot)}
    missing = frozenset(id for id in texts | entries if not store.has(id))
    phases = throughput.predict_phase_seconds(shots, missing, rates, taken)
    parts = list(phases.values())
    sources = throughput.rates_used(shots, rates) if shots else {}
    bounds = []
    for fastest in (True, False):
        chosen = throughput.extreme_rates(rates, fastest=fastest)
        took = throughput.predict_phase_seconds(shots, missing, chosen, taken).values()
        bounds.append(None if None in took else sum(part for part in took if part is not None))
    return {
        "range": bounds,
        "seconds": None if None in parts else sum(part for part in parts if part is not None),
        "phases": phases,
        "rough": any(
            throughput.is_extrapolated(rate, max(shot.tokens for shot in shots)) for rate in sources.values()
        ),
        "rates": {name: asdict(rate) for name, rate in sources.items()},
    }
