"""Entries to the one JSON document that a page carries. What shots share stands in it once, by its place."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from wancli.injection.table import Rule, Table, injected_share_by_block
from wancli.models.config import WanConfig
from wancli.report.html import model_facts, rerun_job
from wancli.report.html.collect import Entry, ReportInputs, absolute_path
from wancli.report.shots_table import shot_row

SCHEMA = "wancli/page/1"
MAX_CELLS = 150_000  # measured effects of blocks; beyond them a page has only their means over the steps
_SHOT_KEYS = (
    "width", "height", "frames", "tokens", "seed", "noise", "solver", "steps", "shift", "guidance", "stages",
    "fps", "crf", "codec", "decode_chunk", "sharing",
)  # fmt: skip


class _Pool:
    """Values in the order in which they first came; the same value has one place."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._places: dict[str, int] = {}

    def put(self, value: Any) -> int:
        """Where the value stands."""
        place = self._places.setdefault(json.dumps(value, sort_keys=True), len(self.values))
        if place == len(self.values):
            self.values.append(value)
        return place


POOLS = (
    "models",
    "schedules",
    "prompts",
    "rules",
    "shares",
    "differences",
    "predictions",
    "versions",
    "phases",
)


def page_document(inputs: ReportInputs, page: Path, posters: Mapping[int, str]) -> dict[str, Any]:
    """The document of a page at `page`; `posters` are data URIs by the number of an entry."""
    pools = {name: _Pool() for name in POOLS}
    cells = sum(len(effect["blocks"]) for _, entry in inputs.entries for effect in entry.get("effects", []))
    shots = [
        _shot_entry(entry, job, pools, page, whole=cells <= MAX_CELLS)
        | {
            "poster": posters.get(index),
            "score": _round_numbers(inputs.comparisons.get(absolute_path(Path(entry["output"])))),
        }
        for index, (job, entry) in enumerate(inputs.entries)
    ]
    models = [_model_entry(model) for model in pools.pop("models").values]
    return {
        "schema": SCHEMA,
        "rendered": True,
        "name": inputs.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "shots": shots,
        "models": models,
        **{name: pool.values for name, pool in pools.items()},
        "maps": [_round_numbers(one.as_dict()) for one in inputs.maps],
        "jobs": [_job_entry(report) for report in inputs.reports],
        "problems": inputs.problems,
        "claims": _read_claims(),
        "chosen": next((i for i, (_, entry) in enumerate(inputs.entries) if _injects(entry)), 0),
    }


