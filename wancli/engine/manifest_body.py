"""Builds the record of a shot: enough to judge the video and to render it again."""

from __future__ import annotations

import platform
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wancli import __version__
from wancli.injection.area import Area, count_tokens
from wancli.plan import backends, memory_estimate
from wancli.plan.keys import hash_settings
from wancli.plan.schedule import Placement
from wancli.plan.shot import Prompt, Shot
from wancli.resources.measure import PeakMemory
from wancli.storage import disk, manifest, records, tensor_file
from wancli.storage.manifest import canonical_json
from wancli.storage.manifest_schema import Manifest, ShotRecord
from wancli.storage.model_schema import ModelRecord
from wancli.video import ffmpeg
from wancli.weights.checkpoint import Location
from wancli.weights.single_files import SingleFiles

if TYPE_CHECKING:
    from torch import Tensor

    from wancli.weights.lora.patch import Loras

Record = dict[str, Any]

LIBRARIES = ("torch", "transformers", "safetensors", "sentencepiece", "ftfy")


def build_record(
    shot: Shot,
    placement: Placement,
    *,
    cached: Mapping[str, bool],
    pictures: Sequence[Record],
    injected_pictures: Mapping[str, Record],
    reads: Iterable[tuple[int, str, int]],
    differences: Sequence[Record],
    effects: Sequence[Record],
    loras: Loras,
    phases: Sequence[Record],
    first_step_after: float,
    latent: Record,
    attention: Record | None,
) -> ShotRecord:
    """Build the record of a sampled shot from its plan and from what happened.

    `cached` tells, by id, which prompts' embeddings had been computed before. `pictures` are the records of
    its given frames, `injected_pictures` by id those of the others. `reads` are the cells (step, branch,
    block) that blocks read, `differences` those between the shot's prompt and each injected one, `latent` is
    its sketch, `attention` describes its attention maps.
    """
    return ShotRecord(
        **_planned(shot, placement),
        prompts=[_prompt_record(prompt, cached[prompt.id]) for prompt in shot.prompts],
        timeline=shot.timeline and asdict(shot.timeline),
        encoder_loaded=not all(cached.values()),
        pictures=[*pictures],
        injection=_rule_records(shot, reads, differences, injected_pictures),
        **({"emphasis": _emphasis_records(shot, reads)} if shot.emphasis else {}),
        **({"steer": _steer_records(shot, reads)} if shot.steering else {}),
        loras=_lora_records(shot, loras),
        effects=list(effects),
        first_step_after=first_step_after,
        phases=list(phases),
        latent=latent,
        **({} if attention is None else {"attention": attention}),
    )


def continue_record(record: ShotRecord, shot: Shot, placement: Placement) -> ShotRecord:
    """Return the record of a latent that an earlier run left, with the settings that its video has now.

    Raises EntryError if what the record says of sampling is not of this shot.
    """
    now = ShotRecord.parse(record.as_dict() | to_plain_json(_planned(shot, placement)), shot.latents)
    ran = now.model.model_copy(update={"attention": record.model.attention})  # what ran then
    earlier = [phase.model_copy(update={"earlier": True}) for phase in record.phases]
    return now.model_copy(update={"model": ran, "phases": earlier})


def with_video_settings(record: ShotRecord, video: Mapping[str, Any]) -> ShotRecord:
    """Return the record of a latent with other values of `fps`, `crf` or `codec`, and the key that they
    make, as in `Shot.key`."""
    shot = record.shot.model_copy(update=dict(video))
    settings = [record.model.sha256.vae, shot.decode_chunk, shot.fps, shot.crf, shot.codec]
    key = hash_settings([record.latents_key, *settings])
    return record.model_copy(update={"shot": shot, "key": key})


def complete_record(
    record: ShotRecord, output: Path, peak: PeakMemory, *, device: str, chunk: int, fallback: bool
) -> Manifest:
    """Complete the record of a latent with how it was decoded into `output`."""
    return Manifest(
        **record.as_dict()
        | {
            "phases": [*(phase.as_dict() for phase in record.phases), phase_record("decode", peak)],
            "decoded": {"device": device, "chunk": chunk, "fallback": fallback},
            "files": [manifest.file_record(output, output.parent)],
        }
    )


