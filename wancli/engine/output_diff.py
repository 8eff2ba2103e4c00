"""What differs between the video at an output and the shot that would have its name, by keys of a job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from wancli.errors import EntryError
from wancli.plan.shot import Shot
from wancli.storage import manifest

_SHOT_FIELDS = {  # a key of a job, and what manifests and shots call it
    "frames": "frames",
    "seed": "seed",
    "noise": "noise",
    "sampler.solver": "solver",
    "sampler.steps": "steps",
    "sampler.shift": "shift",
    "video.fps": "fps",
    "video.crf": "crf",
    "video.codec": "codec",
    "memory.decode_chunk": "decode_chunk",
}
_MAX_NAMED = 3  # keys that are named


def describe_differences(shot: Shot) -> str:
    """`made with seed 1, not 5; another inject.0.blocks`; empty where the manifest does not tell."""
    try:
        body = manifest.read(shot.manifest)
        differences = list(dict.fromkeys(_diff(body, shot))) if body else []
    except (EntryError, KeyError, IndexError, TypeError, AttributeError):  # of another version, or program
        return ""
    named = [f"{key} {there}, not {here}" for key, there, here in differences if there]
    named += [f"another {key}" for key, there, _ in differences if not there]
    rest = [f"{len(named) - _MAX_NAMED} more"] if len(named) > _MAX_NAMED else []
    return f"made with {'; '.join([*named[:_MAX_NAMED], *rest])}" if named else ""


def _diff(body: Mapping[str, Any], shot: Shot) -> Iterator[tuple[str, str, str]]:
    """Each key, and what it is there and here; nothing where that is too long for a line."""
    recorded, model = body["shot"], body["model"]
    if model["sha256"]["transformer"] != shot.model.transformer:
        yield "model", "", ""
    if model["sha256"]["vae"] != shot.model.vae:
        yield "model.vae", "", ""
    yield from _diff_prompts(body, shot)
    size = f"{recorded['width']}x{recorded['height']}", f"{shot.width}x{shot.height}"
    guidance = [f"{stage['guidance']:g}" for stage in recorded["stages"]]
    kernels = asdict(shot.model.kernels)
    values = {
        "size": size,
        **{key: (recorded[name], getattr(shot, name)) for key, name in _SHOT_FIELDS.items()},
        "sampler.guidance": ("/".join(guidance), "/".join(f"{stage.guidance:g}" for stage in shot.stages)),
        "memory.dtype": (model["dtype"], shot.model.dtype),
        **{f"memory.{name}": (model["kernels"][name], kernels[name]) for name in ("attention", "fp8_matmul")},
    }
    for key, (theirs, ours) in values.items():
        if theirs != ours:
            yield key, str(theirs), str(ours)
    yield from _diff_rules(body["injection"], shot)
    yield from _diff_loras(body["loras"], shot)


def _diff_prompts(body: Mapping[str, Any], shot: Shot) -> Iterator[tuple[str, str, str]]:
    prompts, rules = body["prompts"], body["injection"]
    by_id = {prompt["id"]: prompt for prompt in prompts}
    theirs = {"prompt": prompts[0]} | {f"inject.{i}.prompt": by_id[r["text"]] for i, r in enumerate(rules)}
    ours = {"prompt": shot.prompt} | {f"inject.{i}.prompt": text for i, text in enumerate(shot.injected)}
    if len(prompts) > 1 + len(rules):
        theirs["negative"] = prompts[1]
    if shot.negative:
        ours["negative"] = shot.negative
    for key in (key for key in theirs if key in ours and theirs[key]["id"] != ours[key].id):
        recorded = theirs[key]
        if recorded["text"] != ours[key].tokens.text:
            yield key, "", ""
        elif recorded["max_tokens"] != ours[key].tokens.max_tokens:
            yield "text.max_tokens", str(recorded["max_tokens"]), str(ours[key].tokens.max_tokens)
        else:
            yield f"encoder of {key}", "", ""


def _diff_rules(theirs: list[Mapping[str, Any]], shot: Shot) -> Iterator[tuple[str, str, str]]:
    if len(theirs) != len(shot.rules):
        yield "inject", "", ""
        return
    for i, (recorded, rule) in enumerate(zip(theirs, shot.rules)):
        for key, strengths in (("blocks", rule.blocks), ("steps", rule.steps)):
            here = {str(place): strength for place, strength in strengths}
            if recorded[key].keys() != here.keys():
                yield f"inject.{i}.{key}", "", ""
            elif recorded[key] != here:
                yield f"inject.{i}.{'strength' if key == 'blocks' else 'step_strength'}", "", ""
        if recorded["branches"] != list(rule.branches):
            yield f"inject.{i}.branch", "+".join(recorded["branches"]), "+".join(rule.branches)
        for key, ours in (("blend", rule.blend), ("gain", rule.gain)):
            if recorded[key] != ours:
                yield f"inject.{i}.{key}", str(recorded[key]), str(ours)


def _diff_loras(theirs: list[Mapping[str, Any]], shot: Shot) -> Iterator[tuple[str, str, str]]:
    if len(theirs) != len(shot.loras):
        yield "loras", "", ""
        return
    for i, (recorded, use) in enumerate(zip(theirs, shot.loras)):
        for key, ours in use.pixel_settings.items():
            if recorded[key] != (list(ours) if isinstance(ours, tuple) else ours):
                yield f"loras.{i}.{'path' if key == 'sha256' else key}", "", ""