def models_document(
    models: Sequence[Mapping[str, Any]], variants: Mapping[str, Any], chosen: int
) -> dict[str, Any]:
    """The document of a page without renders: the same sections, of shots that nobody rendered."""
    shots = []
    for index, model in enumerate(models):
        variant = variants[model["variant"]]
        t, y, x = (
            (variant.frames - 1) // 4 + 1,
            *(s // variant.stride for s in (variant.height, variant.width)),
        )
        shots.append({
            "id": model["variant"], "status": "not rendered", "model": index, "labels": {}, "decode_chunk": 1,
            "width": variant.width, "height": variant.height, "frames": variant.frames, "tokens": t * y * x,
            "steps": variant.steps, "shift": variant.shift, "guidance": variant.guidance, "fps": variant.fps,
        })  # fmt: skip
    empty: dict[str, Any] = {name: [] for name in POOLS if name != "models"}
    return {
        "schema": SCHEMA,
        "rendered": False,
        "name": "wancli explore",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "shots": shots,
        "models": [_model_entry(model) for model in models],
        **empty,
        "maps": [],
        "jobs": [],
        "problems": [],
        "claims": _read_claims(),
        "chosen": chosen,
    }


def _injects(entry: Entry) -> bool:
    return any(strength for rule in entry.get("injection", []) for strength in rule["blocks"].values())


def _read_claims() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((Path(__file__).parent / "assets" / "claims.json").read_bytes())
    return found


def _model_entry(model: Mapping[str, Any]) -> dict[str, Any]:
    wan = WanConfig(**model["sizes"])
    kept = {key: model[key] for key in model if key not in ("networks", "sizes", "files")}
    networks = model.get("networks")
    return kept | {
        "sizes": model["sizes"],
        "calculator": model_facts.calculator_coefficients(model["sizes"], networks, model["device"])
        if networks
        else None,
        "parts": model_facts.block_parts(wan),
        "ends": model_facts.input_output_parts(wan),
    }


def _job_entry(report: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("job", "created", "warnings", "memory", "first_step_after", "process", "peak", "cache")
    return {key: report[key] for key in kept if key in report}


def _shot_entry(
    entry: Entry, job: str, pools: Mapping[str, _Pool], page: Path, *, whole: bool
) -> dict[str, Any]:
    output = Path(entry["output"])
    page_entry: dict[str, Any] = {
        "id": entry["id"],
        "job": job,
        "status": entry["status"],
        "labels": entry["labels"],
        "error": entry.get("error"),
        "output": str(output),
        "row": {key: value for key, value in shot_row(entry, job).items() if value is not None},
    }
    if "shot" not in entry:
        return page_entry
    if entry["status"] != "video gone":
        page_entry["video"] = quote(os.path.relpath(output, page.parent), safe="/", errors="surrogateescape")
    shot = entry["shot"]
    page_entry |= {key: shot[key] for key in _SHOT_KEYS}
    page_entry["schedule"] = pools["schedules"].put(
        {"sigmas": shot["sigmas"], "timesteps": shot["timesteps"]}
    )
    page_entry["model"] = pools["models"].put(entry["model"])
    page_entry["prompts"] = [pools["prompts"].put(_omit(prompt, "cached")) for prompt in entry["prompts"]]
    page_entry["cached"] = [prompt["cached"] for prompt in entry["prompts"]]
    page_entry["negative"] = len(entry["prompts"]) > 1 + len(entry["injection"])
    page_entry["injection"] = [_injection_entry(rule, pools) for rule in entry["injection"]]
    page_entry["shares"] = pools["shares"].put(injected_shares(entry)) if entry["injection"] else None
    page_entry["effects"] = _effects_entry(entry["effects"], whole=whole)
    page_entry["predicted"] = pools["predictions"].put(entry["predicted"])
    page_entry["versions"] = pools["versions"].put(entry["versions"])
    page_entry["phases"] = pools["phases"].put(entry["phases"])
    page_entry["encoder_loaded"], page_entry["first_step_after"] = (
        entry["encoder_loaded"],
        entry["first_step_after"],
    )
    page_entry["loras"], page_entry["files"] = entry["loras"], entry["files"]
    page_entry["key"] = entry["key"]
    page_entry["again"] = rerun_job.rerun_command(rerun_job.build_job(entry, str(output)))
    return page_entry


def _injection_entry(rule: Mapping[str, Any], pools: Mapping[str, _Pool]) -> dict[str, Any]:
    own = ("text", "hits", "planned", "hits_by_branch")
    shared = ("blocks", "steps", "branches", "blend", "gain", "hits_by_block", "hits_by_step")
    return {key: rule[key] for key in own} | {
        "rule": pools["rules"].put({key: rule[key] for key in shared}),
        "difference": pools["differences"].put(_round_numbers(rule["difference"], 5)),
    }


def injected_shares(entry: Entry) -> list[dict[str, Any]]:
    """How much of what each block reads was injected, in [0, 1], as `wancli plan -v` shows it: for each
    branch the steps that have the same, and the share of each block."""
    shot, prompts = entry["shot"], entry["prompts"]
    rules = [
        Rule(
            rule["text"],
            tuple((int(block), strength) for block, strength in rule["blocks"].items()),
            tuple((int(step), factor) for step, factor in rule["steps"].items()),
            tuple(rule["branches"]),
            rule["blend"],
            rule["gain"],
        )
        for rule in entry["injection"]
    ]
    negative = len(prompts) > 1 + len(rules)
    base = {"cond": prompts[0]["id"]} | ({"uncond": prompts[1]["id"]} if negative else {})
    unguided = [
        step
        for stage in shot["stages"]
        if stage["guidance"] == 1
        for step in range(stage["steps"][0], stage["steps"][1] + 1)
    ]
    table = Table(rules, base, entry["model"]["sizes"]["num_layers"], shot["steps"], unguided)  # type: ignore[arg-type]
    return [
        {
            "branch": branch,
            "steps": steps,
            "blocks": [round(cell, 4) for cell in injected_share_by_block(row, table.base[branch])],
        }
        for branch in table.branches
        for row, steps in table.distinct_rows(branch).items()
    ]


def _effects_entry(effects: Sequence[Mapping[str, Any]], *, whole: bool) -> dict[str, Any] | None:
    """Measured changes: of the velocity per forward, of each block per forward (or, where that would be too
    much, not) and in the mean."""
    if not effects:
        return None
    blocks = sorted({int(block) for effect in effects for block in effect["blocks"]})
    series: dict[str, Any] = {
        "steps": [effect["step"] for effect in effects],
        "branches": [effect["branch"] for effect in effects],
        "velocity": [_round_significant(effect["velocity"]) for effect in effects],
        "blocks": blocks,
        "mean": [_mean([e["blocks"][str(b)] for e in effects if str(b) in e["blocks"]]) for b in blocks],
        "legacy": [
            _mean([e["changed_percent"][str(b)] for e in effects if str(b) in e["changed_percent"]])
            for b in blocks
        ],
    }
    if whole:
        series["values"] = [
            [_round_significant(e["blocks"][str(b)]) if str(b) in e["blocks"] else None for b in blocks]
            for e in effects
        ]
    return series


def _mean(values: Sequence[float]) -> float:
    return _round_significant(sum(values) / len(values))


def _round_significant(value: float) -> float:
    return float(f"{value:.3g}")


def _round_numbers(value: Any, digits: int = 4) -> Any:
    """The same with numbers to so many significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {key: _round_numbers(inner, digits) for key, inner in value.items()}
    return [_round_numbers(inner, digits) for inner in value] if isinstance(value, list | tuple) else value


def _omit(value: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: inner for key, inner in value.items() if key not in keys}