def load_latent(path: Path, wanted: tuple[int, ...] | None = None) -> tuple[Tensor, ShotRecord]:
    """Read a finished latent and its record. Raises EntryError if either is damaged or of another version.

    With a `wanted` shape a latent of another one is damage, too, and its tensor is not read.
    """
    z_CTYX, facts = tensor_file.load_latent(path, wanted)
    return z_CTYX, _latent_record(facts, z_CTYX.shape, path)


def verify_latent(path: Path, wanted: tuple[int, ...] | None = None) -> ShotRecord:
    """Verify a finished latent and return its record. Raises EntryError as `load_latent`. Needs no torch."""
    shape, facts = tensor_file.verify_latent(path, wanted)
    return _latent_record(facts, shape, path)


def _latent_record(facts: Record, shape: Sequence[int], path: Path) -> ShotRecord:
    record = ShotRecord.parse(facts, path)
    shot, (_, t, y, x) = record.shot, shape
    if t != (shot.frames - 1) // 4 + 1 or (shot.height, shot.width) not in ((8 * y, 8 * x), (16 * y, 16 * x)):
        raise ShotRecord.KIND.damaged(path, f"a latent of {[*shape]} is not of its frames and size")
    return record


def _planned(shot: Shot, placement: Placement) -> Record:
    """Return the part of a record that the plan decides. `key` is the hash of the shot."""
    model = shot.model
    return {
        "key": shot.key,
        "latents_key": shot.latents_key,
        **describe_shot(shot, placement.batch_size),
        "predicted": [
            asdict(phase) | {"total": phase.total, "peak": memory_estimate.process_bytes(model) + phase.total}
            for phase in memory_estimate.predict_phases(shot, placement.sample, placement.pictures)
        ],
        "versions": versions(),
    }


def describe_shot(shot: Shot, sharing: int = 1) -> Record:
    """Return the settings of a shot, and the model, as records have them."""
    model = shot.model
    return {
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
            "boundary": shot.boundary,
            "stages": [stage.as_dict() for stage in shot.stages],
            "timesteps": shot.sigma_schedule.timesteps,
            "sigmas": shot.sigma_schedule.sigmas,
            "fps": shot.fps,
            "crf": shot.crf,
            "codec": shot.codec,
            "decode_chunk": shot.decode_chunk,
            "sharing": sharing,
            **({"cache": shot.cache.as_dict()} if shot.cache else {}),
        },
        "model": {
            "root": str(model.checkpoint.root),
            "files": _checkpoint_files(model.checkpoint.source),
            "variant": model.checkpoint.variant.name,
            "sizes": _omit_none(
                asdict(model.checkpoint.transformer_config)
            ),  # earlier versions know no others
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
    }


def _checkpoint_files(source: Location) -> Record | None:
    """Return the files of a checkpoint that was named file by file, so that `wancli decode` finds them."""
    if isinstance(source, Path):
        return None
    return {key: str(v) if isinstance(v, Path) else v for key, v in _omit_none(asdict(source)).items()}


def _omit_none(values: Record) -> Record:
    return {key: value for key, value in values.items() if value is not None}


def checkpoint_location(model: ModelRecord) -> Location:
    """Return where the checkpoint of a recorded shot is."""
    if not model.files:
        return Path(model.root)
    named = model.files.as_dict().items()
    paths = {key: Path(path) for key, path in named if isinstance(path, str) and key != "variant"}
    return SingleFiles(**paths, heads=model.files.heads, variant=model.files.variant)


def _prompt_record(prompt: Prompt, hit: bool) -> Record:
    """Describe a text as the encoder read it, and whether its embedding was cached."""
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


def _rule_records(
    shot: Shot,
    reads: Iterable[tuple[int, str, int]],
    differences: Sequence[Record],
    pictures: Mapping[str, Record],
) -> list[Record]:
    """Describe each rule: the planned cells, the cells that blocks read, and the distance of its prompt, or
    its picture.
    """
    cells = set(reads)
    described = []
    of_prompts = iter(differences)
    for rule, planned in zip(shot.rules, shot.planned_cells):
        hits = [cell for cell in planned if cell in cells]
        described.append(
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
                **({"picture": pictures[rule.text]} if rule.image else {"difference": next(of_prompts)}),
                **({"area": _area_record(rule.area, shot)} if rule.area else {}),
                **({"words": rule.words, "rows": list(rule.rows)} if rule.rows else {}),
                **({"nag": dict(zip(("scale", "alpha", "tau"), rule.nag))} if rule.nag else {}),
            }
        )
    return described


