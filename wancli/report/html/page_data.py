"""The JSON document of a page, made from entries. A value that several shots share is stored once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from wancli.injection.block_map import BlockMap
from wancli.models.config import WanConfig
from wancli.plan.areas import MaskReader
from wancli.report.batch_report import Report
from wancli.report.html import model_facts, rerun_job
from wancli.report.html.collect import ReportInputs, absolute_path
from wancli.report.html.injection_entries import injected_shares, injection_entry, rule_rows
from wancli.report.html.page_values import Pool, round_numbers
from wancli.report.shot_entry import ShotEntry
from wancli.report.shots_table import shot_row
from wancli.storage import disk
from wancli.storage.injection_schema import EffectRecord

SCHEMA = "wancli/page/1"
MAX_CELLS = 150_000  # measured effects of blocks; beyond them a page has only their means over the steps
_SHOT_KEYS = (
    "width", "height", "frames", "tokens", "seed", "noise", "solver", "steps", "shift", "guidance", "stages",
    "fps", "crf", "codec", "decode_chunk", "sharing", "cache",
)  # fmt: skip


POOLS = (
    "models",
    "schedules",
    "prompts",
    "rules",
    "rule_rows",
    "shares",
    "differences",
    "predictions",
    "versions",
    "phases",
    "pictures",
)

SCORES = {"ssim": "SSIM", "psnr": "PSNR dB", "latent_distance": "latent", "motion": "motion"}


def page_document(
    inputs: ReportInputs,
    page: Path,
    posters: Mapping[int, str],
    pictures: Mapping[int, Sequence[Mapping[str, Any]]] | None = None,
    maps: Mapping[int, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Build the document of a page at `page`. `posters` are data URIs, `pictures` the entries of given
    pictures and `maps` those of attention maps, by the number of an entry."""
    pools, masks = {name: Pool() for name in POOLS}, MaskReader()
    records = [entry.record for _, entry in inputs.entries if entry.record]
    cells = sum(len(effect.blocks) for record in records for effect in record.effects)
    shots = [
        _shot_entry(entry, job, pools, masks, page, whole=cells <= MAX_CELLS)
        | {"poster": posters.get(index)}
        | {"attention": (maps or {}).get(index)}
        | {"pictures": [pools["pictures"].put(one) for one in (pictures or {}).get(index, ())]}
        for index, (job, entry) in enumerate(inputs.entries)
    ]
    for shot, (_, entry) in zip(shots, inputs.entries, strict=True):
        shot["score"] = score = _comparison(inputs, entry)
        shot["row"] |= {key: score[key] for key in SCORES if score and score.get(key) is not None}
    models = [_model_entry(model) for model in pools.pop("models").values]
    return {
        "schema": SCHEMA,
        "rendered": True,
        "name": inputs.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "shots": shots,
        "models": models,
        **{name: pool.values for name, pool in pools.items()},
        "attention": bool(maps),
        "maps": [entry for found in inputs.maps for entry in _map_entries(found)],
        "comparisons": [
            {"name": file.name, "href": _relative_url(file, page)} for file in inputs.comparison_files
        ],
        "jobs": [_job_entry(report) for report in inputs.reports],
        "problems": inputs.problems,
        "claims": _read_claims(),
        "chosen": next((i for i, (_, entry) in enumerate(inputs.entries) if _injects(entry)), 0),
    }


def models_document(
    models: Sequence[Mapping[str, Any]], variants: Mapping[str, Any], chosen: int
) -> dict[str, Any]:
    """Build the document of a page without renders: the same sections, with one example shot per model."""
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
        "attention": False,
        "maps": [],
        "jobs": [],
        "problems": [],
        "claims": _read_claims(),
        "chosen": chosen,
    }


def _injects(entry: ShotEntry) -> bool:
    rules = entry.record.injection if entry.record else []
    return any(strength for rule in rules for strength in rule.blocks.values())


def _comparison(inputs: ReportInputs, entry: ShotEntry) -> Any:
    return round_numbers(inputs.comparisons.get(absolute_path(Path(entry.output))))


def _map_entries(found: BlockMap) -> list[dict[str, Any]]:
    """Describe a map for a page, each branch of it as a map of its own."""
    shared = _omit(found.as_dict(), "prompts", "image")
    return [
        round_numbers(
            shared
            | branch.model_dump()
            | {"attended": attended, "prompts": [{"main": branch.main, "injected": branch.injected}]}
        )
        for attended, branch in found.branches.items()
    ]


def _read_claims() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        disk.read_bytes(Path(__file__).parent / "assets" / "claims.json")
    )
    return found


