"""The job that renders a recorded shot again: every setting, spelled out."""

from __future__ import annotations

import json
from typing import Any

from wancli.pictures.sizes import official_area
from wancli.storage.attention_schema import AttentionRecord
from wancli.storage.injection_schema import AreaRecord, EmphasisRecord, LoraRecord, RuleRecord, SteerRecord
from wancli.storage.manifest_schema import CacheRecord, ShotRecord, ShotSettings
from wancli.storage.prompt_schema import InjectedPictureRecord, PromptRecord, TimelineRecord

Job = dict[str, Any]
_OF_LINK = "the same pixels, under another key"


def rerun_command(record: ShotRecord, output: str) -> str:
    """Write the command for a shell; the job is JSON, which is YAML too."""
    job = json.dumps(build_job(record, output), indent=1, ensure_ascii=False)
    links = [picture.link for picture in record.pictures if picture.link]
    note = (
        f"# begins with a frame of shot {json.dumps(links[0].shot)} as a file: {_OF_LINK}\n" if links else ""
    )
    return f"wancli render - <<'JOB'\n{note}{job}\nJOB\n"


def build_job(record: ShotRecord, output: str) -> Job:
    """Build a job of one shot that has the key of `record` on the machine that wrote it.

    A shot that begins with a frame of another one, which is not in this job, begins with the file of that
    frame: its pixels are the same, its key is not.
    """
    shot, model = record.shot, record.model
    rules = [_inject_entry(*pair) for pair in zip(record.injection, record.injected)]
    negative = {"negative": _prompt_value(record.negative)} if record.negative else {}
    return {
        "model": model.files.as_dict() if model.files else model.root,
        "output": output,
        "id": shot.id,
        "prompt": _timeline_value(record.timeline, record)
        if record.timeline
        else _prompt_value(record.prompt),
        **negative,
        **({"image": _image_value(record)} if record.pictures else {}),
        "size": _size_value(record),
        "frames": shot.frames,
        "seed": shot.seed,
        "noise": shot.noise,
        "sampler": {
            "solver": shot.solver,
            "steps": shot.steps,
            "shift": shot.shift,
            "guidance": _guidance_value(shot),
            **({} if shot.boundary is None else {"boundary": shot.boundary}),
        },
        **({"cache": _cache_value(shot.cache)} if shot.cache else {}),
        "text": {
            "max_tokens": record.prompt.max_tokens,
            "truncate": any(prompt.truncated for prompt in record.prompts),
        },
        "inject": rules,
        **({"emphasis": [*map(_emphasis_entry, record.emphasis)]} if record.emphasis else {}),
        **({"steer": [_steer_entry(entry, record) for entry in record.steer]} if record.steer else {}),
        "loras": [_lora_entry(lora) for lora in record.loras],
        **({"attention": _attention_value(record.attention)} if record.attention else {}),
        "video": {"fps": shot.fps, "crf": shot.crf, "codec": shot.codec},
        "memory": {
            "device": model.device,
            "dtype": model.dtype,
            "attention": model.kernels.attention,
            "fp8_matmul": model.kernels.fp8_matmul,
            "decode_chunk": shot.decode_chunk,
        },
    }


def _size_value(record: ShotRecord) -> str | Job:
    """Return the key `size`. Only an area crops a last picture as the official code does."""
    size = (record.shot.width, record.shot.height)
    if any(picture.crop for picture in record.pictures):
        first = record.pictures[0]
        return {"area": official_area((first.width, first.height), size)}
    return f"{size[0]}x{size[1]}"


def _image_value(record: ShotRecord) -> Job:
    """Return the key `image`. All pictures of a shot have the same settings, except perhaps the fit, which
    the job then did not say.

    A frame of another shot's video has neither an orientation nor alpha: any setting of these gives it.
    """
    first = record.pictures[0]
    files = [
        *(picture for picture in record.pictures if not picture.link),
        *(rule.picture for rule in record.injection if rule.picture),
    ]
    read = files[0] if files else first
    is_said = all(picture.fit == first.fit and not picture.crop for picture in record.pictures)
    settings = {
        "preprocess": first.preprocess,
        **({"fit": first.fit} if is_said else {}),
        "orient": read.orient,
        "alpha": read.alpha,
    }
    return {picture.role: picture.path for picture in record.pictures} | settings