def _emphasis_records(shot: Shot, reads: Iterable[tuple[int, str, int]]) -> list[Record]:
    """Describe the words that count more or less: the planned cells, and those that blocks read."""
    cells = set(reads)
    return [
        {
            "words": rule.words,
            "rows": list(rule.rows),
            "weight": rule.weight,
            "blocks": [block for block, _ in rule.blocks],
            "steps": [step for step, _ in rule.steps],
            "planned": len(planned),
            "hits": sum(cell in cells for cell in planned),
            **({"area": _area_record(rule.area, shot)} if rule.area else {}),
        }
        for rule, planned in zip(shot.emphasis, shot.planned_cells[len(shot.rules) :])
    ]


def _steer_records(shot: Shot, reads: Iterable[tuple[int, str, int]]) -> list[Record]:
    """Describe the steering vectors: the planned cells, and those that blocks read."""
    cells = set(reads)
    return [
        {
            "toward": list(rule.toward),
            "away": list(rule.away),
            "blocks": dict(rule.blocks),
            "steps": dict(rule.steps),
            "planned": len(planned),
            "hits": sum(cell in cells for cell in planned),
            **({"area": _area_record(rule.area, shot)} if rule.area else {}),
        }
        for rule, planned in zip(shot.steering, shot.planned_cells[len(shot.rules) + len(shot.emphasis) :])
    ]


def _area_record(area: Area, shot: Shot) -> Record:
    """Describe where a rule acts, and how many tokens that is."""
    mask = {"mask": {"path": str(area.mask.path), "sha256": area.mask.sha256}} if area.mask else {}
    return area.pixel_settings | mask | {"tokens": count_tokens(area, shot.token_grid)}


def _lora_records(shot: Shot, loaded: Loras) -> list[Record]:
    """Describe each LoRA: the file, where and when it was applied, and its coverage of the model."""
    return [
        {
            "path": str(use.path),
            "bytes": disk.size(use.path),
            **use.pixel_settings,
            "coverage": asdict(lora.coverage),
            "scales": lora.scales,
        }
        for use, lora in zip(shot.loras, loaded.loras, strict=True)
    ]


def phase_record(name: str, peak: PeakMemory) -> Record:
    """Record the seconds and the CPU threads of a phase, and the bytes of host memory at start and peak, of
    CUDA memory at peak.

    The id is that of the measurement: all records of a shared phase have the same one."""
    import torch

    return {
        "id": peak.id,
        "name": name,
        "threads": torch.get_num_threads(),
        "seconds": round(peak.seconds, 4),
        "rss_start": peak.rss_start,
        "rss": peak.rss_peak,
        "cuda": peak.cuda_peak,
    }


def mark_earlier(phases: Iterable[Record]) -> list[Record]:
    """Mark phases as those of a run before this one."""
    return [phase | {"earlier": True} for phase in phases]


def new_phases(phases: Iterable[Record], known: Sequence[Record]) -> list[Record]:
    """Return the phases that are not among the `known` ones."""
    ids = {phase.get("id") for phase in known}
    return [phase for phase in phases if phase["id"] not in ids]


def seconds_since(began: float | None) -> float:
    """Return the seconds since a time (in seconds since 1970), or since this process started."""
    import psutil

    return round(time.time() - (began or float(psutil.Process().create_time())), 3)


def to_plain_json(record: Record) -> Record:
    """Convert a record to what a file gives back: text keys, lists."""
    return dict(records.parse_json(canonical_json(record)))


@cache
def versions() -> dict[str, str]:
    """Return the versions of everything that may change pixels without a change of the job."""
    libraries = {name: metadata.version(name) for name in LIBRARIES}
    return {
        "wancli": __version__,
        "python": platform.python_version(),
        **libraries,
        "ffmpeg": ffmpeg.read_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "platform": sys.platform,
    }
