"""What a manifest says: plain JSON data about one shot, enough to judge it and to render it again."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wancli import __version__
from wancli.plan import backends, memory_estimate
from wancli.plan.schedule import Placement
from wancli.plan.shot import Prompt, Shot
from wancli.resources.measure import PeakMemory
from wancli.storage.manifest import canonical_json
from wancli.video import ffmpeg
from wancli.weights.checkpoint import Location
from wancli.weights.single_files import SingleFiles

if TYPE_CHECKING:
    from wancli.weights.lora.patch import Loras

Record = dict[str, Any]

LIBRARIES = ("torch", "transformers", "safetensors", "sentencepiece", "ftfy")


def shot_record(shot: Shot, placement: Placement) -> Record:
    """All that was decided, and on what. `key` is the hash that makes it this very shot."""
    model = shot.model
    return {
        "key": shot.key,
        "latents_key": shot.latents_key,
        "shot": {
            "index": shot.index,
            "id": shot.id,
            "labels": shot.labels,
            "output": shot.output.name,
            "width": shot.width,
            "height": shot.height,
            "frames": shot.frames,
            "tokens": shot.tokens,
            "seed": shot.seed,
            "noise": shot.noise,
            "solver": shot.solver,
            "steps": shot.steps,
            "shift": shot.shift,
            "guidance": shot.guidance,
            "stages": [stage.as_dict() for stage in shot.stages],
            "timesteps": shot.sigma_schedule.timesteps,
            "sigmas": shot.sigma_schedule.sigmas,
            "fps": shot.fps,
            "crf": shot.crf,
            "codec": shot.codec,
            "decode_chunk": shot.decode_chunk,
            "sharing": placement.batch_size,
        },
        "model": {
            "root": str(model.checkpoint.root),
            "files": _checkpoint_files(model.checkpoint.source),
            "variant": model.checkpoint.variant.name,
            "sizes": asdict(model.checkpoint.transformer_config),
            "networks": memory_estimate.network_sizes(model),
            "dtype": model.dtype,
            "residency": model.residency,
            "text_encoder": model.encoder.residency,
            "chunk": model.kernels.chunk,
            "why": list(model.residency_reasons),
            "device": model.device,
            "kernels": asdict(model.kernels),
            "attention": backends.describe_attention(model),
            "sha256": {
                "transformer": model.transformer,
                "text_encoder": model.encoder.fingerprint,
                "vae": model.vae,
            },
        },
        "predicted": [
            asdict(phase) | {"total": phase.total, "peak": memory_estimate.process_bytes(model) + phase.total}
            for phase in memory_estimate.predict_phases(shot, placement.sample)
        ],
        "versions": versions(),
    }


def _checkpoint_files(source: Location) -> Record | None:
    """The files of a checkpoint that was named file by file, so that `wancli decode` finds them."""
    if isinstance(source, Path):
        return None
    return {key: str(v) if isinstance(v, Path) else v for key, v in asdict(source).items() if v is not None}


def checkpoint_location(model: Record) -> Location:
    """Where the checkpoint of a recorded shot is."""
    files = model.get("files")
    if not files:
        return Path(model["root"])
    paths = {key: Path(path) for key, path in files.items() if key != "heads"}
    return SingleFiles(**paths, heads=files.get("heads"))


def prompt_record(prompt: Prompt, hit: bool) -> Record:
    """A text as the encoder read it, and whether its embedding was already there."""
    tokens = prompt.tokens
    return {
        "id": prompt.id,
        "text": tokens.text,
        "tokens": len(tokens.ids),
        "pieces": list(tokens.pieces),
        "max_tokens": tokens.max_tokens,
        "truncated": tokens.truncated,
        "file": str(prompt.file) if prompt.file else None,
        "index": prompt.index,
        "cached": hit,
    }


def injection_records(
    shot: Shot, read: Iterable[tuple[int, str, int]], differences: Sequence[Record]
) -> list[Record]:
    """Per rule: what was planned, the cells that blocks really read, and how different its prompt is."""
    cells = set(read)
    records = []
    for index, (rule, planned) in enumerate(zip(shot.rules, shot.table.changed_cells)):
        hits = [cell for cell in planned if cell in cells]
        records.append(
            {
                "text": rule.text,
                "blocks": dict(rule.blocks),
                "steps": dict(rule.steps),
                "branches": list(rule.branches),
                "blend": rule.blend,
                "gain": rule.gain,
                "planned": len(planned),
                "hits": len(hits),
                "hits_by_step": dict(Counter(step for step, _, _ in hits)),
                "hits_by_branch": dict(Counter(branch for _, branch, _ in hits)),
                "hits_by_block": dict(Counter(block for _, _, block in hits)),
                "difference": differences[index],
            }
        )
    return records


def lora_records(shot: Shot, loaded: Loras) -> list[Record]:
    """Per LoRA: the file, where and when it was applied, and what of it the model took."""
    return [
        {
            "path": str(use.path),
            "bytes": use.path.stat().st_size,
            **use.pixel_settings,
            "coverage": asdict(lora.coverage),
            "scales": lora.scales,
        }
        for use, lora in zip(shot.loras, loaded.loras, strict=True)
    ]


def phase_record(name: str, peak: PeakMemory) -> Record:
    """What a phase took: seconds, and bytes of host memory at start and peak, of CUDA memory at peak."""
    return {
        "name": name,
        "seconds": round(peak.seconds, 4),
        "rss_start": peak.rss_start,
        "rss": peak.rss_peak,
        "cuda": peak.cuda_peak,
    }


def mark_earlier(phases: Iterable[Record]) -> list[Record]:
    """The phases of a run before this one, marked so that nobody takes them for this one's."""
    return [phase | {"earlier": True} for phase in phases]


def seconds_since(began: float | None) -> float:
    """Seconds since a moment, in seconds since 1970; None is when this process was started."""
    import psutil

    return round(time.time() - (began or float(psutil.Process().create_time())), 3)


def to_plain_json(record: Record) -> Record:
    """The record as a file gives it back: text keys, lists."""
    return dict(json.loads(canonical_json(record)))


@cache
def versions() -> dict[str, str]:
    """Everything that may change pixels without a change of the job."""
    libraries = {name: metadata.version(name) for name in LIBRARIES}
    return {
        "wancli": __version__,
        "python": platform.python_version(),
        **libraries,
        "ffmpeg": ffmpeg.read_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "platform": sys.platform,
    }