def _guidance_value(shot: ShotSettings) -> Any:
    """Return the guidance of the only expert, or that of each of two."""
    by_expert = {stage.expert: stage.guidance for stage in shot.stages if stage.expert != "only"}
    return {"high": shot.guidance, "low": shot.guidance} | by_expert if by_expert else shot.guidance


def _cache_value(cache: CacheRecord) -> Job:
    """Return the key `cache`. The shot was rendered, so a cache of few steps was wanted."""
    return {key: value for key, value in cache.as_dict().items() if key != "reused"} | {"force": True}


def _prompt_value(prompt: PromptRecord) -> Any:
    return {"embedding": prompt.file, "index": prompt.index} if prompt.file else prompt.text


def _timeline_value(timeline: TimelineRecord, record: ShotRecord) -> Any:
    by_id = {prompt.id: prompt for prompt in record.prompts}
    segments = [
        {
            "text": segment.text if segment.rows else _prompt_value(by_id[segment.id]),
            "frames": _format_frames(segment.frames),
        }
        for segment in timeline.segments
    ]
    used = {"text": timeline.common, "fade": timeline.fade}
    return {"segments": segments, "blend": timeline.blend} | {key: used[key] for key in used if used[key]}


def _format_frames(frames: tuple[int, int]) -> str:
    return f"{frames[0]}-{frames[1]}"


def _inject_entry(rule: RuleRecord, other: PromptRecord | InjectedPictureRecord) -> Job:
    reads = {"prompt": _prompt_value(other)} if isinstance(other, PromptRecord) else {"image": other.path}
    return {
        **reads,
        **_strength_keys(rule),
        "branch": "both" if len(rule.branches) == 2 else rule.branches[0],
        "blend": rule.blend,
        "gain": rule.gain,
        **(_area_keys(rule.area) if rule.area else {}),
        **({} if rule.words is None else {"words": rule.words}),
        **(rule.nag.as_dict() if rule.nag else {}),
    }


def _emphasis_entry(entry: EmphasisRecord) -> Job:
    return {
        "words": entry.words,
        "weight": entry.weight,
        "blocks": [*entry.blocks],
        "steps": f"{min(entry.steps)}-{max(entry.steps)}",
        **(_area_keys(entry.area) if entry.area else {}),
    }


def _steer_entry(entry: SteerRecord, record: ShotRecord) -> Job:
    by_id = {prompt.id: prompt for prompt in record.prompts}
    sides = {"toward": entry.toward, "away": entry.away}
    return {
        **{side: [_prompt_value(by_id[id]) for id in ids] for side, ids in sides.items() if ids},
        **_strength_keys(entry),
        **(_area_keys(entry.area) if entry.area else {}),
    }


def _strength_keys(entry: RuleRecord | SteerRecord) -> Job:
    return {
        "blocks": sorted(entry.blocks),
        "strength": [entry.blocks[block] for block in sorted(entry.blocks)],
        "steps": f"{min(entry.steps)}-{max(entry.steps)}",
        "step_strength": [entry.steps[step] for step in sorted(entry.steps)],
    }


def _area_keys(area: AreaRecord) -> Job:
    keys = {
        "frames": area.frames and _format_frames(area.frames),
        "region": area.region and [*area.region],
        "mask": area.mask and area.mask.path,
        "feather": area.feather,
    }
    return {key: value for key, value in keys.items() if value}


def _attention_value(maps: AttentionRecord) -> Job:
    steps = [f"{min(group.members)}-{max(group.members)}" for group in maps.steps]
    return {"words": maps.words, "blocks": [group.members for group in maps.blocks], "steps": steps}


def _lora_entry(lora: LoraRecord) -> Job:
    entry: Job = {"path": lora.path, "strength": lora.strength, "expert": lora.expert or "both"}
    if lora.blocks is not None:
        entry["blocks"] = [*lora.blocks]
    if lora.steps is not None:
        entry["steps"] = f"{min(lora.steps)}-{max(lora.steps)}"
    return entry