def _model_entry(model: Mapping[str, Any]) -> dict[str, Any]:
    wan = model_facts.config_of(WanConfig, model["sizes"])
    kept = {key: model[key] for key in model if key not in ("networks", "sizes", "files")}
    networks = model.get("networks")
    return kept | {
        "sizes": model["sizes"],
        "calculator": _calculator(model["sizes"], networks, model["device"]) if networks else None,
        "parts": model_facts.block_parts(wan),
        "ends": model_facts.input_output_parts(wan),
    }


def _calculator(sizes: Mapping[str, Any], networks: Mapping[str, Any], device: str) -> dict[str, Any] | None:
    """Return the coefficients of the memory calculator; None for a model that this version does not know."""
    try:
        return model_facts.calculator_coefficients(sizes, networks, device)
    except ValueError:
        return None


def _relative_url(file: Path, page: Path) -> str:
    return quote(os.path.relpath(file, page.parent), safe="/", errors="surrogateescape")


def _job_entry(report: Report) -> dict[str, Any]:
    kept = ("created", "warnings", "memory", "first_step_after", "process", "peak", "cache")
    return {"job": report.job} | {key: report.totals[key] for key in kept if key in report.totals}


def _shot_entry(
    entry: ShotEntry, job: str, pools: Mapping[str, Pool], masks: MaskReader, page: Path, *, whole: bool
) -> dict[str, Any]:
    output, record = Path(entry.output), entry.record
    page_entry: dict[str, Any] = {
        "id": entry.id,
        "job": job,
        "status": entry.status,
        "labels": entry.labels,
        "error": entry.error,
        "output": str(output),
        "row": {key: value for key, value in shot_row(entry, job).items() if value is not None},
    }
    if record is None:
        return page_entry
    if entry.status != "video gone":
        page_entry["video"] = _relative_url(output, page)
    shot = record.shot.as_dict()
    prompts = [prompt.as_dict() for prompt in record.prompts]
    return page_entry | {
        **{key: shot[key] for key in _SHOT_KEYS if key in shot},
        "schedule": pools["schedules"].put({key: shot[key] for key in ("sigmas", "timesteps")}),
        "model": pools["models"].put(record.model.as_dict()),
        "prompts": [pools["prompts"].put(_omit(prompt, "cached")) for prompt in prompts],
        "timeline": record.timeline and record.timeline.as_dict(),
        "cached": [prompt.cached for prompt in record.prompts],
        "negative": record.negative is not None,
        "injection": [injection_entry(rule, record.shot, pools, masks) for rule in record.injection],
        "rule_rows": pools["rule_rows"].put(rule_rows(record)),
        "shares": pools["shares"].put(injected_shares(record)) if record.injection else None,
        "effects": _effects_entry(record.effects, whole=whole),
        "predicted": pools["predictions"].put([phase.as_dict() for phase in record.predicted]),
        "versions": pools["versions"].put(record.versions),
        "phases": pools["phases"].put([phase.as_dict() for phase in record.phases]),
        "encoder_loaded": record.encoder_loaded,
        "first_step_after": record.first_step_after,
        "loras": [lora.as_dict() for lora in record.loras],
        "files": [file.as_dict() for file in record.files],
        "key": record.key,
        "again": rerun_job.rerun_command(record, str(output)),
    }


def _effects_entry(effects: Sequence[EffectRecord], *, whole: bool) -> dict[str, Any] | None:
    """Return the measured changes: of the velocity per forward, and of each block in the mean; if `whole`,
    also of each block per forward."""
    if not effects:
        return None
    blocks = sorted({block for effect in effects for block in effect.blocks})
    legacy = [[e.changed_percent[b] for e in effects if b in e.changed_percent] for b in blocks]
    series: dict[str, Any] = {
        "steps": [effect.step for effect in effects],
        "branches": [effect.branch for effect in effects],
        "velocity": [_round_significant(effect.velocity) for effect in effects],
        "blocks": blocks,
        "mean": [_mean([e.blocks[b] for e in effects if b in e.blocks]) for b in blocks],
        "legacy": [_mean(values) for values in legacy],
    }
    if whole:
        series["values"] = [
            [_round_significant(e.blocks[b]) if b in e.blocks else None for b in blocks] for e in effects
        ]
    return series


def _mean(values: Sequence[float]) -> float:
    return _round_significant(sum(values) / len(values))


def _round_significant(value: float) -> float:
    return float(f"{value:.3g}")


def _omit(value: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: inner for key, inner in value.items() if key not in keys}
